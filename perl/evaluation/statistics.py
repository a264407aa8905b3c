"""How sure a measured accuracy is, and whether two models answer the same questions differently well."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]

_DRAWN_AT_ONCE = 10_000_000
"""Counts held in memory: rewards have as many kinds of differences as there are items."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same items: `difference` is the second's mean score minus the first's.

    `interval` is a percentile interval of the paired bootstrap, `p` McNemar's exact two-sided probability;
    `first_only` and `second_only` count the items that one alone got right, or got the higher score on.
    """

    items: int
    first: float
    second: float
    difference: float
    interval: Interval
    p: float
    first_only: int
    second_only: int


def wilson(right: int, items: int) -> Interval:
    """Wilson's 95 % score interval of an accuracy of `right` out of `items` (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: not `0 <= right <= items`, or no items.
    """
    from scipy.stats import binomtest

    found = binomtest(right, items).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided probability of a split as uneven as this among the items that one model alone got right, if
    both were equally good (the exact form of Q. McNemar's test, Psychometrika 12, 1947); 1 without such items."""
    from scipy.stats import binomtest

    discordant = first_only + second_only
    return float(binomtest(first_only, discordant).pvalue) if discordant else 1.0


def bootstrap_interval(
    differences: Sequence[float], clusters: Sequence[Hashable], resamples: int = 10_000
) -> Interval:
    """95 % percentile interval of the mean difference when whole clusters are drawn anew with replacement.

    A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.

    Args:
        differences: float [n], of two models' scores on the same items.
        clusters: [n], what each item belongs to; with one item in each this is the paired bootstrap.
        resamples: how often as many clusters as there are are drawn.

    Raises:
        ValueError: different lengths, or no items.
    """
    numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    member = [numbers[name] for name in clusters]
    if len(differences) != len(member) or not member:
        raise ValueError(f"{len(differences)} items have {len(member)} clusters; give one each")
    sums, sizes = np.bincount(member, differences), np.bincount(member)
    # Only how often each kind of cluster is drawn matters, and those counts follow a multinomial law. So the 26,405
    # items of all benchmarks take 16 ms, where scipy.stats.bootstrap draws every one of them and takes 2.6 s.
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    shares = counts / len(sums)
    generator, block = np.random.default_rng(0), max(1, _DRAWN_AT_ONCE // len(kinds))
    totals = np.concatenate(
        [
            generator.multinomial(len(sums), shares, size=min(block, resamples - start)) @ kinds
            for start in range(0, resamples, block)
        ]
    )
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def compare_scores(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> Comparison:
    """Difference, interval and probability for two models' scores on the same items, in the same sequence.

    `clusters` says which items are versions of one problem, and so no independent evidence. The probability is that of the
    sign test over the items whose scores differ: McNemar's where scores are 0 and 1.

    Raises:
        ValueError: different lengths, or no items.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"paired scores are of the same items: got {len(first)} and {len(second)} of them"
        )
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    # Means of the same scores in another sequence are equal.
    differences = np.round(other - one, 12)
    first_only, second_only = int((differences < 0).sum()), int((differences > 0).sum())
    return Comparison(
        items=len(one),
        first=float(one.mean()),
        second=float(other.mean()),
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences.tolist(), clusters),
        p=mcnemar(first_only, second_only),
        first_only=first_only,
        second_only=second_only,
    )
