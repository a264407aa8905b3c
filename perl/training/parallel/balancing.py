"""The groups of an optimizer step, shared out so that no process waits long for another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from perl.distributed import Processes
from perl.model.vision import distinct
from perl.types import Segment

if TYPE_CHECKING:
    from perl.model.policy import Policy

_MERGING = re.compile(r"merger|projector")
"""In the names of a tower's weights that work on visual tokens, not on patches."""
_LOOKED_UP = re.compile(r"\.(pos_embed\.|embeddings\.position)")
"""In the names of those that nothing is multiplied by."""

Work = list[Segment]
"""The segments of one group: what moves together, as they show the same images."""


class Met(NamedTuple):
    """What the language model meets in a forward over a prompt and its completions."""

    tokens: float
    pairs: float
    """Queries and the keys that they see."""
    scored: float

    @classmethod
    def of(cls, prompt: int, lengths: Sequence[int], shared: bool = True) -> Met:
        """Of a prompt of so many tokens and completions of these lengths; the prompt is read once, or for each of them."""
        copies = 1 if shared else len(lengths)
        pairs = copies * prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in lengths)
        return cls(copies * prompt + sum(lengths), pairs, sum(lengths))


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a training step of a policy costs, in parts: multiply-adds of one forward, and as much again twice for the
    backward of all but a frozen tower.

    Attention inside the tower is left out: patches times weights is nearly all of it.
    """

    token: float
    """Of a token in the language model, without attention."""
    pair: float
    """Of a query and a key, over all layers."""
    scored: float
    """Of a scored token in the head."""
    visual: float
    """Of a visual token in the tower; a third if it is frozen."""
    shared: bool = True
    """Whether completions share their prompt."""

    @classmethod
    def of(cls, policy: Policy, share_prompts: bool = True) -> ModelFlops:
        """From the sizes of a policy's weights and its config."""
        decoder = policy.base.get_decoder()
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        layers = sum(p.numel() for p in getattr(decoder, "layers", decoder).parameters())
        tower = sum(p.numel() for p in policy.vision.weights)
        merging, looked_up = (
            sum(p.numel() for name, p in policy.core.named_parameters() if part.search(name))
            for part in (_MERGING, _LOOKED_UP)
        )
        of_patches = policy.patches_per_token * (tower - merging - looked_up)
        return cls(
            token=layers,
            pair=2.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
            scored=policy.head_weight.numel(),
            visual=(of_patches + merging) * (1.0 if policy.vision.trained else 1 / 3),
            shared=share_prompts and policy.shares_prompts,
        )

    def text(self, prompt: int, lengths: Sequence[int]) -> float:
        """Of completions of these lengths behind a prompt of so many tokens, without images."""
        met = Met.of(prompt, lengths, self.shared)
        return met.tokens * self.token + met.pairs * self.pair + met.scored * self.scored

    def group(self, segments: Sequence[Segment]) -> float:
        """Of a group whose prompts are computed once per order, or once per completion, and whose images once."""
        text = sum(
            self.text(len(s.prompt.input_ids), [len(c) for c in s.completions]) for s in segments
        )
        return text + visual_tokens(segments) * self.visual


def visual_tokens(segments: Sequence[Segment]) -> int:
    """Of all distinct images that segments show."""
    images = distinct([image for s in segments for image in s.prompt.images])
    return sum(image.tokens for image in images)


@dataclass(frozen=True, slots=True)
class Piece:
    """Work that is not divided any further."""

    group: int
    """Pieces of one group show the same images."""
    owner: int
    """The process that holds it."""
    flops: float
    """Without images."""
    images: float = 0.0
    """FLOPs of the group's images, which each process that has a piece of it spends once."""
    tokens: int = 0


def segment_met(segment: Segment, shared: bool) -> Met:
    lengths = [len(c) for c in segment.completions]
    return Met.of(len(segment.prompt.input_ids), lengths, shared)


def share_out(work: Sequence[Work], flops: ModelFlops, processes: Processes) -> list[Work]:
    """This process's groups after groups went from busy processes to idle ones.

    Every process calls it together. Groups that move are sent with their pixels, to where they go and nowhere else.

    Args:
        work: the groups that this process holds; may be none.
        flops: what they cost.
        processes: of the run, of which there are several.
    """
    costs = processes.gather([[flops.group(w) for w in work]])
    plan = balance(costs)
    moves = [(p, owner) for p, own in enumerate(plan) for owner in own if owner != p]
    owners = plan[processes.index]
    leaving = [w for owner, w in zip(owners, work, strict=True) if owner != processes.index]
    staying = [w for owner, w in zip(owners, work, strict=True) if owner == processes.index]
    return staying + processes.exchange(moves, leaving)


def balance(costs: Sequence[Sequence[float]], tolerance: float = 1.05) -> list[list[int]]:
    """Assign work to processes so that the busiest one has little more than the others, and little of it moves.

    Args:
        costs: `costs[p]` of the pieces of work that process p holds.
        tolerance: see `deal`.

    Returns:
        In the same form, the process that each piece goes to.
    """
    owners = [p for p, own in enumerate(costs) for _ in own]
    flops = [cost for own in costs for cost in own]
    pieces = [Piece(i, p, cost) for i, (p, cost) in enumerate(zip(owners, flops, strict=True))]
    placed = [p for p, _ in deal(pieces, len(costs), tolerance=tolerance) or ()]
    if _largest(placed, flops) > _largest(owners, flops):
        placed = owners
    moved = iter(placed)
    return [[next(moved) for _ in own] for own in costs]


def deal(
    pieces: Sequence[Piece],
    processes: int,
    rows: int = 1,
    budget: int | None = None,
    tolerance: float = 1.05,
) -> list[tuple[int, int]] | None:
    """Deal pieces out to rows of processes, so that all have about as many FLOPs and few pieces move.

    The longest piece first. It stays with its owner, or where another piece of its group is, if a row there has room
    for it within `tolerance` times the mean of all rows; else it goes to the row that has least so far (R. L. Graham,
    "Bounds on multiprocessing timing anomalies", 1969, whose order and bound these are): none has more than the
    mean and the longest piece together, or than `tolerance` times the mean.

    Args:
        rows: of each process.
        budget: most tokens of a row, which a piece alone may exceed; None: no limit.
        tolerance: 1 or more.

    Returns:
        Process and row of each piece; None where they do not fit in so many rows.
    """
    images = {piece.group: piece.images for piece in pieces}
    total = sum(piece.flops for piece in pieces) + sum(images.values())
    limit = tolerance * total / (processes * rows)
    loads, tokens = np.zeros((processes, rows)), np.zeros((processes, rows), dtype=np.int64)
    homes: dict[int, list[int]] = {}
    placed: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(pieces)), key=lambda i: (-pieces[i].flops - pieces[i].images, i)):
        piece = pieces[i]
        open_to = loads
        if budget is not None:
            open_to = np.where((tokens == 0) | (tokens + piece.tokens <= budget), loads, np.inf)
        held_by = homes.setdefault(piece.group, [])
        at = None
        for home in held_by or [piece.owner]:
            row = int(open_to[home].argmin())
            cost = piece.flops + (0.0 if home in held_by else piece.images)
            if open_to[home, row] + cost <= limit:
                at = home, row
                break
        if at is None:
            least = open_to.min()
            if np.isinf(least):
                return None
            # Of those that have equally little the own one.
            own = [home for home in held_by or [piece.owner] if open_to[home].min() == least]
            process = own[0] if own else int(open_to.min(1).argmin())
            at = process, int(open_to[process].argmin())
        loads[at] += piece.flops + (0.0 if at[0] in held_by else piece.images)
        tokens[at] += piece.tokens
        if at[0] not in held_by:
            held_by.append(at[0])
        placed[i] = at
    return [placed[i] for i in range(len(pieces))]


def _largest(owners: Sequence[int], flops: Sequence[float]) -> float:
    """What the busiest process has."""
    held: dict[int, float] = {}
    for owner, cost in zip(owners, flops, strict=True):
        held[owner] = held.get(owner, 0.0) + cost
    return max(held.values(), default=0.0)
