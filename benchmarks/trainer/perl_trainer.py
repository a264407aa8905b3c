"""PeRL's side: its own session and reinforcement stage, told to write nothing down and to sample to the full length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainer.clock import PartWatch, StepClock
from benchmarks.trainer.start import REWARD, Start, stream
from perl import config as configs
from perl.config import Config
from perl.data.streams import ExampleStream
from perl.distributed import StopSignal
from perl.files import RunFolder
from perl.model.head import HeadLoss
from perl.recipe import Stage
from perl.report.progress import Display
from perl.training.reinforce import reinforce
from perl.training.session import Session

NEVER = 10**9


class PerlTrainer:
    """A fresh run of PeRL's RL stage over the questions of a seed.

    Args:
        folder: of the run.
        steps: optimizer steps of the stage.
        clip_gradients: off for a look at the gradients.
    """

    def __init__(
        self, start: Start, folder: Path, steps: int, seed: int, clip_gradients: bool = True
    ) -> None:
        run = RunFolder(folder)
        run.make_parts()
        self.session = _Session(start, _config(start, run, steps, seed, clip_gradients), run)
        self.clock = self.session.clock
        self.core: Any = self.session.components.policy.core

    def train(self) -> None:
        """All steps."""
        reinforce(self.session, self.session.stage)


class _Session(Session):
    """A session over the benchmark's questions that keeps no records and ends no completion early."""

    def __init__(self, start: Start, config: Config, folder: RunFolder) -> None:
        self.start = start
        super().__init__(config, folder, Display(enabled=False), StopSignal())
        self.clock = StepClock(self.components.policy.device)
        self.components.watch = PartWatch(self.clock)
        self.enter_stage(self.stages[0])

    def enter_stage(self, stage: Stage) -> None:
        super().enter_stage(stage)
        engine = self.components.engine
        engine.banned = torch.cat([engine.banned, engine.ends.cpu()])
        # TRL scores with all tokens in the softmax; PeRL leaves out those that are never sampled.
        every = torch.empty(0, dtype=torch.int64)
        self.components.head = HeadLoss(
            self.components.policy, every, self.config.rollout.temperature
        )

    def stream(self) -> ExampleStream:
        return stream(self.start.setting, self.config.run.seed)

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self.clock.end_step()

    def save(self) -> None:
        """No checkpoint: TRL writes none either."""


def _config(start: Start, run: RunFolder, steps: int, seed: int, clip_gradients: bool) -> Config:
    setting = start.setting
    return Config(
        run=configs.RunConfig(
            dir=str(run.root),
            seed=seed,
            log_every=NEVER,
            checkpoint_every=0,
            save_rollouts_every=0,
            trackers=(),
        ),
        model=start.model_config,
        data=configs.DataConfig(max_prompt_tokens=setting.budget),
        permutation=configs.PermutationConfig(orders=setting.orders),
        rollout=configs.RolloutConfig(
            per_order=setting.per_order,
            temperature=1.0,
            max_new_tokens=setting.completion,
            kv_cache_tokens=setting.sequences * setting.budget,
        ),
        reward=configs.RewardConfig(functions=(REWARD,), weights=(1.0,)),
        filter=configs.FilterConfig(zero_variance=False, max_tries=1),
        advantage=configs.AdvantageConfig(over="order"),
        loss=configs.LossConfig(preset="dapo", clip_low=setting.clip, clip_high=setting.clip),
        train=configs.TrainConfig(
            steps=steps,
            examples_per_step=len(setting.images),
            tokens_per_micro_batch=setting.budget,
            lr=setting.learning_rate,
            weight_decay=setting.weight_decay,
            betas=setting.betas,
            max_grad_norm=setting.max_grad_norm if clip_gradients else math.inf,
        ),
        eval=configs.EvalConfig(examples=0),
        stages=(configs.StageConfig(name="rl", kind="rl"),),
    )
