"""The rows of an optimizer step, planned for all processes together: with sharded weights each row is a barrier.

At every layer of a row a process waits for the others. So it is not enough that all have as many FLOPs in a step: all have
equally many rows, and row i of each has about as many FLOPs as row i of any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perl.distributed import Processes
from perl.model.packed.pack import empty_row, pack_row
from perl.model.packed.plan import Load, Row, Share, units_of
from perl.training.parallel.balancing import ModelFlops, Piece, Work, deal, visual_tokens
from perl.types import PackedBatch, Segment

_ROW_TOKENS = 1024
"""What a row costs beside its FLOPs, as tokens of the language model: the layers' weights are gathered for it twice, and
their gradients summed. Estimated for 7B over NVLink, where a part of it hides behind the computing; not measured."""

_SENT_TOKENS = 0.4
"""What it costs to send and to receive the pixels of a visual token, in the same unit: twice 19 kB at 1 GB/s, for 7B on a
GPU of 400 TFLOP/s. Estimated too."""

_TOLERANCE = 1.05
"""How much longer than the mean a row may be before work moves to another process, or a group is cut."""

_LONGER = (2.0, 1.6, 1.3, _TOLERANCE)
"""How much longer than the mean row a group may be where groups are cut: a finer cut repeats more prompts."""

_WORTH = 0.99
"""Of the time of a plan another must take less to be preferred, if it has more rows or cuts groups."""


@dataclass(frozen=True, slots=True)
class GroupSize:
    """What other processes know of a group."""

    owner: int
    """The process that holds it."""
    loads: tuple[Load, ...]
    """Of its segments."""
    visual: int = 0
    """Tokens of its distinct images."""
    axes: int = 1
    """Of its position ids."""


@dataclass(frozen=True, slots=True)
class Part:
    """What of a group stands in one row."""

    group: int
    shares: tuple[Share, ...]
    """Their segments are numbers within the group."""
    process: int
    row: int


def joint_rows(
    work: Sequence[Work], flops: ModelFlops, processes: Processes, budget: int
) -> tuple[list[PackedBatch], list[Segment]]:
    """This process's rows, as many as every other has, and the segments in them.

    Every process calls it together. What goes to another process is sent with its pixels, to there and nowhere else.

    Args:
        work: the groups that this process holds; may be none.
        flops: what they cost.
        processes: of the run.
        budget: most tokens of a row; a prompt and one completion over it get a row to themselves.
    """
    groups = processes.gather([_size(w, processes.index) for w in work])
    parts = plan_rows(groups, processes.count, flops, budget)
    own = iter(work)
    held = {g: next(own) for g, size in enumerate(groups) if size.owner == processes.index}
    # Together, so that images which several parts of a group show are sent once.
    ways: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        ways.setdefault((part.group, part.process), []).append(part)
    moving = [(g, to) for g, to in ways if groups[g].owner != to]
    leaving = [_cut(held[g], ways[g, to]) for g, to in moving if g in held]
    came = iter(processes.exchange([(groups[g].owner, to) for g, to in moving], leaving))
    segments: list[list[Segment]] = [[] for _ in range(rows_in(parts))]
    for (g, to), its in ways.items():
        if to == processes.index:
            for part, cut in zip(its, _cut(held[g], its) if g in held else next(came), strict=True):
                segments[part.row] += [replace(segment, group=g) for segment in cut]
    axes = max((size.axes for size in groups), default=1)
    batches = [pack_row(row) if row else empty_row(axes) for row in segments]
    return batches, [segment for row in segments for segment in row]


def plan_rows(
    groups: Sequence[GroupSize], processes: int, flops: ModelFlops, budget: int
) -> list[Part]:
    """Divide groups into rows of at most `budget` tokens so that processes wait little for each other.

    Tried are the fewest rows that hold everything and up to two more, with groups whole as far as they fit, and with those cut
    that are longer than a row should be. Taken is what takes least time: the longest row at each place, and what rows and
    sent pixels cost. The same input always gives the same plan.

    Returns:
        The parts of all processes by group.
    """
    whole = [
        (g, unit)
        for g, size in enumerate(groups)
        for unit in units_of(size.loads, range(len(size.loads)), budget, flops.shared)
    ]
    if not whole:
        return []
    tokens = sum(_tokens(groups[g].loads, unit) for g, unit in whole)
    work = sum(_flops(groups[g], unit, flops) for g, unit in whole)
    work += sum(size.visual for size in groups) * flops.visual
    best: list[Part] = []
    shortest, fitting = math.inf, 0
    rows = max(1, -(-tokens // (processes * budget)))
    while fitting < 3:
        divisions = [whole]
        for longer in _LONGER:
            limit = longer * work / (processes * rows)
            finer = [(g, u) for g, unit in whole for u in _cut_to(limit, groups[g], unit, flops)]
            if len(finer) > len(divisions[-1]):
                divisions.append(finer)
        plans = [_dealt(groups, d, processes, rows, flops, budget) for d in divisions]
        for parts in filter(None, plans):
            time = _time(groups, parts, processes, flops)
            if time < _WORTH * shortest:
                best, shortest = parts, time
        fitting += any(plans)
        rows += 1
    return best


def row_flops(
    groups: Sequence[GroupSize], parts: Sequence[Part], processes: int, flops: ModelFlops
) -> np.ndarray:
    """float64 [processes, rows]: of each row, images in the first row of their process that shows them."""
    out = np.zeros((processes, rows_in(parts)))
    first: dict[tuple[int, int], int] = {}
    for part in parts:
        out[part.process, part.row] += _flops(groups[part.group], part.shares, flops)
        at = part.group, part.process
        first[at] = min(part.row, first.get(at, part.row))
    for (g, process), row in first.items():
        out[process, row] += groups[g].visual * flops.visual
    return out


def rows_in(parts: Sequence[Part]) -> int:
    """How many rows each process has, some of which may be empty."""
    return max((part.row for part in parts), default=-1) + 1


def _time(
    groups: Sequence[GroupSize], parts: Sequence[Part], processes: int, flops: ModelFlops
) -> float:
    """FLOPs of the longest rows, and what rows and sent pixels take of the time."""
    longest = row_flops(groups, parts, processes, flops).max(0)
    sent = {(p.group, p.process) for p in parts if p.process != groups[p.group].owner}
    visual = sum(groups[g].visual for g, _ in sent) / processes
    return longest.sum() + (len(longest) * _ROW_TOKENS + visual * _SENT_TOKENS) * flops.token


def _dealt(
    groups: Sequence[GroupSize],
    divided: Sequence[tuple[int, Row]],
    processes: int,
    rows: int,
    flops: ModelFlops,
    budget: int,
) -> list[Part] | None:
    """Units, each with its group, in at most so many rows of each process, the longest row first; None if they do not fit."""
    pieces = [
        Piece(
            g,
            groups[g].owner,
            _flops(groups[g], unit, flops),
            groups[g].visual * flops.visual,
            _tokens(groups[g].loads, unit),
        )
        for g, unit in divided
    ]
    dealt = deal(pieces, processes, rows, budget, _TOLERANCE)
    if dealt is None:
        return None
    loads: dict[tuple[int, int], float] = {}
    for piece, at in zip(pieces, dealt, strict=True):
        loads[at] = loads.get(at, 0.0) + piece.flops + piece.images
    # So that the rows of one number are alike.
    places: dict[tuple[int, int], int] = {}
    taken = [0] * processes
    for process, row in sorted(loads, key=lambda at: (-loads[at], at)):
        places[process, row] = taken[process]
        taken[process] += 1
    return [
        Part(g, tuple(unit), at[0], places[at])
        for (g, unit), at in zip(divided, dealt, strict=True)
    ]


def _cut_to(limit: float, size: GroupSize, unit: Row, flops: ModelFlops) -> list[Row]:
    """A unit in halves, and these again, as long as they cost more and have several completions."""
    if _flops(size, unit, flops) + size.visual * flops.visual <= limit:
        return [unit]
    single = len(unit) == 1
    items = [Share(unit[0].segment, (c,)) for c in unit[0].completions] if single else unit
    if len(items) < 2:
        return [unit]

    def length(
        share: Share,
    ) -> int:  # With one more for each, so that empty ones go to both halves.
        return sum(1 + size.loads[share.segment].completions[c] for c in share.completions)

    halves: tuple[Row, Row] = [], []
    held = [0, 0]
    for share in sorted(
        items, key=lambda share: (-length(share), share.segment, share.completions)
    ):
        shorter = int(held[1] < held[0])
        halves[shorter].append(share)
        held[shorter] += length(share)
    if single:
        merged = [tuple(sorted(c for share in half for c in share.completions)) for half in halves]
        halves = [Share(unit[0].segment, merged[0])], [Share(unit[0].segment, merged[1])]
    return [part for half in halves for part in _cut_to(limit, size, half, flops)]


def _size(work: Work, owner: int) -> GroupSize:
    loads = (Load(len(s.prompt.input_ids), tuple(map(len, s.completions))) for s in work)
    return GroupSize(owner, tuple(loads), visual_tokens(work), len(work[0].prompt.position_ids))


def _tokens(loads: Sequence[Load], shares: Sequence[Share]) -> int:
    return sum(
        loads[s.segment].prompt + sum(loads[s.segment].completions[c] for c in s.completions)
        for s in shares
    )


def _flops(size: GroupSize, shares: Sequence[Share], flops: ModelFlops) -> float:
    """Without images."""
    return sum(
        flops.text(load.prompt, [load.completions[c] for c in share.completions])
        for share in shares
        for load in [size.loads[share.segment]]
    )


def _cut(work: Work, parts: Sequence[Part]) -> list[Work]:
    """The segments of each part, with its completions alone."""
    return [[_with(work[s.segment], s.completions) for s in part.shares] for part in parts]


def _with(segment: Segment, completions: Sequence[int]) -> Segment:
    sampled = segment.sampled_logprobs
    return replace(
        segment,
        completions=tuple(segment.completions[c] for c in completions),
        advantages=tuple(segment.advantages[c] for c in completions),
        sampled_logprobs=sampled and tuple(sampled[c] for c in completions),
    )
