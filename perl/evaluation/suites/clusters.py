"""An interval for items that come in several versions of one problem, and so are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from perl.evaluation.statistics import Interval


def cluster_bootstrap(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean difference when whole clusters are drawn anew with replacement.

    A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.

    Args:
        differences: float [n], of two models' scores on the same items.
        clusters: [n], what each item belongs to.
        resamples: how often as many clusters as there are are drawn.

    Raises:
        ValueError: different lengths, or no items.
    """
    if len(differences) != len(clusters) or not len(clusters):
        raise ValueError(f"{len(differences)} items have {len(clusters)} clusters; give one each")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    member = [numbers[name] for name in clusters]
    sums, sizes = np.bincount(member, differences), np.bincount(member)
    # Only how often each kind of cluster is drawn matters, and those counts follow a multinomial law.
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    shares = counts / len(sums)
    drawn = np.random.default_rng(seed).multinomial(len(sums), shares, size=resamples)
    totals = drawn @ kinds
    tail = (1 - confidence) / 2
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
    return float(low), float(high)
