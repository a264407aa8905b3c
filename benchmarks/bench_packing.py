"""The packer: which sequence goes into which row, and one row made of its segments."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks.proof import Checked
from perl.packing import pack_row
from perl.packing_plan import Load, Row, Share, plan
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment

BUDGET = 8192
IMAGE_TOKEN = 9
IMAGES, IMAGE_TOKENS, TEXT_TOKENS, COMPLETION_TOKENS = 4, 64, 60, 200


@pytest.mark.parametrize("count", [64, 256, 1024, 4096])
def test_plan(checked: Checked, count: int) -> None:
    """Prompts with images, 300 to 1000 tokens, and six completions each; two prompts to a group."""
    rng = random.Random(0)
    loads = [
        Load(rng.randint(300, 1000), tuple(rng.randint(50, 500) for _ in range(6)), index // 2)
        for index in range(count)
    ]

    def prove(rows: list[Row]) -> None:
        placed = sorted((s.segment, i) for row in rows for s in row for i in s.completions)
        assert placed == [(s, i) for s in range(count) for i in range(6)]
        used = sorted(sum(map(tokens_of, row)) for row in rows)
        assert used[-1] <= BUDGET
        # Best fit opens a row only for what no other row can take.
        assert sum(used[:2]) > BUDGET

    def tokens_of(share: Share) -> int:
        load = loads[share.segment]
        return load.prompt + sum(load.completions[i] for i in share.completions)

    rows = plan(loads, BUDGET)
    fill = sum(load.tokens for load in loads) / (len(rows) * BUDGET)
    checked(lambda: plan(loads, BUDGET), prove, group="plan, by prompts of six", fill=fill)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_pack_row(checked: Checked, count: int) -> None:
    """Prompts of four images with two completions each; two prompts share their images."""
    segments = [make_segment(group=i // 2, seed=i) for i in range(count)]

    def prove(batch: PackedBatch) -> None:
        ids = [np.concatenate([s.prompt.input_ids, *s.completions]) for s in segments]
        length = len(ids[0])
        assert batch.input_ids.tolist() == np.concatenate(ids).tolist()
        starts = [
            s for k in range(count) for s in (k * length, (k + 1) * length - COMPLETION_TOKENS)
        ]
        assert batch.piece_starts.tolist() == [*starts, count * length]
        assert batch.prefix_lengths.tolist() == [0, length - 2 * COMPLETION_TOKENS] * count
        completions = np.concatenate([c for s in segments for c in s.completions]).tolist()
        assert batch.targets.tolist() == completions
        later = batch.scored.view(count, 2, COMPLETION_TOKENS)[..., 1:].flatten()
        assert torch.equal(
            batch.input_ids[later],
            batch.targets.view(count, 2, COMPLETION_TOKENS)[..., :-1].flatten(),
        )
        # Each visual token shows the feature that its own prompt's image has there.
        features = [(image.key, i) for image in batch.images for i in range(image.tokens)]
        shown = [(m.key, i) for s in segments for m in s.prompt.images for i in range(m.tokens)]
        assert [features[i] for i in batch.visual_source] == shown
        assert (batch.input_ids == IMAGE_TOKEN).nonzero()[:, 0].equal(batch.visual_positions)

    tokens = sum(len(s.prompt.input_ids) + sum(map(len, s.completions)) for s in segments)
    checked(lambda: pack_row(segments), prove, group="pack_row, by prompts", tokens=tokens)


def make_segment(group: int, seed: int) -> Segment:
    rng = np.random.default_rng(seed)
    images = tuple(
        EncodedImage(f"{group}-{k}", torch.empty(0), (1, 16, 16), IMAGE_TOKENS)
        for k in range(IMAGES)
    )
    text = np.arange(TEXT_TOKENS) + 100
    ids = np.concatenate([np.full(IMAGES * IMAGE_TOKENS, IMAGE_TOKEN), text])
    positions = np.tile(np.arange(len(ids)), (3, 1))
    encoded = EncodedPrompt(ids, positions, len(ids), images, IMAGE_TOKEN)
    completions = tuple(rng.integers(100, 1000, COMPLETION_TOKENS) for _ in range(2))
    return Segment(encoded, completions, (1.0, 1.0), group)
