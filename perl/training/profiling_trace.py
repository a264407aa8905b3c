"""One step under torch.profiler: trace files, operators, and what the device did for which stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from perl.timing import PREFIX
from perl.training.profiling_clock import Interval, Timeline, covered

_MARK = "clock"
"""A range that stands in the trace and was timed by the host's clock too."""


@dataclass
class Operator:
    """One operator's own time, without the operators that it calls."""

    calls: int = 0
    cpu_seconds: float = 0.0
    device_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Launch:
    """An operator that started work on the device at `moment` (seconds, host's clock), and how much it came to."""

    moment: float
    seconds: float
    count: int


@dataclass
class DeviceWork:
    """What the device did in one stage."""

    seconds: float = 0.0
    launches: int = 0


@dataclass
class Traced:
    """All that was collected between the starts and stops of the profiler."""

    windows: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) in seconds, host's clock."""
    launches: list[Launch] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)
    """When the device computed or copied; host's clock."""
    operators: defaultdict[str, Operator] = field(default_factory=lambda: defaultdict(Operator))
    files: list[Path] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    """Outermost ranges that were not traced to their end."""

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self.windows)

    @property
    def idle(self) -> float:
        """Share of the traced time in which the device did nothing."""
        return 1 - min(1.0, covered(self.busy) / self.seconds) if self.seconds else 0.0

    def by_stage(self, intervals: Sequence[Interval]) -> dict[str, DeviceWork]:
        """Device time of each stage of a step: of the work that was launched in it, whenever it ran."""
        timeline = Timeline(intervals)
        out: defaultdict[str, DeviceWork] = defaultdict(DeviceWork)
        for launch in self.launches:
            work = out[timeline.stage_at(launch.moment)]
            work.seconds += launch.seconds
            work.launches += launch.count
        return dict(out)


class Tracer:
    """torch.profiler, which may be stopped and started again within a step; each time it leaves a file.

    Args:
        folder: where the files go.
        suffix: of this process, in the names of its files.
        cuda: whether to record the GPU too.
        options: of torch.profiler.profile.
    """

    def __init__(self, folder: Path, suffix: str, cuda: bool, **options: Any) -> None:
        self.folder, self.suffix, self.cuda, self.options = folder, suffix, cuda, options
        self.traced = Traced()
        self._profiler: Any = None
        self._marked = self._start = 0.0

    @property
    def running(self) -> bool:
        return self._profiler is not None

    def warm_up(self) -> None:
        """What the first profiler of a process sets up, which on a GPU takes seconds."""
        with profile(activities=self._activities()):
            torch.ones(1, device="cuda" if self.cuda else "cpu")

    def start(self) -> None:
        self._profiler = profile(activities=self._activities(), **self.options)
        self._profiler.start()
        self._marked = time.perf_counter()
        with torch.profiler.record_function(PREFIX + _MARK):
            pass
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Stop, and keep what was collected."""
        profiler, self._profiler = self._profiler, None
        if self.cuda:
            torch.cuda.synchronize()
        self.traced.windows.append((self._start, time.perf_counter()))
        profiler.stop()
        number = len(self.traced.windows)
        path = self.folder / f"trace{self.suffix}{f'-part{number}' if number > 1 else ''}.json.gz"
        profiler.export_chrome_trace(str(path))
        self.traced.files.append(path)
        read_device(profiler.events(), self._marked, self.traced)
        shapes = bool(self.options.get("record_shapes"))
        read_operators(profiler.key_averages(group_by_input_shape=shapes), self.traced)

    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]


def read_device(events: Iterable[Any], marked: float, into: Traced) -> None:
    """Launches and busy times of torch's `FunctionEvent`s, which count microseconds from a zero of their own.

    Args:
        events: of one start and stop.
        marked: seconds on the host's clock at which the range `perl::clock` began.
        into: what they are added to.
    """
    events = list(events)
    marks = [e.time_range.start for e in events if e.name == PREFIX + _MARK and _on_cpu(e)]
    zero = marked - marks[0] / 1e6

    for event in events:
        start = zero + event.time_range.start / 1e6
        if not _on_cpu(event):
            if not _is_range(event):
                into.busy.append((start, zero + event.time_range.end / 1e6))
        elif kernels := [k for k in event.kernels if not k.name.startswith(PREFIX)]:
            seconds = sum(k.duration for k in kernels) / 1e6
            into.launches.append(Launch(start, seconds, len(kernels)))


def read_operators(averages: Iterable[Any], into: Traced) -> None:
    """Self times of torch's `FunctionEventAvg`s."""
    for each in averages:
        if not _is_range(each) and _on_cpu(each):
            shapes = f" {each.input_shapes}" if each.input_shapes else ""
            operator = into.operators[f"{each.key}{shapes}"]
            operator.calls += each.count
            operator.cpu_seconds += each.self_cpu_time_total / 1e6
            operator.device_seconds += each.self_device_time_total / 1e6


def _on_cpu(event: Any) -> bool:
    return event.device_type.name == "CPU"


def _is_range(event: Any) -> bool:
    """Whether it is a name that somebody gave to a time, and no operator, kernel or copy."""
    return event.key.startswith(PREFIX) or bool(event.is_user_annotation)
