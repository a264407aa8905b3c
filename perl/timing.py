"""Where time and memory go: named ranges that any profiler shows, clocks over them, peak memory."""

from __future__ import annotations

import ctypes
import logging
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import record_function

logger = logging.getLogger(__name__)

PREFIX = "perl::"
"""What the names of the ranges begin with in a trace."""


class Listener(Protocol):
    """Is told of every range that begins and ends; one range ends before the one around it."""

    def enter(self, name: str) -> None: ...

    def leave(self, name: str) -> None: ...


_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the ranges of this process."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


@contextmanager
def span(name: str) -> Iterator[None]:
    """The range `perl::<name>`; some microseconds where nobody looks."""
    listener = _listener
    if listener is not None:
        listener.enter(name)
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        if listener is not None:
            listener.leave(name)


def span_of_backward(name: str, start: torch.Tensor, end: torch.Tensor) -> None:
    """Make the coming backward a range from the gradient of `start` to that of `end`, which `start` was made of.

    Both ends are on the thread that autograd runs the backward on. Where nobody looks there is no range.
    """
    node = start.grad_fn
    looked_at = _listener is not None or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    if node is None or not end.requires_grad or not looked_at:
        return
    opened = ExitStack()
    node.register_prehook(lambda _: opened.enter_context(span(name)))
    end.register_hook(lambda _: opened.close())


OTHER = "other"
"""The stage of what no range covers."""


def stage_of(ranges: Sequence[str]) -> str:
    """The stage that nested ranges stand for: the outermost and the innermost of them.

    Example: `update/loss` within update, language_model.backward, loss.
    """
    if not ranges:
        return OTHER
    return ranges[0] if len(ranges) == 1 else f"{ranges[0]}/{ranges[-1]}"


class StageClock:
    """A listener that gives every moment to one stage, so that the seconds of all stages add up to the step's.

    Host and autograd's threads take turns, so that one stack of ranges serves all of them.

    Args:
        now: seconds on any clock that does not go back.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._since: float | None = None

    def enter(self, name: str) -> None:
        self._spend()
        self.open.append(name)
        self._calls[stage_of(self.open)] += 1

    def leave(self, name: str) -> None:
        """End a range, and those inside it whose own end was not told: a gradient that never came, for example."""
        self._spend()
        if name not in self.open:  # It ended with the one around it.
            return
        while (last := self.open.pop()) != name:
            logger.warning("the end of %s was not seen: its seconds are more than it took", last)

    def lap(self) -> dict[str, Any]:
        """Seconds of a step, in all and by stage, and calls of each stage. The next step begins with its first range."""
        self._spend()
        seconds, calls = dict(self._seconds), dict(self._calls)
        self._seconds.clear()
        self._calls.clear()
        self._since = None
        return {"seconds": sum(seconds.values()), "stages": seconds, "calls": calls}

    def _spend(self) -> None:
        now = self.now()
        if self._since is not None:
            self._seconds[stage_of(self.open)] += now - self._since
        self._since = now


class Stopwatch:
    """Seconds spent by name, and most memory: since the last `lap`, and in all; each a range of the profiler too.

    A stage ends when a CUDA device has done what was launched in it, so that stages that follow each other add up. Memory
    is that of the process and of the device that it uses, what was there before the stage included, but what was freed before.
    """

    def __init__(self) -> None:
        self.lap_seconds: defaultdict[str, float] = defaultdict(float)
        self.total_seconds: defaultdict[str, float] = defaultdict(float)
        self.lap_bytes: dict[str, int] = {}
        self.total_bytes: dict[str, int] = {}
        """Keys as in `update/rss_bytes`."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        _wait_for_device()
        _give_back()
        restarted = _begin_peaks()
        start = time.perf_counter()
        try:
            with span(name):
                yield
                _wait_for_device()
        finally:
            spent = time.perf_counter() - start
            self.lap_seconds[name] += spent
            self.total_seconds[name] += spent
            for kind, peak in _stage_peaks(restarted).items():
                key = f"{name}/{kind}"
                self.lap_bytes[key] = max(self.lap_bytes.get(key, 0), peak)
                self.total_bytes[key] = max(self.total_bytes.get(key, 0), peak)

    def lap(self) -> dict[str, float]:
        """Of each name since the last lap: seconds as `time/<name>`, and most bytes as `memory/<name>/rss_bytes` and
        `memory/<name>/device_bytes`, as far as they are known."""
        out = {f"time/{name}": round(seconds, 4) for name, seconds in self.lap_seconds.items()}
        out |= {f"memory/{key}": peak for key, peak in self.lap_bytes.items()}
        self.lap_seconds.clear()
        self.lap_bytes.clear()
        return out


def _wait_for_device() -> None:
    """Until the CUDA device that is in use has done all it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _give_back() -> None:
    """Let glibc return what was freed between pieces that are still there: on a CPU it would keep hundreds of megabytes."""
    if not torch.cuda.is_initialized() and (
        trim := getattr(ctypes.CDLL(None), "malloc_trim", None)
    ):
        trim(0)


_most: defaultdict[str, int] = defaultdict(int)
"""Peaks before `_begin_peaks`, which starts them anew: those of the process and of its device."""
_PROCESS = Path("/proc/self")
_PEAK_RSS = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def _begin_peaks() -> bool:
    """Count peaks from what is there now; whether that can be done with resident memory."""
    if torch.cuda.is_initialized():
        for name, peak in device_memory().items():
            _most[name] = peak
        torch.cuda.reset_peak_memory_stats()
    _most["rss"] = peak_rss_bytes()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # What it resets, by proc(5): the peak alone.
    except OSError:  # Not on Linux, or forbidden.
        return False
    return True


def _stage_peaks(resident: bool) -> dict[str, int]:
    """Since `_begin_peaks`, whose result this takes."""
    peaks = {}
    if resident and (found := _PEAK_RSS.search((_PROCESS / "status").read_text())):
        peaks["rss_bytes"] = int(found[1]) * 1024
    if torch.cuda.is_initialized():
        peaks["device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def peak_memory() -> dict[str, int]:
    """Of the process and of its device so far, as metrics have it."""
    return {"memory/peak_rss_bytes": peak_rss_bytes(), **device_memory()}


def device_memory() -> dict[str, int]:
    """Of the CUDA device that is in use, so far: most bytes in tensors, most bytes held for them, and how often the
    allocator had to give back what it held to serve a request. Nothing where none is in use."""
    if not torch.cuda.is_initialized():
        return {}
    now = {
        "memory/peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "memory/peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "memory/allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }
    return {name: max(value, _most[name]) for name, value in now.items()}


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_most["rss"], peak if sys.platform == "darwin" else peak * 1024)
