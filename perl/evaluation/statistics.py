"""How sure a measured accuracy is, and whether two models answer the same questions differently well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same items: `difference` is the second's mean score minus the first's.

    `interval` is a percentile interval of the paired bootstrap, `p` McNemar's exact two-sided probability;
    `first_only` and `second_only` count the items that one alone got right.
    """

    items: int
    first: float
    second: float
    difference: float
    interval: Interval
    p: float
    first_only: int
    second_only: int


def wilson(right: int, items: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of an accuracy of `right` out of `items` (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: not `0 <= right <= items`, or no items.
    """
    from scipy.stats import binomtest

    found = binomtest(right, items).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided probability of a split as uneven as this among the items that one model alone got right, if
    both were equally good (the exact form of Q. McNemar's test, Psychometrika 12, 1947); 1 without such items."""
    from scipy.stats import binomtest

    discordant = first_only + second_only
    return float(binomtest(first_only, discordant).pvalue) if discordant else 1.0


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of `second - first` when items are drawn anew with replacement.

    Args:
        first, second: scores of two models on the same n items.
        resamples: how often n items are drawn.

    Raises:
        ValueError: different lengths, or no items.
    """
    differences = _differences(first, second)
    # Only how often each value is drawn matters, and those counts follow a multinomial law: for scores of 0 and 1
    # that is three numbers a resample, not n.
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn @ values / n, [tail, 1 - tail])
    return float(low), float(high)


def compare_scores(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Difference, interval and probability for two models' scores on the same items, in the same sequence.

    An item counts as right from a score of 1/2 on where a test needs right and wrong.

    Raises:
        ValueError: different lengths, or no items.
    """
    differences = _differences(first, second)
    a, b = np.asarray(first) >= 0.5, np.asarray(second) >= 0.5
    first_only, second_only = int((a & ~b).sum()), int((b & ~a).sum())
    return Comparison(
        items=len(differences),
        first=float(np.mean(first)),
        second=float(np.mean(second)),
        difference=float(differences.mean()),
        interval=paired_bootstrap(first, second, seed=seed),
        p=mcnemar(first_only, second_only),
        first_only=first_only,
        second_only=second_only,
    )


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"paired scores are of the same items: got {len(first)} and {len(second)} of them"
        )
    return np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
