"""The state of a run between steps: how far it is, what it records, when it saves, how it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from perl.config import Config
from perl.data.streams import Stream
from perl.distributed import Processes, StopSignal
from perl.files import RunFolder
from perl.recipe import Stage, filtered_sources, plan, points
from perl.report.gallery import Gallery
from perl.report.progress import Display
from perl.rollout.reuse import load_reuse, save_reuse
from perl.timing import peak_rss_bytes
from perl.training.checkpoint import CheckpointManager, Progress
from perl.training.components import Components, build
from perl.training.optimizer import Schedule, Updater
from perl.types import Interrupted, PackedBatch, Segment, UserError

logger = logging.getLogger(__name__)


class Session:
    """One run of one seed. Stages ask it what is left to do and tell it what they did."""

    def __init__(
        self, config: Config, folder: RunFolder, display: Display, stop: StopSignal
    ) -> None:
        self.folder, self.display, self.stop = folder, display, stop
        self.stages = plan(config)
        self.points = points(self.stages)
        self.stage = self.stages[0]
        self.components: Components = build(self.stage.config, folder)
        self.processes = Processes(self.components.accelerator)
        self.checkpoints = CheckpointManager(folder.checkpoints, config.run.keep_checkpoints)
        self.gallery = Gallery(folder)
        self.progress = Progress(stage=self.points[0])
        self.updater: Updater | None = None
        self._saved_step: tuple[str, int] | None = None
        self._checkpoint = None
        self._waiting: dict[str, Any] | None = None
        self._started = time.perf_counter()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint; without any, from the start."""
        found = self.checkpoints.load()
        self.components.accelerator.wait_for_everyone()
        if self.components.is_main:
            self.folder.cut_back(found[1].records if found else {})
        if found is None:
            return
        self._checkpoint, self.progress = found
        if self.progress.stage not in self.points:
            raise UserError(
                f"the checkpoint stands in stage {self.progress.stage}, which config.toml does not have "
                f"({', '.join(s.name for s in self.stages)}); restore its stages or start a new run"
            )
        self.checkpoints.restore_model(self._checkpoint, self.components.policy)
        self.components.watch.total_seconds.update(self.progress.seconds)
        self._started = time.perf_counter() - self.progress.elapsed
        self._saved_step = (self.progress.stage, self.progress.step)
        self.display.say(
            f"going on with {self.progress.stage}, {self.progress.step} steps done ({self._checkpoint})"
        )

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all sittings."""
        return time.perf_counter() - self._started

    @property
    def config(self) -> Config:
        """What the present stage runs with."""
        return self.components.config

    def look_at(self, stage: Stage) -> None:
        """Work with a stage's configuration."""
        self.stage, self._waiting = stage, None
        filtered = filtered_sources(stage, self.stages, self.folder.root)
        self.components = self.components.for_stage(stage.config, stage.number, filtered)

    def reach(self, point: str) -> bool:
        """Move on to a point of the run; False if it lies behind."""
        if self.points.index(self.progress.stage) > self.points.index(point):
            return False
        if self.progress.stage != point:
            self.progress.stage, self.progress.step = point, 0
        return True

    def leave(self, save: bool = True) -> None:
        """The point where the run stands is done: save, so that nothing of it is done twice."""
        self.display.close()
        following = self.points[self.points.index(self.progress.stage) + 1]
        self.progress.stage, self.progress.step = following, 0
        self.updater = None
        if save:
            self.save()

    @property
    def trained_before(self) -> str | None:
        """Name of the stage whose model this one started from; None: the run's initial model."""
        earlier = self.stages[: self.stages.index(self.stage)]
        return next((s.name for s in reversed(earlier) if s.steps), None)

    def make_updater(self, schedule: Schedule) -> Updater:
        """The stage's optimizer, with its state and the waiting groups where the run goes on inside the stage."""
        train = self.config.train
        self.updater = Updater(
            self.components.accelerator,
            self.components.policy,
            schedule,
            train.weight_decay,
            train.betas,
            train.max_grad_norm,
        )
        if self._checkpoint is not None and self.progress.step > 0:
            self.checkpoints.restore_optimizer(
                self._checkpoint, self.components.policy, self.updater.optimizer
            )
            if state := load_reuse(self._checkpoint, self.processes.index):
                self.components.collector.reuse.load_state_dict(state)
        self._checkpoint = None
        return self.updater

    def stream(self) -> Stream:
        """The stage's examples, from where it stopped."""
        stream = self.components.stream(self.stage)
        if self.stage.name in self.progress.streams:
            stream.load_state_dict(self.progress.streams[self.stage.name])
        return stream

    def pack(self, segments: Sequence[Segment]) -> list[PackedBatch]:
        """Micro-batches of the segments, within the token budget."""
        train = self.config.train
        return self.components.policy.pack(
            segments, train.tokens_per_micro_batch, train.share_prompts
        )

    def after_step(
        self,
        step: int,
        row: dict[str, Any],
        stream: Stream,
        shown: dict[str, float],
        before_saving: Callable[[], None] = lambda: None,
    ) -> None:
        """Record a step that is complete; save if it is time; stop if that was asked for.

        `before_saving` belongs to the step: a run that goes on from its checkpoint does not do it again.
        """
        self.progress.step = step + 1
        self.progress.streams[self.stage.name] = stream.state_dict()
        lap = self.components.watch.lap()
        if self.components.is_main and (step + 1) % self.config.run.log_every == 0:
            number = self.stage.first_step + step + 1
            here = {"stage": self.stage.kind, "step": number, "name": self.stage.name}
            self.record({**here, **row, **lap})
        self.display.advance(numbers=shown)
        reuse = self.components.collector.reuse
        # As it is between steps: a step that fails has taken groups, and is done again.
        self._waiting = reuse.state_dict() if reuse.active else None
        before_saving()
        every = self.config.run.checkpoint_every
        stop = self.processes.any(self.stop.requested)
        if stop or (every and (step + 1) % every == 0):
            self.save()
        if stop:
            raise Interrupted(f"stopped after {self.stage.name} step {step + 1}")

    def record(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        timing = {"time/elapsed": round(self.elapsed, 3), "memory/peak_rss_bytes": peak_rss_bytes()}
        self.folder.append(self.folder.metrics, {**row, **timing})
        numbers = {
            f"{row['stage']}/{k}": v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "step"
        }
        # Trackers count the steps of all stages together: wandb's steps never go back.
        before = sum(s.steps for s in self.stages[: self.stages.index(self.stage)])
        trained = row["stage"] == self.stage.kind or self.stage.kind == "rl"
        here = row["step"] - self.stage.first_step if trained else self.stage.steps
        self.components.accelerator.log(numbers, step=before + here)

    def save(self) -> None:
        """A checkpoint of the last complete step."""
        here = (self.progress.stage, self.progress.step)
        if here == self._saved_step:
            return
        states = self.processes.gather([self._waiting]) if self._waiting is not None else []
        with self.components.watch("checkpoint"):
            if self.components.is_main:
                self.progress.elapsed = self.elapsed
                self.progress.seconds = dict(self.components.watch.total_seconds)
                self.progress.records = self.folder.positions()
                optimizer = self.updater.optimizer if self.updater is not None else None
                self.checkpoints.save(
                    self.components.policy,
                    optimizer,
                    self.progress,
                    lambda folder: save_reuse(folder, states),
                )
            self.components.accelerator.wait_for_everyone()
        self._saved_step = here

    def rescue(self, error: UserError) -> None:
        """Keep what was done before a user's mistake, raised in every process, stopped the run."""
        self.display.close()
        if self.progress.step > 0:
            self.save()
            logger.info(
                "kept %s step %d before: %s", self.progress.stage, self.progress.step, error
            )
