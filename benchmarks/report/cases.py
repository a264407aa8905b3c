"""Rows side by side: who took how much longer than this repository at the same work, and how time grows with a size."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from statistics import geometric_mean, median

import numpy as np

from benchmarks.report.results_file import Row

FEWEST_POINTS, NARROWEST = 3, 4.0
"""A power law is fitted to no fewer sizes, and to none that are less than this factor apart."""
CERTAIN_POINTS, CERTAIN_ERROR = 4, 0.15
"""With fewer sizes, or a larger standard error, an exponent is called uncertain."""
_PREFERRED = ("Triton", "native", "PyTorch")
"""Backends that ratios refer to, the first that was timed: a GPU's, a CPU's."""


@dataclass(frozen=True)
class Case:
    """An operation at one size, by all its providers."""

    op: str
    name: str
    rows: Sequence[Row]

    @cached_property
    def reference(self) -> Row | None:
        """The row of ours that the others are compared with; None where none of ours was timed."""
        return min((r for r in self.rows if r.ours and r.timed), key=_preference, default=None)

    def ratio(self, row: Row) -> float | None:
        """Its time over ours: more than 1 is slower than ours."""
        if not (row.median and row.timed and self.reference and self.reference.median):
            return None
        return row.median / self.reference.median

    def ratios(self, row: Row) -> list[float]:
        """The same of each turn, in which one ran soon after the other."""
        if self.ratio(row) is None or self.reference is None or row is self.reference:
            return []
        pairs = zip(row.turns, self.reference.turns, strict=False)
        return [median(theirs) / median(ours) for theirs, ours in pairs if theirs and ours]

    def difference(self, row: Row) -> int:
        """1: slower than ours; -1: faster; 0: no ratio, or turns on both sides of 1, which are no difference."""
        ratio, around = self.ratio(row), self.ratios(row)
        if ratio is None or (len(around) > 1 and min(around) <= 1 <= max(around)):
            return 0
        return (ratio > 1) - (ratio < 1)

    def memory_ratio(self, row: Row) -> float | None:
        """The most memory it held over ours: more than 1 is more than ours."""
        ours = self.reference.peak_extra_bytes if self.reference else None
        if self.ratio(row) is None or row.peak_extra_bytes is None or not ours:
            return None
        return row.peak_extra_bytes / ours

    @property
    def axis(self) -> str:
        """Of the series that it is a part of; empty for none."""
        return self.rows[0].axis

    @property
    def ordered(self) -> list[Row]:
        """The fastest first; those without a time last, as they came."""
        return sorted(self.rows, key=lambda r: (not r.timed, r.median if r.timed else 0.0))


def _preference(row: Row) -> int:
    places = [i for i, name in enumerate(_PREFERRED) if name in row.provider]
    return places[0] if places else len(_PREFERRED)


def by_op(rows: Iterable[Row]) -> dict[str, list[Case]]:
    """Cases of every operation, in the order of the rows.

    A size that was measured by itself and as a part of a series is two cases: their rows took turns apart.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.axis), []).append(row)
    sizes = Counter((op, name) for op, name, _ in found)
    ops: dict[str, list[Case]] = {}
    for (op, name, axis), members in found.items():
        again = f" (series over {axis})" if axis and sizes[op, name] > 1 else ""
        ops.setdefault(op, []).append(Case(op, name + again, members))
    return ops


def peers(cases: Iterable[Case]) -> dict[str, list[tuple[Case, Row]]]:
    """Of each of somebody else's implementations the cases in which it was to take part."""
    found: dict[str, list[tuple[Case, Row]]] = {}
    for case in cases:
        for row in case.rows:
            if not row.ours:
                found.setdefault(row.provider, []).append((case, row))
    return found


@dataclass(frozen=True)
class Growth:
    """y ~ x^exponent for x from `low` to `high`."""

    low: float
    high: float
    exponent: float
    standard_error: float
    last: float
    """The exponent between the two largest sizes alone, where what is constant weighs least."""
    sizes: int

    @property
    def certain(self) -> bool:
        return self.sizes >= CERTAIN_POINTS and self.standard_error <= CERTAIN_ERROR


def fit(points: Iterable[tuple[float, float]]) -> Growth | None:
    """Least squares on the logarithms of (size, cost), both positive; None for too few or too close sizes."""
    points = sorted(points)
    at = {
        x: geometric_mean(y for _, y in same)
        for x, same in itertools.groupby(points, itemgetter(0))
    }
    if len(at) < FEWEST_POINTS or max(at) < NARROWEST * min(at):
        return None
    x, y = np.log(points).T
    (exponent, _), covariance = np.polyfit(x, y, 1, cov=True)
    (x0, y0), (x1, y1) = list(at.items())[-2:]
    return Growth(
        min(at),
        max(at),
        float(exponent),
        float(math.sqrt(max(0.0, covariance[0, 0]))),
        math.log(y1 / y0) / math.log(x1 / x0),
        len(at),
    )


@dataclass(frozen=True)
class Series:
    """Timed rows of a provider at sizes that differ along one axis, smallest first."""

    op: str
    provider: str
    axis: str
    rows: Sequence[Row]

    @property
    def sizes(self) -> list[float]:
        return [row.shape[self.axis] for row in self.rows]

    @property
    def growth(self) -> Growth | None:
        """Of the median time."""
        pairs = zip(self.sizes, self.rows, strict=True)
        return fit((x, row.median) for x, row in pairs if row.median)

    @property
    def line(self) -> str:
        """`N from 128 to 2048: time grows as N^0.98 ± 0.02, N^1.00 at the end`; empty where nothing is fitted."""
        found = self.growth
        if not found:
            return ""
        base = self.axis if " " not in self.axis else f"({self.axis})"
        return (
            f"{self.axis} from {found.low:g} to {found.high:g}: time grows as "
            f"{base}^{found.exponent:.2f} ± {found.standard_error:.2f}, "
            f"{base}^{found.last:.2f} at the end{'' if found.certain else '; uncertain'}"
        )


def series(rows: Iterable[Row]) -> list[Series]:
    """One for each operation, axis and provider, in the order of the rows."""
    found: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.axis and row.timed:
            found[row.op, row.axis, row.provider].append(row)
    return [
        Series(op, provider, axis, sorted(members, key=lambda row: row.shape[axis]))
        for (op, axis, provider), members in found.items()
    ]
