"""The state of a run between steps: how far it is, what it records, when it saves, how it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from perl.checkpoint import CheckpointManager, Progress
from perl.config import Config
from perl.data import ExampleStream
from perl.gallery import Gallery
from perl.interrupt import Interrupted, StopSignal
from perl.metrics import peak_rss_bytes
from perl.processes import Processes
from perl.progress import Display
from perl.run import RunFolder
from perl.setup import Workbench, build
from perl.types import PackedBatch, Segment, UserError
from perl.update import Schedule, Updater

logger = logging.getLogger(__name__)

STAGES = ("cold_start", "before", "rl", "after", "done")


class Session:
    """One run of one seed. Stages ask it what is left to do and tell it what they did."""

    def __init__(
        self, config: Config, folder: RunFolder, display: Display, stop: StopSignal
    ) -> None:
        self.config, self.folder, self.display, self.stop = config, folder, display, stop
        self.bench: Workbench = build(config, folder)
        self.processes = Processes(self.bench.accelerator)
        self.checkpoints = CheckpointManager(folder.checkpoints, config.run.keep_checkpoints)
        self.gallery = Gallery(folder)
        self.progress = Progress()
        self.updater: Updater | None = None
        self._saved_step: tuple[str, int] | None = None
        self._checkpoint = None
        self._started = time.perf_counter()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint; without any, from the start."""
        found = self.checkpoints.load()
        self.bench.accelerator.wait_for_everyone()
        if self.bench.is_main:
            self.folder.cut_back(found[1].records if found else {})
        if found is None:
            return
        self._checkpoint, self.progress = found
        self.checkpoints.restore_model(self._checkpoint, self.bench.policy)
        self.bench.watch.total_seconds.update(self.progress.seconds)
        self._started = time.perf_counter() - self.progress.elapsed
        self._saved_step = (self.progress.stage, self.progress.step)
        self.display.say(
            f"going on with {self.progress.stage}, {self.progress.step} steps done ({self._checkpoint})"
        )

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all sittings."""
        return time.perf_counter() - self._started

    def reach(self, stage: str) -> bool:
        """Move on to a stage; False if it lies behind."""
        if STAGES.index(self.progress.stage) > STAGES.index(stage):
            return False
        if self.progress.stage != stage:
            self.progress.stage, self.progress.step = stage, 0
        return True

    def leave(self, following: str, save: bool = True) -> None:
        """The stage is done: save, so that nothing of it is done twice."""
        self.display.close()
        self.progress.stage, self.progress.step = following, 0
        self.updater = None
        if save:
            self.save()

    def make_updater(self, schedule: Schedule) -> Updater:
        """The stage's optimiser, with its state where the run goes on inside the stage."""
        train = self.config.train
        self.updater = Updater(
            self.bench.accelerator,
            self.bench.policy,
            schedule,
            train.weight_decay,
            train.betas,
            train.max_grad_norm,
        )
        if self._checkpoint is not None and self.progress.step > 0:
            self.checkpoints.restore_optimizer(
                self._checkpoint, self.bench.policy, self.updater.optimizer
            )
        self._checkpoint = None
        return self.updater

    def stream(self, stage: str) -> ExampleStream:
        """The stage's examples, from where it stopped."""
        stream = self.bench.stream(stage)
        if stage in self.progress.streams:
            stream.load_state_dict(self.progress.streams[stage])
        return stream

    def pack(self, segments: Sequence[Segment]) -> list[PackedBatch]:
        """Micro-batches of the segments, within the token budget."""
        train = self.config.train
        return self.bench.policy.pack(segments, train.tokens_per_micro_batch, train.share_prompts)

    def after_step(
        self,
        stage: str,
        step: int,
        row: dict[str, Any],
        stream: ExampleStream,
        shown: dict[str, float],
        before_saving: Callable[[], None] = lambda: None,
    ) -> None:
        """Record a step that is complete; save if it is time; stop if that was asked for.

        `before_saving` belongs to the step: a run that goes on from its checkpoint does not do it again.
        """
        self.progress.step = step + 1
        self.progress.streams[stage] = stream.state_dict()
        lap = self.bench.watch.lap()
        if self.bench.is_main and (step + 1) % self.config.run.log_every == 0:
            self.record({"stage": stage, "step": step + 1, **row, **lap})
        self.display.advance(numbers=shown)
        before_saving()
        every = self.config.run.checkpoint_every
        stop = self.processes.any(self.stop.requested)
        if stop or (every and (step + 1) % every == 0):
            self.save()
        if stop:
            raise Interrupted(f"stopped after {stage} step {step + 1}")

    def record(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        timing = {"time/elapsed": round(self.elapsed, 3), "memory/peak_rss_bytes": peak_rss_bytes()}
        self.folder.append(self.folder.metrics, {**row, **timing})
        numbers = {
            f"{row['stage']}/{k}": v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "step"
        }
        before = self.config.cold_start.steps if row["stage"] != "cold_start" else 0
        self.bench.accelerator.log(
            numbers, step=before + row["step"]
        )  # wandb's steps never go back

    def save(self) -> None:
        """A checkpoint of the last complete step."""
        here = (self.progress.stage, self.progress.step)
        if here == self._saved_step:
            return
        with self.bench.watch("checkpoint"):
            if self.bench.is_main:
                self.progress.elapsed = self.elapsed
                self.progress.seconds = dict(self.bench.watch.total_seconds)
                self.progress.records = self.folder.positions()
                optimizer = self.updater.optimizer if self.updater is not None else None
                self.checkpoints.save(self.bench.policy, optimizer, self.progress)
            self.bench.accelerator.wait_for_everyone()
        self._saved_step = here

    def rescue(self, error: UserError) -> None:
        """Keep what was done before a user's mistake, raised in every process, stopped the run."""
        self.display.close()
        if self.progress.step > 0:
            self.save()
            logger.info(
                "kept %s step %d before: %s", self.progress.stage, self.progress.step, error
            )
