"""`perl-rl profile`: a few steps of a recipe as training takes them, timed by stage and traced by torch.profiler."""

from __future__ import annotations

import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from perl.config import Command, Config, StageConfig
from perl.files import RunFolder, is_main_process, read_rows, write_json
from perl.recipe import DEFAULT_RECIPE, check_named, plan, save_config
from perl.report.progress import Display
from perl.types import UserError

RESULT = "profile.json"
_PASSES = {"prefill": 1, "decode": 1, "language_model": 16}
"""Ranges of a forward pass of the language model, and for how many each counts in --forwards: one that training takes
has a dozen times as many operators, with its backward."""


@dataclass(frozen=True)
class Profile(Command):
    """Where the time of a training step goes, by stage, and a trace of one: takes a few steps of a recipe's first RL
    stage from the recipe's initial model, without cold start and evaluation, and keeps neither weights nor metrics.
    Groups that filter.* would drop are kept, so that every step has something to train on. Every key of the
    recipe can be overridden, as in `perl-rl profile demo --train.examples-per-step 4`."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    steps: int = 3
    """Steps that are timed, without torch.profiler, which would slow the host down."""
    warmup: int = 1
    """Steps before them, in no figure."""
    traced: int = 1
    """Steps after them under torch.profiler: operators, a GPU's times, the trace; 0: none."""
    forwards: int = 96
    """How many forward passes of the language model a traced step's rollout is traced for, and a sixteenth as many rows
    of its log-probs and of its update: a trace that can still be opened."""
    stage: str = ""
    """Name of another stage of the recipe, as in --stage cold_start; empty: the first of RL."""
    output: Path | None = None
    """Folder for profile.json, config.toml and the trace; empty: runs/profile-RECIPE."""
    overwrite: bool = False
    """Replace the profile that is there."""
    shapes: bool = False
    """Record the shapes of operators' inputs, and tell operators apart by them."""
    memory: bool = False
    """Record allocations in the trace."""
    stacks: bool = False
    """Record the lines of Python that called, in the trace; slow."""

    def execute(self) -> None:
        # The profiler's library announces itself on stderr and warns of pauses; both are read when they first speak.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch

        from perl.distributed import on_main_process
        from perl.training.checks import check_setup
        from perl.training.profile_report import print_report

        for name, least in (("steps", 1), ("warmup", 0), ("traced", 0), ("forwards", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name} {value}: must be {least} or more")
        check_named(self.config)
        config = self.config_to_profile()
        check_setup(config)
        output = self.output or Path("runs") / f"profile-{Path(self.recipe).stem}"
        with _stopping(), _work_folder(output, self.overwrite) as work:
            recorder = self._take_steps(config, work)
            on_main_process(lambda: None)  # Every trace is there.
            if not is_main_process():
                return
            out = recorder.figures(config)
            traces = [path.name for path in work.glob("trace*")]
            for old in output.glob("trace*.json.gz"):
                old.unlink()
            for name in traces:
                (work / name).rename(output / name)
            save_config(config, output / "config.toml")
            write_json(output / RESULT, out)
        print_report(out, Path(self.recipe).name)
        if self.traced:
            averages = recorder.profiler.key_averages(group_by_input_shape=self.shapes)
            on = "device" if torch.cuda.is_available() else "cpu"
            print(averages.table(sort_by=f"self_{on}_time_total", row_limit=10))
        print(f"written: {', '.join([str(output / RESULT), 'config.toml', *traces])}", end="")
        print(" (open at https://ui.perfetto.dev or chrome://tracing)" if traces else "")

    def config_to_profile(self) -> Config:
        """The recipe with nothing but the stage to profile, which trains at every step and keeps nothing.

        Groups without signal are kept, so that each step trains on all that it rolls out: a model that is never right,
        or always, would else leave nothing to train on.

        Raises:
            UserError: there is no such stage, or it takes no steps.
        """
        stages = [s for s in plan(self.config) if s.kind in ("cold_start", "rl")]
        found = [s for s in stages if (s.name == self.stage if self.stage else s.kind == "rl")]
        if not found:
            names = ", ".join(s.name for s in stages)
            raise UserError(
                f"--stage {self.stage or 'rl'}: the recipe has no such stage that takes steps; "
                + (f"choose {names}" if names else "add one of kind rl")
            )
        stage, own = found[0], found[0].config
        steps = self.warmup + self.steps + self.traced
        seed = (own.run.seeds or (own.run.seed,))[0]
        nothing = {"trackers": (), "checkpoint_every": 0, "save_rollouts_every": 0}
        return replace(
            own,
            stages=(StageConfig(name=stage.name, kind=stage.kind),),  # pyright: ignore[reportArgumentType]
            filter=replace(own.filter, zero_variance=False, min_accuracy=0.0, max_accuracy=1.0),
            train=replace(own.train, steps=max(own.train.steps, steps)),
            cold_start=replace(own.cold_start, steps=max(own.cold_start.steps, steps)),
            eval=replace(own.eval, every=0),
            run=replace(own.run, seed=seed, seeds=(), log_every=1, **nothing),
        )

    def _take_steps(self, config: Config, work: Path) -> Recorder:
        """Take the steps, and leave the trace of this process in the folder."""
        import torch
        from torch.profiler import ProfilerAction, ProfilerActivity, profile

        from perl.distributed import StopSignal
        from perl.timing import listening
        from perl.training.components import deterministic
        from perl.training.session import Session
        from perl.training.train import RUNS

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        untraced = self.warmup + self.steps
        profiler = profile(
            activities=activities,
            # No step warms the profiler up: the timed ones are to be without it, and --forwards would not hold in another.
            schedule=lambda n: ProfilerAction.NONE if n < untraced else ProfilerAction.RECORD,
            record_shapes=self.shapes,
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        recorder = Recorder(self, RunFolder(work), profiler)
        with recorder, deterministic(config.run.deterministic):
            session = Session(config, recorder.run, recorder, StopSignal())
            stage = session.stages[0]
            session.enter_stage(stage)
            with closing(session), listening(recorder), profiler, suppress(_Finished):
                RUNS[stage.kind](session, stage)
        if self.traced:
            rank = f"-{os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
            profiler.export_chrome_trace(str(work / f"trace{rank}.json.gz"))
        return recorder


class _Finished(Exception):
    """All steps are taken."""


class Recorder(Display):
    """What a run tells while it goes on: the ranges that begin and end, and the steps that are done.

    Keeps the figures of the steps, pauses the profiler in a part of a step that has been traced for long enough, and ends
    the run after the last step.
    """

    def __init__(self, command: Profile, run: RunFolder, profiler: Any) -> None:
        from perl.timing import StageClock

        super().__init__(is_main_process())
        self.command, self.run, self.profiler = command, run, profiler
        self.clock = StageClock()
        self.steps: list[dict[str, Any]] = []
        """Laps of all steps: those that warm up, the timed ones, the traced ones."""
        self.cut: set[str] = set()
        """Parts of a step that were not traced to their end."""
        self.peak: dict[str, int] = {}
        """Bytes of the process and of a GPU until the last timed step: torch.profiler takes memory of its own."""
        self._untraced = command.warmup + command.steps
        self._passes: defaultdict[str, int] = defaultdict(int)
        self._paused = False

    @property
    def _tracing(self) -> bool:
        return len(self.steps) >= self._untraced

    def stage(self, name: str, total: int, done: int = 0, unit: str = "steps") -> None:
        super().stage(f"profile {name}", self._untraced + self.command.traced)

    def advance(self, steps: int = 1, numbers: Mapping[str, float] | None = None) -> None:
        """A step is done."""
        from perl.timing import device_memory, peak_rss_bytes

        super().advance(steps, numbers)
        if not self._tracing:
            self.peak = {"peak_rss_bytes": peak_rss_bytes()}
            if device := device_memory():
                self.peak["peak_device_bytes"] = device["memory/peak_allocated_bytes"]
        self.steps.append(self.clock.lap())
        if len(self.steps) == self._total:
            raise _Finished
        self._passes.clear()
        self.profiler.step()

    def enter(self, name: str) -> None:
        """A range begins. Each part of a step is traced until there were enough forward passes."""
        if self._paused and not self.clock.open:
            self._pause(False)
        self.clock.enter(name)
        if self._tracing and name in _PASSES:
            part = self.clock.open[0]
            first = not self._passes[part]
            self._passes[part] += _PASSES[name]
            if self._passes[part] > self.command.forwards and not first and not self._paused:
                self._pause(True)
                self.cut.add(part)

    def leave(self, name: str) -> None:
        self.clock.leave(name)

    def _pause(self, pause: bool) -> None:
        self._paused = pause
        self.profiler.toggle_collection_dynamic(not pause, self.profiler.activities)

    def figures(self, config: Config) -> dict[str, Any]:
        """All that was found in this process, for profile.json."""
        import torch

        from perl.training.profile_report import add_device, figures, hints

        for step, row in zip(self.steps, read_rows(self.run.metrics), strict=True):
            step["metrics"] = row
        timed, traced = (
            self.steps[self.command.warmup : self._untraced],
            self.steps[self._untraced :],
        )
        out = figures(timed, traced, config) | self.peak
        out["traced_in_part"] = sorted(self.cut)
        if traced and torch.cuda.is_available():
            add_device(out, self.profiler.events(), self.cut)
        return out | {"hints": list(hints(out, config))}


@contextmanager
def _stopping() -> Iterator[None]:
    """What asks a process to end does as Ctrl-C, so that nothing half done stays behind; nohup still holds."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if (before := signal.getsignal(number)) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
                stack.callback(signal.signal, number, before)
        yield


@contextmanager
def _work_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder within `output`, shared by all processes, for a run and its traces; gone when the block ends.

    Raises:
        UserError: something else lies in `output`, or another profile is on its way there.
    """
    from perl.distributed import on_main_process

    # Made of resolved parents: `output` may be a link to nothing yet.
    work = output.resolve() / ".run"

    def begin() -> None:
        problem = ""
        if output.exists() and not output.is_dir():
            problem = "is a file"
        elif work.exists():
            problem = f"is being written by another profile (if none is running, remove {work})"
        elif output.exists() and any(output.iterdir()):
            if not (output / RESULT).exists():
                problem = "holds something else than a profile, so --overwrite leaves it alone"
            elif not overwrite:
                problem = "is already there: replace it with --overwrite"
        if problem:
            raise UserError(f"--output {output} {problem}; or choose another folder")
        work.mkdir(parents=True)

    on_main_process(begin)
    try:
        yield work
    finally:
        if is_main_process():
            shutil.rmtree(work)
            if not any(output.iterdir()):
                output.resolve().rmdir()
