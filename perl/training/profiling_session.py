"""The steps of a stage as training takes them, timed and traced, and nothing of them kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from perl.config import Config, FilterConfig, StageConfig
from perl.data.streams import Stream
from perl.distributed import Processes, StopSignal
from perl.files import RunFolder
from perl.model.padded import PaddedPolicy
from perl.model.padded_loading import tower_of
from perl.recipe import Stage, plan
from perl.report.progress import Display
from perl.rollout.filtering import GroupFilter
from perl.timing import listening, peak_rss_bytes, span
from perl.training.cold_start import cold_start
from perl.training.profiling_clock import StageClock, StepTimes
from perl.training.profiling_trace import Traced, Tracer
from perl.training.reinforce import reinforce
from perl.training.session import Session
from perl.types import Group, UserError

_RUNS = {"cold_start": cold_start, "rl": reinforce}
_FORWARDS = {"prompts": 1, "tokens": 1, "language_model": 16}
"""Ranges of one forward pass of the language model, and how much of a trace each takes: a row in which training reads and
goes back takes a dozen times as many operators and more."""
_PROFILER = "profiler"
_INPUTS = ("inputs_embeds", "input_ids")
"""What a language model reads, [B, T, ...]."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many steps of which kind.

    `warmup` are not looked at, `timed` are timed without torch.profiler, `traced` run under it. Of a traced step's
    rollout the first `forwards` passes of the language model are traced, of its other parts a sixteenth as many rows.
    """

    warmup: int
    timed: int
    traced: int
    forwards: int

    @property
    def steps(self) -> int:
        return self.warmup + self.timed + self.traced


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its time by stage, and its line of metrics as training would write it."""

    times: StepTimes
    row: dict[str, Any]
    dropped: dict[str, int] = field(default_factory=dict)
    """Groups that were kept and that the recipe's filter drops, by its reason."""


@dataclass(slots=True)
class Profile:
    """What was found."""

    timed: list[Step] = field(default_factory=list)
    traced: list[Step] = field(default_factory=list)
    trace: Traced = field(default_factory=Traced)
    peak_device_bytes: int = 0
    """Of PyTorch's allocator in the timed steps; 0 without a GPU."""
    peak_rss_bytes: int = 0
    """Of the process until the last timed step, before torch.profiler takes memory of its own."""
    processes: int = 1
    unended: set[str] = field(default_factory=set)
    """Ranges whose end nobody told."""
    shares_images: bool = True
    """Whether the features of an image are handed on, as packed rows do and padded batches do not."""


class StepDisplay(Display):
    """Shows the steps that are taken, not those of the recipe."""

    def __init__(self, steps: int, enabled: bool) -> None:
        super().__init__(enabled)
        self.steps = steps

    def stage(self, name: str, total: int, done: int = 0, unit: str = "steps") -> None:
        super().stage(f"profile {name}", self.steps)


def stage_to_profile(config: Config, name: str) -> tuple[Stage, FilterConfig]:
    """The recipe's stage of that name, or its first RL stage, as the only one of a run that trains at every step.

    Groups without signal are kept, so that each step trains on all that it rolls out: a model that is never right, or
    always, would else leave nothing to train on.

    Returns:
        The stage, and the filter that the recipe asks for in it.

    Raises:
        UserError: there is no such stage, or it takes no steps.
    """
    stages = plan(config)
    names = ", ".join(s.name for s in stages if s.kind in _RUNS)
    wanted = [s for s in stages if (s.name == name if name else s.kind == "rl")]
    if not names:
        raise UserError("the recipe has no stage that takes steps; add one of kind rl")
    if not wanted and name:
        raise UserError(f"--stage {name}: the recipe has no such stage; choose {names}")
    if not wanted:
        raise UserError(f"the recipe has no stage of kind rl; choose one with --stage: {names}")
    stage = wanted[0]
    if stage.kind not in _RUNS:
        raise UserError(f"--stage {name}: a {stage.kind} stage takes no steps; choose {names}")
    own = replace(
        stage.config,
        stages=(StageConfig(name=stage.name, kind=stage.kind),),  # pyright: ignore[reportArgumentType]
        filter=replace(
            stage.config.filter, zero_variance=False, min_accuracy=0.0, max_accuracy=1.0
        ),
        run=replace(
            stage.config.run,
            seed=(stage.config.run.seeds or (stage.config.run.seed,))[0],
            seeds=(),
            trackers=(),
            save_rollouts_every=0,
        ),
    )
    return plan(own)[0], stage.config.filter


def run_profile(
    stage: Stage,
    dropping: FilterConfig,
    steps: Plan,
    folder: Path,
    suffix: str,
    display: Display,
    **options: bool,
) -> Profile:
    """Take the steps.

    Args:
        stage: from `stage_to_profile`.
        dropping: from there as well.
        steps: how many.
        folder: where trace files go, and a tiny model that is made first.
        suffix: of this process, in the names of its files.
        display: what it shows meanwhile.
        options: of torch.profiler.profile.

    Raises:
        UserError: a mistake in config, data, model or reward.
    """
    config = stage.config
    config = replace(
        config,
        train=replace(config.train, steps=max(config.train.steps, steps.steps)),
        cold_start=replace(config.cold_start, steps=max(config.cold_start.steps, steps.steps)),
    )
    session = _Session(config, RunFolder(folder), display, steps)
    session.tracer = Tracer(
        folder, suffix, session.components.accelerator.device.type == "cuda", **options
    )
    session.look_at(session.stages[0])
    collector = session.components.collector
    session.groups = collector.filter = _KeepingFilter(dropping, collector.filter.measure)
    with listening(session), _watching(session):
        try:
            _RUNS[stage.kind](session, session.stages[0])
        except _Finished:
            display.close()
    return session.found


class _Finished(Exception):
    """All steps are taken."""


class _Session(Session):
    """A run that keeps nothing and stops after the wanted steps; it hears of every range."""

    tracer: Tracer
    groups: _KeepingFilter

    def __init__(self, config: Config, folder: RunFolder, display: Display, steps: Plan) -> None:
        super().__init__(config, folder, display, StopSignal())
        self.processes = _Processes(self.components.accelerator)
        self.wanted = steps
        self.clock = StageClock()
        self.found = Profile(
            shares_images=not isinstance(self.components.policy, PaddedPolicy),
            processes=self.processes.count,
        )
        self._done = 0
        self._forwards: defaultdict[str, int] = defaultdict(int)

    def stream(self) -> Stream:
        """The last thing that a stage asks for before its first step."""
        stream = super().stream()
        self._begin_step()
        return stream

    def after_step(
        self, step: int, row: dict[str, Any], stream: Stream, shown: dict[str, float], *_: Any
    ) -> None:
        """Keep the figures of a step; the last one ends the run."""
        taken = Step(self.clock.finish(), row, self.groups.dropped)
        self.found.unended = self.clock.unended
        self.display.advance(numbers=shown)
        if self._tracing:
            self.found.traced.append(taken)
        elif self._done >= self.wanted.warmup:
            self.found.timed.append(taken)
            self.found.peak_rss_bytes = peak_rss_bytes()
            if self.tracer.cuda:
                self.found.peak_device_bytes = torch.cuda.max_memory_allocated()
        self._done += 1
        if self._done == self.wanted.steps:
            if self.tracer.running:
                self.tracer.stop()
            self.found.trace = self.tracer.traced
            raise _Finished
        self._begin_step()

    def _begin_step(self) -> None:
        if self.tracer.cuda and self._done == self.wanted.warmup:
            torch.cuda.reset_peak_memory_stats()
        if self._done == self.wanted.warmup + self.wanted.timed:
            self.tracer.warm_up()
            self.tracer.start()
        self._forwards.clear()
        self.clock.begin()

    @property
    def _tracing(self) -> bool:
        return self._done >= self.wanted.warmup + self.wanted.timed

    def enter(self, name: str) -> None:
        """A range begins. A part of a step is traced until it has read enough, and the next one again."""
        if self._tracing and not self.clock.open and not self.tracer.running:
            with self._own_time():
                self.tracer.start()
        self.clock.enter(name)
        if name in _FORWARDS and self.tracer.running:
            part = self.clock.open[0]
            first = not self._forwards[part]
            self._forwards[part] += _FORWARDS[name]
            if self._forwards[part] > self.wanted.forwards and not first:
                with self._own_time():
                    self.tracer.stop()
                self.tracer.traced.cut.add(part)

    def leave(self, name: str) -> None:
        self.clock.leave(name)

    @contextmanager
    def _own_time(self) -> Iterator[None]:
        """A stage for what training does not do: starting the profiler, and writing what it has collected."""
        self.clock.enter(_PROFILER)
        try:
            yield
        finally:
            self.clock.leave(_PROFILER)


class _KeepingFilter(GroupFilter):
    """Keeps every group that can be scored, and counts those that the recipe's filter drops."""

    def __init__(self, recipe: FilterConfig, measure: str) -> None:
        super().__init__(zero_variance=False)
        self.recipe = GroupFilter(
            recipe.zero_variance, recipe.min_accuracy, recipe.max_accuracy, measure
        )

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        self.recipe(groups)
        return super().__call__(groups)

    def reset(self) -> None:
        super().reset()
        self.recipe.reset()

    @property
    def dropped(self) -> dict[str, int]:
        """Groups since the last `reset` that the recipe drops for equal rewards, and for a mean outside of its band."""
        counts = self.recipe.counts
        return {
            "equal_rewards": counts["zero_variance"] * self.recipe.zero_variance,
            "outside_band": counts["too_hard"] + counts["too_easy"],
        }


class _Processes(Processes):
    """Waiting for the others is a range of its own."""

    def total(self, *counts: float) -> list[float]:
        if self.count == 1:
            return super().total(*counts)
        with span("sync"):
            return super().total(*counts)


@contextmanager
def _watching(session: _Session) -> Iterator[None]:
    """Tell prompts from tokens in rollouts, and the tower of a model on padded batches from its language model."""
    policy = session.components.policy
    padded = isinstance(policy, PaddedPolicy)
    reader = policy.base.get_decoder() if padded else policy.core.language_model
    opened = ExitStack()

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read = next((x for k in _INPUTS if (x := kwargs.get(k)) is not None), None)
        if read is not None and session.clock.open == ["rollout"]:
            opened.enter_context(span("prompts" if read.shape[1] > 1 else "tokens"))

    handles = [
        reader.register_forward_pre_hook(before, with_kwargs=True),
        reader.register_forward_hook(lambda *_: opened.close()),
        *(_watch_tower(_tower(session), policy.base.get_input_embeddings()) if padded else ()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tower(session: _Session) -> list[nn.Module]:
    try:
        return tower_of(session.components.policy.base, session.components.model_path)
    except UserError:
        session.display.say("vision tower and language model cannot be told apart in this model")
        return []


def _watch_tower(modules: Sequence[nn.Module], embedding: nn.Module) -> list[Any]:
    """Ranges of a tower whose backward follows that of the language model's layers.

    Args:
        modules: the tower's.
        embedding: the language model's of its text. Where it ran before the tower its backward comes after the
            tower's, and ends that.
    """
    forward, backward = ExitStack(), ExitStack()
    under_way = False

    def begin_backward(_: torch.Tensor) -> None:
        nonlocal under_way
        if not under_way:
            under_way = True
            backward.enter_context(span("vision.backward"))
            torch.autograd.Variable._execution_engine.queue_callback(end_backward)

    def end_backward() -> None:
        nonlocal under_way
        under_way = False
        backward.close()

    def before(_: nn.Module, args: Any) -> None:
        forward.enter_context(span("vision"))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        forward.close()
        for x in tree_leaves(dict(output) if isinstance(output, dict) else output):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(begin_backward)

    def end_at(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: end_backward())

    if not modules:
        return []
    return [embedding.register_forward_hook(end_at)] + [
        handle
        for module in modules
        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        )
    ]
