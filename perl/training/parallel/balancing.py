"""The groups of an optimizer step, shared out so that no process waits long for another."""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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

    def group(self, segments: Sequence[Segment]) -> float:
        """Of a group whose prompts are computed once per order, or once per completion, and whose images once."""
        total = 0.0
        for segment in segments:
            met = segment_met(segment, self.shared)
            total += met.tokens * self.token + met.pairs * self.pair + met.scored * self.scored
        images = distinct([image for s in segments for image in s.prompt.images])
        return total + sum(image.tokens for image in images) * self.visual


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
