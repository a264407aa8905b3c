"""The packer: which sequence goes into which row, and one row made of its segments."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks.proof import Checked
from perl.packing import pack_row, plan
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment

BUDGET = 8192
IMAGE_TOKEN = 9
IMAGES, IMAGE_TOKENS, TEXT_TOKENS, COMPLETION_TOKENS = 4, 64, 60, 200


@pytest.mark.parametrize("count", [64, 256, 1024, 4096])
def test_plan(checked: Checked, count: int) -> None:
    """Prompts with images and completions, 300 to 2000 tokens together."""
    rng = random.Random(0)
    lengths = [rng.randint(300, 2000) for _ in range(count)]

    def prove(rows: list[list[int]]) -> None:
        assert sorted(i for row in rows for i in row) == list(range(count))
        loads = sorted(sum(lengths[i] for i in row) for row in rows)
        assert loads[-1] <= BUDGET
        # Best fit opens a row only for what no other row can take.
        assert sum(loads[:2]) > BUDGET

    rows = len(plan(lengths, BUDGET))
    fill = sum(lengths) / (rows * BUDGET)
    checked(lambda: plan(lengths, BUDGET), prove, group="plan, by sequences", fill=fill)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_pack_row(checked: Checked, count: int) -> None:
    """Segments of four images each; two segments, a prompt's completions, share their images."""
    segments = [make_segment(prompt=i // 2, seed=i) for i in range(count)]

    def prove(batch: PackedBatch) -> None:
        ids = [(*s.prompt.input_ids, *s.completion_ids) for s in segments]
        length = len(ids[0])
        assert batch.input_ids.tolist() == [token for part in ids for token in part]
        assert batch.cu_seqlens.tolist() == list(range(0, count * length + 1, length))
        completions = [token for s in segments for token in s.completion_ids]
        assert batch.targets.tolist() == completions
        assert batch.input_ids[batch.scored + 1].tolist() == completions
        assert batch.position_ids[0].tolist() == list(range(length)) * count
        # Each visual token shows the feature that its own prompt's image has there.
        features = [(image.key, i) for image in batch.images for i in range(image.tokens)]
        shown = [(m.key, i) for s in segments for m in s.prompt.images for i in range(m.tokens)]
        assert [features[i] for i in batch.visual_source] == shown
        assert (batch.input_ids == IMAGE_TOKEN).nonzero()[:, 0].equal(batch.visual_positions)

    tokens = sum(len(s.prompt.input_ids) + len(s.completion_ids) for s in segments)
    checked(lambda: pack_row(segments), prove, group="pack_row, by segments", tokens=tokens)


def make_segment(prompt: int, seed: int) -> Segment:
    rng = np.random.default_rng(seed)
    images = tuple(
        EncodedImage(f"{prompt}-{k}", torch.empty(0), (1, 16, 16), IMAGE_TOKENS)
        for k in range(IMAGES)
    )
    text = np.arange(TEXT_TOKENS) + 100
    ids = np.concatenate([np.full(IMAGES * IMAGE_TOKENS, IMAGE_TOKEN), text])
    positions = np.tile(np.arange(len(ids)), (3, 1))
    encoded = EncodedPrompt(ids, positions, len(ids), images, IMAGE_TOKEN)
    return Segment(encoded, rng.integers(100, 1000, COMPLETION_TOKENS))
