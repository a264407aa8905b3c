"""Where the time of a step goes: ranges that lie in each other, as exclusive seconds of stages."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

OTHER = "other"
"""What no range covers."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Seconds `start` to `end` in which one stage ran and no range inside it."""

    start: float
    end: float
    stage: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step. `calls` counts the ranges of each stage; the seconds of all stages add up to the step's."""

    intervals: tuple[Interval, ...]
    calls: dict[str, int]

    @property
    def seconds(self) -> float:
        return self.intervals[-1].end - self.intervals[0].start if self.intervals else 0.0

    def by_stage(self) -> dict[str, float]:
        """Seconds of each stage."""
        out: defaultdict[str, float] = defaultdict(float)
        for each in self.intervals:
            out[each.stage] += each.end - each.start
        return dict(out)


class StageClock:
    """Cuts time into stages by the ranges that are open.

    A stage is the outermost range and the innermost one: `update/loss` within update, language_model.backward, loss.
    Host and autograd's threads take turns, so that one pile of ranges serves all of them.

    Args:
        now: seconds on any clock that does not go back.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.open: list[str] = []
        self.unended: set[str] = set()
        self._intervals: list[Interval] = []
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._since = now()

    @property
    def stage(self) -> str:
        """The present one."""
        if not self.open:
            return OTHER
        return self.open[0] if len(self.open) == 1 else f"{self.open[0]}/{self.open[-1]}"

    def enter(self, name: str) -> None:
        self._cut()
        self.open.append(name)
        self._calls[self.stage] += 1

    def leave(self, name: str) -> None:
        """End a range. Those inside it that are open still have not been told of their end: `unended` has them."""
        self._cut()
        if name not in self.open:  # Ended with the one around it.
            return
        while (last := self.open.pop()) != name:
            self.unended.add(last)

    def begin(self) -> None:
        """A step begins here; what was since the last one is forgotten."""
        self._intervals, self._calls = [], defaultdict(int)
        self._since = self.now()

    def finish(self) -> StepTimes:
        """The step since `begin`."""
        self._cut()
        return StepTimes(tuple(self._intervals), dict(self._calls))

    def _cut(self) -> None:
        now = self.now()
        self._intervals.append(Interval(self._since, now, self.stage))
        self._since = now


class Timeline:
    """Finds the stage of a moment.

    Args:
        intervals: without overlap, in the sequence of time.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self.intervals = intervals
        self._starts = [each.start for each in intervals]

    def stage_at(self, moment: float) -> str:
        """`other` before, between and after the intervals."""
        found = bisect_right(self._starts, moment) - 1
        if found < 0 or moment >= self.intervals[found].end:
            return OTHER
        return self.intervals[found].stage


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds that at least one of the (start, end) covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals, key=itemgetter(0)):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
