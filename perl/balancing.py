"""The groups of an optimiser step, shared out so that no process waits long for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perl.packing_plan import balance
from perl.processes import Processes
from perl.types import Segment
from perl.vision import distinct

Work = list[Segment]
"""The segments of one group: what moves together, as they show the same images."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Multiply-adds of one forward, in parts; backward is twice as much, of everything alike.

    Attention inside the tower is left out: patches times weights is nearly all of it.
    """

    token: float
    """Of a token in the language model, without attention."""
    pair: float
    """Of a query and a key, over all layers."""
    scored: float
    """Of a scored token in the head."""
    visual: float
    """Of a visual token in the tower."""

    @classmethod
    def of(cls, policy: Any) -> ModelFlops:
        """From the sizes of a policy's weights and its config.

        Args:
            policy: a `perl.model.Policy`.
        """
        core, decoder = policy.core, policy.base.get_decoder()
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        layers = sum(p.numel() for p in getattr(decoder, "layers", decoder).parameters())
        # Qwen's tower works on patches, of which several are merged into a visual token.
        merged = getattr(getattr(core.config, "vision_config", None), "spatial_merge_size", 1) ** 2
        return cls(
            token=layers,
            pair=2.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
            scored=policy.head_weight.numel(),
            visual=merged * sum(p.numel() for p in policy.vision.weights),
        )

    def group(self, segments: Sequence[Segment]) -> float:
        """Of a group whose prompts are computed once per order and whose images once."""
        total = 0.0
        for segment in segments:
            prompt = len(segment.prompt.input_ids)
            lengths = [len(c) for c in segment.completions]
            pairs = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in lengths)
            total += (prompt + sum(lengths)) * self.token + pairs * self.pair
            total += sum(lengths) * self.scored
        images = distinct([image for s in segments for image in s.prompt.images])
        return total + sum(image.tokens for image in images) * self.visual


def share_out(work: Sequence[Work], flops: ModelFlops, processes: Processes) -> list[Work]:
    """This process's groups after groups went from busy processes to idle ones.

    Every process calls it together. Only groups that move are sent, with their pixels.

    Args:
        work: the groups that this process holds; may be none.
        flops: what they cost.
        processes: of the run; with a single one nothing happens.
    """
    if processes.count == 1:
        return list(work)
    costs = processes.gather([[flops.group(w) for w in work]])
    plan = balance(costs)
    owners = plan[processes.index]
    leaving = [
        (owner, w) for owner, w in zip(owners, work, strict=True) if owner != processes.index
    ]
    staying = [w for owner, w in zip(owners, work, strict=True) if owner == processes.index]
    if all(owner == p for p, own in enumerate(plan) for owner in own):
        return staying
    arriving = processes.gather(leaving)
    return staying + [w for owner, w in arriving if owner == processes.index]
