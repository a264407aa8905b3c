"""How full packed rows are, and what sharing saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perl.types import PackedBatch, Segment


@dataclass(frozen=True, slots=True)
class PackingReport:
    """What packing and sharing saved; see `packing_report`."""

    rows: int
    tokens: int
    """Tokens that go through the language model."""
    images: int
    """Distinct images that go through the vision tower."""
    fill: float
    """Tokens over rows x budget: 1 means no room is left."""
    token_sharing: float
    """Tokens if every completion had its own prompt, over `tokens`."""
    image_sharing: float
    """Images if every completion had its own, over the distinct ones; 1 without images."""


def packing_report(
    batches: Sequence[PackedBatch], segments: Sequence[Segment], budget: int
) -> PackingReport:
    """How full the rows are and how much was shared.

    Args:
        batches: what `pack` made of `segments`.
        budget: most tokens of a row.
    """
    repeated = sum(
        len(s.prompt.input_ids) * len(s.completions) + sum(map(len, s.completions))
        for s in segments
    )
    shown = sum(len(s.prompt.images) * len(s.completions) for s in segments)
    distinct = len({image.key for b in batches for image in b.images})
    tokens = sum(b.num_tokens for b in batches)
    return PackingReport(
        rows=len(batches),
        tokens=tokens,
        images=distinct,
        fill=tokens / (len(batches) * budget) if batches else 0.0,
        token_sharing=repeated / tokens if tokens else 1.0,
        image_sharing=shown / distinct if distinct else 1.0,
    )
