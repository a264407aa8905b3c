"""Counting and timing: a stopwatch by stage of the work, agreement across orders, memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

from perl.permutation import original_answer
from perl.profiling import span
from perl.reward_answers import extract_answer, normalise
from perl.types import Group, Rollout


class Stopwatch:
    """Seconds spent by name: since the last `lap`, and in all; each a range of the profiler too."""

    def __init__(self) -> None:
        self.lap_seconds: defaultdict[str, float] = defaultdict(float)
        self.total_seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with span(name):
                yield
        finally:
            spent = time.perf_counter() - start
            self.lap_seconds[name] += spent
            self.total_seconds[name] += spent

    def lap(self) -> dict[str, float]:
        """Seconds by name since the last lap, as `time/<name>`."""
        out = {f"time/{name}": round(seconds, 4) for name, seconds in self.lap_seconds.items()}
        self.lap_seconds.clear()
        return out


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def chosen_picture(rollout: Rollout) -> str | None:
    """The answer of a rollout in the example's original order: two that are equal chose the same picture."""
    answer = original_answer(rollout.variant, extract_answer(rollout.text))
    return None if answer is None else normalise(answer)


def agreement(by_order: Sequence[Sequence[str | None]]) -> float:
    """How often two completions from different orders choose the same picture.

    The share of equal pairs among all pairs from two different orders; an answer that names nothing agrees with none.

    Args:
        by_order: for each order the choices of its completions.

    Returns:
        0 to 1; NaN with fewer than two orders.
    """
    equal = total = 0
    for one, other in combinations(by_order, 2):
        for a in one:
            for b in other:
                equal += a is not None and a == b
                total += 1
    return equal / total if total else math.nan


def group_agreement(group: Group) -> float:
    """`agreement` of a group's rollouts across its orders."""
    by_order: defaultdict[tuple[int, ...], list[str | None]] = defaultdict(list)
    for rollout in group.rollouts:
        by_order[rollout.variant.order].append(chosen_picture(rollout))
    return agreement(list(by_order.values()))


def mean(values: Iterable[float | None]) -> float:
    """Mean of what is neither None nor NaN; NaN if nothing is left."""
    kept = [float(v) for v in values if v is not None and not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan
