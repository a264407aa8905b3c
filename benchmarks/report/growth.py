"""How time grows with a size: exponents of power laws through the series that benchmarks measure."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import numpy as np

from benchmarks.report.results_file import Row

FEWEST_POINTS, NARROWEST = 3, 4.0
"""A power law is fitted to no fewer sizes, and to none that are less than this factor apart."""
CERTAIN_POINTS, CERTAIN_ERROR = 4, 0.15
"""With fewer sizes, or a larger standard error, an exponent is called uncertain."""


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
    at = {x: geometric_mean(y for _, y in same) for x, same in itertools.groupby(points, _size)}
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


def _size(point: tuple[float, float]) -> float:
    return point[0]


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
