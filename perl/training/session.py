"""The state of a run between steps: how far it is, what it records, when it saves, how it goes on."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from perl.config import Config
from perl.data.dataset import Dataset
from perl.data.readahead import ReadAhead
from perl.data.streams import Drawn, Stream
from perl.distributed import Processes, StopSignal
from perl.files import RunFolder
from perl.recipe import Stage, filtered_sources, plan, points
from perl.report.gallery import Gallery, Rows
from perl.report.progress import Display
from perl.report.trackers import Trackers
from perl.rollout.replay import load_replay, save_replay
from perl.timing import peak_memory
from perl.training.components import Components, build
from perl.training.optimizer import Optimizer, Schedule
from perl.training.parallel.balancing import ModelFlops, Work, share_out
from perl.training.parallel.rows import joint_rows
from perl.training.saving.checkpoint import (
    CheckpointManager,
    Progress,
    check_weights,
    in_shards,
)
from perl.types import Example, Interrupted, PackedBatch, Segment, UserError, one_line

logger = logging.getLogger(__name__)


class ProcessShare:
    """A process's share of a stage's examples.

    Every process advances the same stream by the same amount and keeps every n-th example. With `ahead` the pictures of
    as many as are drawn at once are read ahead.
    """

    def __init__(
        self, stream: Stream, processes: Processes, ahead: ReadAhead | None = None
    ) -> None:
        self.stream, self.processes, self.ahead = stream, processes, ahead
        self._count = self._place = 0
        if ahead:
            ahead.upcoming = self._upcoming
            stream.read_by(ahead.read)

    def draw(self, count: int) -> list[Drawn]:
        """This process's share of the next `count` examples of all processes."""
        self._count, out = count, []
        for place in range(count):
            self._place = place
            drawn = self.stream.draw_one(self._is_own(place))
            out += [drawn] if drawn else []
        self._place = 0
        if self.ahead:
            self.ahead.begin()
        return out

    def _is_own(self, place: int) -> bool:
        return place % self.processes.count == self.processes.index

    def _upcoming(self) -> Iterator[tuple[Dataset, int]]:
        """What this process will read of the rest of a draw and of the next as far."""
        places = range(self._place, self._place + self._count)
        for place, each in zip(places, self.stream.upcoming(), strict=False):
            if self.stream.reads_all or self._is_own(place % self._count):
                yield each

    def find(self, key: Sequence[int]) -> Example:
        """An example that was drawn before."""
        return self.stream.find(key)


class Session:
    """One run of one seed. A stage's function asks it what is left to do and tells it what it did:

    if session.begin(stage):
        for step in session.steps():
            ...
            session.record_step(step, row, shown)
            session.end_step(step)
        session.finish_stage()
    """

    source: ProcessShare
    """The stage's examples, from its first step on."""

    def __init__(
        self, config: Config, folder: RunFolder, display: Display, stop: StopSignal
    ) -> None:
        self.folder, self.display, self.stop = folder, display, stop
        self.stages = plan(config)
        self.points = points(self.stages)
        self.stage = self.stages[0]
        self.components: Components = build(config, self.stage, folder)
        self.processes = Processes(self.components.accelerator)
        self.checkpoints = CheckpointManager(
            folder.checkpoints,
            config.run.keep_checkpoints,
            self.processes,
            asynchronous=self.components.accelerator.device.type == "cuda",
        )
        self.gallery = Gallery(folder)
        self.trackers = Trackers(self.components.accelerator, config, folder)
        self.progress = Progress(stage=self.points[0])
        self.optimizer: Optimizer | None = None
        self._saved_point: tuple[str, int] | None = None
        self._whole_point: tuple[str, int] | None = None
        """Of the last checkpoint that is known to be on the disk; the saved one may be being written."""
        self._again_from: int | None = None
        self._checkpoint = None
        self._ahead: ReadAhead | None = None
        self._replay_state: dict[str, Any] | None = None
        self._recorded_updates = 0
        self._place: dict[str, Any] | None = None
        """Of the data behind the present step, where the next one's have been drawn."""
        self._started = time.perf_counter()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint; without any, from the start."""
        with self.processes.jointly():
            found = [self.checkpoints.load()] if self.components.is_main else []
        # All go on from the one that the first has found to be whole.
        (found,) = self.processes.gather(found)
        self._again_from = 0
        if found is not None:
            self._checkpoint, self.progress = found
            self.checkpoints.present = self._checkpoint
            if self.progress.stage not in self.points:
                raise UserError(
                    f"the checkpoint is from stage {self.progress.stage}, which config.toml no longer defines "
                    f"({', '.join(s.name for s in self.stages)}); restore its stages or start a new run"
                )
            with self.processes.jointly():  # One says it, not all.
                if self.components.is_main:
                    check_weights(self._checkpoint, self.components.policy)
            self.checkpoints.restore_model(self._checkpoint, self.components.policy)
        # Nothing has changed of a run whose checkpoint was refused by any process.
        self.components.accelerator.wait_for_everyone()
        if self.components.is_main:
            self.folder.cut_back(self.progress.records)
        if self._checkpoint is None:
            return
        self.components.watch.total_seconds.update(self.progress.seconds)
        self._started = time.perf_counter() - self.progress.elapsed
        self._saved_point = self._whole_point = (self.progress.stage, self.progress.step)
        stage, step = self.progress.stage, self.progress.step
        self._again_from = self.progress.steps + 1
        where = (
            f"resuming {stage} after step {step}"
            if step
            else f"going on with {self._called(stage)}"
        )
        where = "the run is finished" if stage == "done" else where
        self.display.say(f"{where} ({self._checkpoint})")

    @property
    def elapsed(self) -> float:
        """Seconds of this run, including those before a resume."""
        return time.perf_counter() - self._started

    @property
    def config(self) -> Config:
        """What the present stage runs with."""
        return self.stage.config

    def enter_stage(self, stage: Stage) -> None:
        """Work with a stage's configuration."""
        self.stage, self._replay_state = stage, None
        filtered = filtered_sources(stage, self.stages, self.folder.root)
        self.components = self.components.for_stage(stage, filtered)

    def advance_to(self, point: str) -> bool:
        """Move on to a point of the run; False if it lies behind."""
        if self.points.index(self.progress.stage) > self.points.index(point):
            return False
        if self.progress.stage != point:
            self.progress.stage, self.progress.step = point, 0
        return True

    def begin(self, stage: Stage) -> bool:
        """Whether steps of the stage are left to take; one without any is finished at once."""
        if not self.advance_to(stage.name):
            return False
        if stage.steps == 0:
            self.finish_stage(save=False)
            return False
        if self.progress.step == 0:
            self.progress.stale = 0
        self.show_stage(self.progress.step)
        return True

    def show_stage(self, done: int) -> None:
        """Its progress bar, with so many steps done."""
        name = self.stage.name
        title = name.replace("_", " ")
        if self.stage.kind == "rl":
            title = "RL" if name == "rl" else f"RL: {name}"
        self.display.stage(title, self.stage.steps, done)

    def steps(self) -> Iterator[int]:
        """The steps of the stage that are left, from 0, with its data where it stopped; fewer where `eval.patience` ends."""
        self._ahead = self.components.read_ahead()
        self.source = ProcessShare(self.stream(), self.processes, self._ahead)
        self._skipped, self._place = 0, None
        for step in range(self.progress.step, self.stage.steps):
            if 0 < self.config.eval.patience <= self.progress.stale and self.stage.kind == "rl":
                best, key = self.progress.best, self.config.run.keep_best
                self.display.say(
                    f"{self.stage.name} ends after {step} of {self.stage.steps} steps: {self.progress.stale} evaluations "
                    f"without a better {key} than {best['value']:.4g}, of step {best['step']:.0f}"
                )
                return
            # A resumed run begins each step alike: the bits of a trained tower's features depend on the images they were encoded
            # with, and dropout draws from torch's generators, those of all devices.
            self.components.policy.vision.clear_cache()
            place = f"{self.config.run.seed}/{self.stage.name}/{step}/{self.processes.index}"
            torch.manual_seed(random.Random(place).getrandbits(63))
            yield step

    def look_ahead(self, step: int) -> None:
        """Begin with the next step's rollouts, while this one is trained on, where `rollout.ahead` asks for it."""
        # A run that goes on from this step's checkpoint samples them anew.
        self._place = self.source.stream.state_dict()
        if self.config.rollout.ahead and step + 1 < self.stage.steps:
            self.components.collector.begin_ahead(self.source, self.processes, step + 1)

    def finish_stage(self, save: bool = True) -> None:
        """Mark the current point as finished and checkpoint, so that a resume does not repeat it."""
        self.display.close()
        self.close()
        point = self.progress.stage
        if point == self.stage.name:
            self.progress.taken[point] = self.progress.step
        following = self.points[self.points.index(point) + 1]
        self.progress.stage, self.progress.step = following, 0
        # Of the last stage its state stays, so that the run can be given more steps.
        if self.stage != self.stages[-1]:
            self.optimizer = None
        if save:
            self.save()
        self.optimizer = None

    def close(self) -> None:
        """End the processes that read ahead."""
        if self._ahead:
            self._ahead.close()

    def end(self) -> None:
        """Let go of all that the run has opened."""
        self.close()
        if self.components.servers:
            self.components.servers.close()
        self.trackers.finish()

    @property
    def first_step(self) -> int:
        """Steps that earlier stages of this one's kind have taken."""
        return self.taken(s for s in self._earlier if s.kind == self.stage.kind)

    def taken(self, stages: Iterable[Stage]) -> int:
        """Steps of these stages: those that were taken where one is over, else those that are planned."""
        return sum(self.progress.taken.get(s.name, s.steps) for s in stages)

    @property
    def _earlier(self) -> Sequence[Stage]:
        return self.stages[: self.stages.index(self.stage)]

    @property
    def trained_before(self) -> str | None:
        """Name of the stage whose model this one started from; None: the run's initial model."""
        return next((s.name for s in reversed(self._earlier) if s.steps), None)

    def make_optimizer(self, schedule: Schedule) -> Optimizer:
        """The stage's optimizer, with its state and the stored groups where the run goes on inside the stage."""
        components = self.components
        self.optimizer = Optimizer(
            components.accelerator, components.head, schedule, self.config.train
        )
        if self._checkpoint is not None and self.progress.step > 0:
            self.checkpoints.restore_optimizer(self._checkpoint, components.policy, self.optimizer)
            here = self.processes.index, self.processes.count
            if state := load_replay(self._checkpoint, *here):
                components.collector.replay.load_state_dict(state)
        # Only the stage that the run stopped in goes on from it; later ones start afresh.
        self._checkpoint, self._recorded_updates = None, 0
        return self.optimizer

    def stream(self) -> Stream:
        """The stage's examples, from where it stopped."""
        stream = self.components.stream()
        if self.stage.name in self.progress.streams:
            stream.load_state_dict(self.progress.streams[self.stage.name])
        return stream

    def pack(self, work: Sequence[Work]) -> tuple[list[PackedBatch], list[Segment]]:
        """This process's micro-batches of one optimizer step, within the token budget, and the segments in them.

        Every process calls it together, as completions differ in length: work moves from those with much to those with little,
        and with sharded weights all have equally many micro-batches (see `perl.training.parallel`).

        Args:
            work: the groups that this process holds.
        """
        train, policy = self.config.train, self.components.policy
        budget, processes = train.tokens_per_micro_batch, self.processes
        if processes.count > 1:
            flops = ModelFlops.of(policy, train.share_prompts)
            if policy.sharding:
                return joint_rows(work, flops, processes, budget)
            work = share_out(work, flops, processes)
        segments = [replace(s, group=number) for number, w in enumerate(work) for s in w]
        return policy.pack(segments, budget, train.share_prompts), segments

    def record_step(self, step: int, row: dict[str, Any], shown: dict[str, float]) -> None:
        """A step is complete: write its metrics down, and show some of them behind the progress bar."""
        stream = self.source.stream
        if self.config.data.on_error == "skip":
            row = {**row, "data/skipped": stream.skipped - self._skipped}
            self._skipped = stream.skipped
        lap = self.components.watch.lap()  # Of this step, also where its row is not written.
        if self.components.is_main and (step + 1) % self.config.run.log_every == 0:
            number = self.first_step + step + 1
            here = {"stage": self.stage.kind, "step": number, "name": self.stage.name}
            self.record({**here, **row, **lap})
        self.progress.step, self.progress.ended = step + 1, False
        self.progress.streams[self.stage.name] = self._place or self.source.stream.state_dict()
        self.display.advance(numbers=shown)
        # Between steps: one that fails has already taken groups out, and a resumed run takes it again.
        replay = self.components.collector.replay
        self._replay_state = replay.state_dict() if replay.active else None
        self._recorded_updates = self.optimizer.updates if self.optimizer else 0
        self.progress.records = self.folder.positions()

    def end_step(self, step: int) -> None:
        """Checkpoint when due; stop if requested.

        Raises:
            Interrupted: stop was requested; the step has been saved.
        """
        self.progress.ended, self.progress.records = True, self.folder.positions()
        every = self.config.run.checkpoint_every
        stop = self.processes.any(self.stop.requested)
        best = self.progress.best.get("step") == self.progress.steps
        if stop or best or (every and (step + 1) % every == 0):
            self.save()
        if stop:
            self.settle()
            raise Interrupted(f"stopped after {self.stage.name} step {step + 1}")

    def judge(self, numbers: dict[str, Any]) -> None:
        """Take note of an evaluation that is better than all before by `run.keep_best`, or that is not.

        Raises:
            UserError: it has no such number.
        """
        key, progress = self.config.run.keep_best, self.progress
        if not key:
            return
        if key not in numbers or (numbers[key] is None and not progress.best):
            known = ", ".join(name for name, v in numbers.items() if isinstance(v, float))
            raise UserError(
                f"run.keep_best = {key} is not measured by this run's rewards on this data; take one of {known}"
            )
        value = numbers[key]
        progress.stale += 1
        if value is not None and (not progress.best or value > progress.best["value"]):
            progress.best, progress.stale = {"step": progress.steps, "value": value}, 0

    def restore_best(self) -> bool:
        """Put the weights of the best evaluation into the policy; False if it is not known which they are."""
        if not self.progress.best:
            return False
        best = self.folder.checkpoints / "best"
        self.checkpoints.restore_model(best, self.components.policy)
        return True

    def record(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        elapsed = {"time/elapsed": round(self.elapsed, 3)}
        # Of an RL step's row the memory is that of the process that took most.
        self.folder.append(self.folder.metrics, {**peak_memory(), **row, **elapsed})
        numbers = {
            f"{row['stage']}/{k}": v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "step"
        }
        self.trackers.log(numbers, self._tracked_step(row))

    def show(self, rows: Rows) -> None:
        """Rollouts that were kept, to the trackers."""
        if rows:
            self.trackers.show(rows, self._tracked_step(rows[0]))

    def start_trackers(self) -> None:
        """After `restore`, if the run goes on."""
        with self.processes.jointly():
            self.trackers.start(self._again_from)

    def _tracked_step(self, row: dict[str, Any]) -> int:
        """Trackers count the steps of all stages together: wandb's steps never go back. What is measured after another kind of
        stage than RL stands at that stage's end."""
        trained = row["stage"] == self.stage.kind or self.stage.kind == "rl"
        here = row["step"] - self.first_step if trained else self.taken([self.stage])
        return self.taken(self._earlier) + here

    def save(self) -> None:
        """A checkpoint of the last complete step; all processes take part."""
        self.progress.records = self.folder.positions()
        self._save()

    def settle(self, alone: bool = False) -> None:
        """Wait until the last checkpoint is on the disk; all processes take part, or this one `alone`.

        Raises:
            Exception: it could not be written.
        """
        try:
            self.checkpoints.wait(alone)
        except Exception:
            self._saved_point = self._whole_point
            raise
        self._whole_point = self._saved_point

    def _save(self, alone: bool = False) -> None:
        here = (self.progress.stage, self.progress.step)
        self.settle(alone)
        if here == self._saved_point:
            return
        own = self._replay_state
        states = self.processes.gather([own]) if own is not None else []
        self.progress.elapsed = self.elapsed
        self.progress.seconds = dict(self.components.watch.total_seconds)
        with self.components.watch("checkpoint"):
            self.checkpoints.save(
                self.components.policy,
                self.optimizer,
                self.progress,
                lambda folder: save_replay(folder, states),
                alone,
            )
        self._saved_point = here
        if alone or not self.checkpoints.asynchronous:
            self._whole_point = here

    def rescue(self, error: BaseException) -> None:
        """Save the last complete step for an error that ends the run, and note on the error where it came and what is saved.

        It stays the error that is raised, whatever goes wrong here. The others of several processes do not come for an error
        of one alone: the first then saves by itself, unless weights or stored groups of the others belong to the checkpoint.
        """
        self.stop.ending = True
        self.display.close()
        error.add_note(self._where())
        together = self.processes.share(error)
        whole_here = self._replay_state is None and not in_shards(self.components.policy)
        alone = self.components.is_main and whole_here
        # A step that failed behind its first update has changed the weights: they are those of no step.
        updates = self.optimizer.updates if self.optimizer else self._recorded_updates
        begun = self.progress.step > 0 or any(self.folder.positions().values())
        whole = begun and updates == self._recorded_updates
        if whole and (together or alone):
            if isinstance(error, KeyboardInterrupt):
                logger.info("saving the last complete step first")
            try:
                self._save(alone=not together)
                self.settle(alone=not together)
            except (Exception, KeyboardInterrupt) as further:
                logger.warning("the last complete step could not be saved: %s", one_line(further))
        if self._whole_point and self.components.is_main:
            stage, step = self._whole_point
            saved = f"{stage} step {step}" if step else f"all before {self._called(stage)}"
            error.add_note(f"saved: {saved}")
        if not together:
            error.add_note("other processes of this run may have a message of their own")

    def _where(self) -> str:
        """The point that the run has come to, in words."""
        stage, step = self.progress.stage, self.progress.step
        if stage != self.stage.name or not self.stage.steps:
            return f"{'at' if stage == 'done' else 'in'} {self._called(stage)}"
        inside = self.progress.ended and step < self.stage.steps
        return f"in {stage} step {step + 1}" if inside else f"after {stage} step {step}"

    def _called(self, point: str) -> str:
        """A point of the run in words."""
        if point in (stage.name for stage in self.stages):
            return point
        told = {"before": "before RL", "after": "after RL"}.get(point, point)
        return "the end" if point == "done" else f"the evaluation {told}"
