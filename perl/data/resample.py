"""A selection of questions whose accuracies have a wanted histogram.

The level of a question is its accuracy, rounded to 0, 1/(L-1), ..., 1. Let h_l be the wanted share of
level l and a_l the number of questions there. A selection of n questions has c_l of level l, with
sum c_l = n and c_l <= a_l, and its histogram is as close as whole numbers can be when each c_l is
n h_l rounded up or down. That leaves open which ones are rounded up; taken anew for every n it can
happen that a larger selection has fewer questions of some level. The quota method (Balinski and
Young, "The Quota Method of Apportionment", American Mathematical Monthly 82, 1975) avoids that: from
n to n + 1 the next question goes to the level with the largest h_l / (c_l + 1) among those with
c_l < (n + 1) h_l. So selections are nested, and "the largest size at which no level is short" is
simply the last size before a level would have to give a question that it has not got.

Beyond that size a short level gives all it has, and the others go on in the proportions of their
shares; with repeats, the questions of a short level come again, each as often as any other of its
level or once more.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Sequence

import numpy as np

from perl.types import UserError

log = logging.getLogger(__name__)

LEVELS = 11
PAPER = (0.120, 0.108, 0.115, 0.120, 0.150, 0.173, 0.060, 0.048, 0.038, 0.028, 0.033)
"""Shares of the accuracies 0.0, 0.1, ..., 1.0 after filtering, read off Fig. 3b of the paper (arXiv 2506.14907)."""


def parse_histogram(text: str) -> tuple[float, ...]:
    """`paper`, `uniform`, or eleven numbers with commas; scaled to a sum of one.

    Raises UserError for anything else, a negative number, or only zeros.
    """
    named = {"paper": PAPER, "uniform": (1.0,) * LEVELS}
    values = named.get(text.strip())
    if values is None:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
    if (
        len(values) != LEVELS
        or not all(0 <= v < float("inf") for v in values)
        or not 0 < sum(values) < float("inf")
    ):
        raise UserError(
            f"histogram '{text}': write paper, uniform, or {LEVELS} shares with commas, for the "
            "accuracies 0.0, 0.1, ..., 1.0, at least one of them above 0"
        )
    return tuple(v / sum(values) for v in values)


def levels_of(accuracies: Sequence[float] | np.ndarray) -> np.ndarray:
    """int64 [Q]: the level of each accuracy, 0 to 10; -1 where it is NaN (not measured).

    Example: `levels_of([0.0, 0.26, 1.0, nan]) == [0, 3, 10, -1]`.
    """
    values = np.asarray(accuracies, dtype=np.float64)
    missing = np.isnan(values)
    # A hair above, so that 0.25 goes up on every machine.
    levels = np.floor(np.where(missing, 0, values) * (LEVELS - 1) + 0.5 + 1e-9).astype(np.int64)
    return np.where(missing, -1, levels)


def _per_level(levels: np.ndarray) -> np.ndarray:
    return np.bincount(levels[levels >= 0], minlength=LEVELS)


def shares_of(accuracies: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 [11]: the share of each level among the accuracies that are not NaN."""
    found = _per_level(levels_of(accuracies))
    return found / max(1, found.sum())


def resample(
    accuracies: Sequence[float],
    histogram: Sequence[float],
    size: int | None = None,
    seed: int = 0,
    repeat: bool = False,
) -> list[int]:
    """Which questions to keep so that their accuracies have a histogram; see the module's description.

    Args:
        accuracies: float [Q], 0 to 1; a question with NaN is left out.
        histogram: shares of the eleven levels, of any sum above 0.
        size: questions to keep; None: the largest size at which no level is short, or with `repeat`
            as many as have been measured.
        seed: of the choice among questions of one level.
        repeat: whether questions of short levels may come more than once.

    Returns:
        Indices into `accuracies` in rising sequence. Levels that the data lacks are left out of the
        histogram, which the log says. With the same seed, a smaller selection is part of a larger.

    Raises:
        UserError: no measured question is of a wanted level, or fewer than `size` are.
    """
    levels = levels_of(accuracies)
    have = _per_level(levels)
    wanted = np.where(have > 0, histogram, 0.0)
    if wanted.sum() == 0:
        raise UserError(
            "no question that was measured has an accuracy that the histogram asks for; "
            "choose another histogram"
        )
    if lacking := [f"{k / 10:.1f}" for k in range(LEVELS) if histogram[k] > 0 and not have[k]]:
        log.warning("no question has an accuracy of %s: left out of the target", ", ".join(lacking))
    usable = int(have[wanted > 0].sum())
    if size is not None and size > usable and not repeat:
        raise UserError(
            f"size = {size}: only {usable} questions have an accuracy that the histogram asks for; "
            "lower it, or allow repeats"
        )
    if repeat:
        counts = _apportion(wanted, int(have.sum()) if size is None else size, None)
    else:
        counts = _apportion(wanted, size, have)
    return sorted(
        index
        for level, count in enumerate(counts)
        if count
        for index in _chosen(np.flatnonzero(levels == level).tolist(), count, f"{seed}/{level}")
    )


def scarce_level(
    accuracies: Sequence[float], histogram: Sequence[float], chosen: Sequence[int]
) -> int:
    """The level that one question more than `chosen` would be of.

    If `chosen` is what `resample` gives without a size or repeats, that level has no more.
    """
    levels = levels_of(accuracies)
    wanted = np.where(_per_level(levels) > 0, histogram, 0.0)
    taken = _per_level(levels[list(chosen)]).tolist()
    going = np.flatnonzero(wanted).tolist()
    return _next(taken, len(chosen), (wanted / wanted.sum()).tolist(), going)


def _apportion(wanted: np.ndarray, size: int | None, have: np.ndarray | None) -> list[int]:
    """Questions of each level [L]; up to `have` of each if given, and with no size until one is short."""
    shares = (wanted / wanted.sum()).tolist()
    limits = [math.inf] * len(shares) if have is None else have.tolist()
    counts = [0] * len(shares)
    going = [level for level, share in enumerate(shares) if share > 0]
    total, of_going = 0, 0  # Questions taken: in all, and of the levels that go on.
    while total != size:
        level = _next(counts, of_going, shares, going)
        if counts[level] == limits[level]:
            if size is None:
                break
            going.remove(level)
            of_going -= counts[level]
            rest = sum(shares[k] for k in going)
            shares = [share / rest for share in shares]
            continue
        counts[level] += 1
        total, of_going = total + 1, of_going + 1
    return counts


def _next(counts: Sequence[int], total: int, shares: Sequence[float], going: Sequence[int]) -> int:
    """The level of the next question after `total` have been taken from the levels that go on."""
    return max(
        # The sum of what they may have is one more than they have, so one of them may have more.
        (k for k in going if counts[k] + 1e-9 < (total + 1) * shares[k]),
        key=lambda k: (shares[k] / (counts[k] + 1), -k),
    )


def _chosen(members: list[int], count: int, key: str) -> list[int]:
    """`count` of the members in a drawn sequence, which begins again at its end."""
    random.Random(key).shuffle(members)
    return list(itertools.islice(itertools.cycle(members), count))
