"""HEAD's time over BASE's with its interval, and what may be said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 6
"""Pairs that an interval needs: of fewer, not even the smallest and the largest enclose the median with 95 %."""
_EARLY = 10
"""Pairs before which nothing is decided while there is time: few may agree by chance."""


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and the interval [`low`, `high`] that holds the true median with 95 %.

    The interval is that of the sign test (Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2): two
    of the ordered ratios, chosen by the binomial distribution. It asks nothing of how times are distributed, which
    have long tails on a busy machine, only that pairs do not depend on each other.

    95 % is nominal: rounds end once the interval looks decided (optional stopping), so intervals that happen to be
    narrow are ended at more often than others, and the true coverage is lower. That is one reason why what is slower or
    faster counts only when two new processes find it again.
    """

    median: float
    low: float
    high: float
    pairs: int

    def decided(self, threshold: float) -> bool:
        """Whether more rounds would hardly change the verdict: the interval is wholly on one side of the threshold."""
        if self.pairs < _EARLY:
            return False
        same = 1 / threshold < self.low and self.high < threshold
        return same or self.low > threshold or self.high < 1 / threshold

    def verdict(self, threshold: float) -> str:
        """`slower` if the interval is wholly above 1 and the median above the threshold, `faster` the other way round;
        `unclear` where the interval has room for no difference and for one beyond the threshold."""
        if self.low > 1 and self.median > threshold:
            return "slower"
        if self.high < 1 and self.median < 1 / threshold:
            return "faster"
        if self.low <= 1 <= self.high and (self.high > threshold or self.low < 1 / threshold):
            return "unclear"
        return "same"


def ratio(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Of at least `LEAST` rounds on each side, the k-th of one being the neighbour of the k-th of the other."""
    from scipy.stats import quantile_test  # slow to import, and bad input needs none

    logs = np.log(head) - np.log(base)
    interval = quantile_test(logs, q=0, p=0.5).confidence_interval(0.95)
    low, high = math.exp(interval.low), math.exp(interval.high)
    return Ratio(math.exp(float(np.median(logs))), low, high, len(logs))
