"""Which completions share a row, and which process computes which group: plain numbers in, plain numbers out."""

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


def plan(loads: Sequence[Load], budget: int) -> list[Row]:
    """Assign segments to rows of at most `budget` tokens by best-fit decreasing.

    What belongs together stays together as far as it fits: all segments of a group in one row, else each segment
    in one row, else its completions over several rows, each with the prompt again. A prompt whose single completion
    is over the budget gets a row of its own. The same input always gives the same plan, and rows follow the order of
    their first segment, so that the images of a group are needed by rows close to each other.

    Args:
        loads: sizes of the segments.
        budget: most tokens of a row.

    Returns:
        Rows; in each the shares are ordered by segment.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    units = [unit for members in _groups(loads) for unit in _units(loads, members, budget)]
    sizes = [sum(_tokens(loads, share) for share in unit) for unit in units]
    rows = [[share for i in bin_ for share in units[i]] for bin_ in _best_fit(sizes, budget)]
    for row in rows:
        row.sort(key=_place)
    return sorted(rows, key=lambda row: _place(row[0]))


def balance(costs: Sequence[Sequence[float]], tolerance: float = 1.05) -> list[list[int]]:
    """Assign work to processes so that the busiest one has little more than the others, and little of it moves.

    The longest work first, each to the process that has least so far (R. L. Graham, "Bounds on multiprocessing timing
    anomalies", 1969): at most 4/3 times the best possible maximum. Nothing moves where the busiest process has at
    most `tolerance` times the mean.

    Args:
        costs: `costs[p]` of the pieces of work that process p holds.
        tolerance: 1 or more.

    Returns:
        In the same form, the process that each piece goes to.
    """
    held = [sum(own) for own in costs]
    stay = [[p] * len(own) for p, own in enumerate(costs)]
    if max(held) <= tolerance * sum(held) / len(held):
        return stay
    work = sorted((-cost, p, i) for p, own in enumerate(costs) for i, cost in enumerate(own))
    loads = [(0.0, part) for part in range(len(costs))]
    parts: list[list[tuple[int, int]]] = [[] for _ in costs]
    for cost, p, i in work:
        load, part = loads.pop(0)
        parts[part].append((p, i))
        insort(loads, (load - cost, part))
    if loads[-1][0] >= max(held):
        return stay
    overlap = sorted(
        (-sum(costs[p][i] for p, i in members if p == owner), part, owner)
        for part, members in enumerate(parts)
        for owner in range(len(costs))
    )
    owners: dict[int, int] = {}
    for _, part, owner in overlap:
        if part not in owners and owner not in owners.values():
            owners[part] = owner
    for part, members in enumerate(parts):
        for p, i in members:
            stay[p][i] = owners[part]
    return stay


def _groups(loads: Sequence[Load]) -> list[list[int]]:
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, load in enumerate(loads):
        members[load.group].append(index)
    return list(members.values())


def _units(loads: Sequence[Load], members: Sequence[int], budget: int) -> list[Row]:
    """What of a group has to stay together: everything, or as little as the budget demands."""
    whole = [Share(i, tuple(range(len(loads[i].completions)))) for i in members]
    if sum(loads[i].tokens for i in members) <= budget:
        return [whole]
    return [[share] for share in whole for share in _split(loads[share.segment], share, budget)]


def _split(load: Load, share: Share, budget: int) -> list[Share]:
    """A segment as it is, or its completions over as few copies of the prompt as best fit finds."""
    if load.tokens <= budget:
        return [share]
    return [
        Share(share.segment, tuple(b)) for b in _best_fit(load.completions, budget - load.prompt)
    ]


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
