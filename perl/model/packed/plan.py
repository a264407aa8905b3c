"""Which completions share a row: plain numbers in, plain numbers out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """The size of a segment: tokens of its prompt, and of each completion that continues it."""

    prompt: int
    completions: tuple[int, ...]
    group: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True)
class Share:
    """Completions of one segment that stand in one row behind their prompt: numbers into the lists given."""

    segment: int
    completions: tuple[int, ...]


Row = list[Share]


def plan(loads: Sequence[Load], budget: int, share: bool = True) -> list[Row]:
    """Assign segments to rows of at most `budget` tokens by best-fit decreasing.

    What belongs together stays together as far as it fits: all segments of a group in one row, else each segment
    in one row, else its completions over several rows, each with the prompt again. A prompt whose single completion
    is over the budget gets a row of its own. The same input always gives the same plan, and rows follow the order of
    their first segment, so that the images of a group are needed by rows close to each other.

    Args:
        loads: sizes of the segments.
        budget: most tokens of a row.
        share: whether the completions of a segment share its prompt; if not, each has a copy of it.

    Returns:
        Rows; in each the shares are ordered by segment.
    """
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, load in enumerate(loads):
        groups[load.group].append(index)
    units = [
        unit for members in groups.values() for unit in units_of(loads, members, budget, share)
    ]
    sizes = [sum(_tokens(loads, share) for share in unit) for unit in units]
    rows = [[share for i in bin_ for share in units[i]] for bin_ in _best_fit(sizes, budget)]
    for row in rows:
        row.sort(key=_place)
    return sorted(rows, key=lambda row: _place(row[0]))


def units_of(loads: Sequence[Load], members: Sequence[int], budget: int, share: bool) -> list[Row]:
    """What of a group has to stay together: everything, or as little as the budget demands."""
    shares: list[Share] = []
    for i in members:
        every = tuple(range(len(loads[i].completions)))
        shares += [Share(i, every)] if share else [Share(i, (r,)) for r in every]
    if shares and sum(_tokens(loads, s) for s in shares) <= budget:
        return [shares]
    return [[part] for s in shares for part in _split(loads, s, budget)]


def _split(loads: Sequence[Load], share: Share, budget: int) -> list[Share]:
    """A share as it is, or its completions over as few copies of the prompt as best fit finds."""
    if len(share.completions) == 1 or _tokens(loads, share) <= budget:
        return [share]
    load = loads[share.segment]
    bins = _best_fit(load.completions, budget - load.prompt)
    return [Share(share.segment, tuple(b)) for b in bins]


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: numbers of the items in each bin, ascending; an item over the capacity stands alone."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), ascending: the first that fits leaves least.
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(free, (sizes[item], -1))
        if at < len(free):
            room, chosen = free.pop(at)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        insort(free, (room - sizes[item], chosen))
    return sorted(sorted(b) for b in bins)


def _place(share: Share) -> tuple[int, tuple[int, ...]]:
    return share.segment, share.completions


def _tokens(loads: Sequence[Load], share: Share) -> int:
    load = loads[share.segment]
    return load.prompt + sum(load.completions[i] for i in share.completions)
