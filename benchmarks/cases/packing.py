"""The packer: which sequence goes into which row, and one row made of its segments."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import torch

from benchmarks.harness.contest import Contest, Inputs, own_contest
from perl.model.packed.pack import pack_row
from perl.model.packed.plan import Load, Row, Share, plan
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment

BUDGET = 8192
IMAGE_TOKEN = 9
IMAGES, IMAGE_TOKENS, TEXT_TOKENS, COMPLETION_TOKENS = 4, 64, 60, 200


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Rows are planned and made on the host, so both kinds of machine do the same."""
    return [
        *[_plan(count) for count in (64, 256, 1024, 4096)],
        *[_pack_row(count) for count in (4, 16, 64)],
    ]


def _plan(prompts: int) -> Contest:
    case, loads = f"{prompts} prompts of 6 completions", partial(_loads, prompts)
    return own_contest(
        "Plan of packed rows", case, "prompts", prompts, loads, lambda loads: plan(loads, BUDGET)
    )


def _loads(count: int, device: torch.device) -> Inputs:
    """Prompts with images, 300 to 1000 tokens, and six completions each; two prompts to a group."""
    rng = random.Random(0)
    loads = [
        Load(rng.randint(300, 1000), tuple(rng.randint(50, 500) for _ in range(6)), index // 2)
        for index in range(count)
    ]

    def tokens_of(share: Share) -> int:
        load = loads[share.segment]
        return load.prompt + sum(load.completions[i] for i in share.completions)

    def check(rows: list[Row]) -> None:
        placed = sorted((s.segment, i) for row in rows for s in row for i in s.completions)
        assert placed == [(s, i) for s in range(count) for i in range(6)], "a completion is lost"
        used = sorted(sum(map(tokens_of, row)) for row in rows)
        assert used[-1] <= BUDGET, f"a row of {used[-1]} tokens"
        # Best fit opens a row only for what no other row can take.
        assert sum(used[:2]) > BUDGET, "two rows would fit into one"

    return Inputs(loads, check)


def _pack_row(prompts: int) -> Contest:
    case, segments = f"{prompts} prompts of 2 completions", partial(_segments, prompts)
    return own_contest("A packed row of segments", case, "prompts", prompts, segments, pack_row)


def _segments(count: int, device: torch.device) -> Inputs:
    """Prompts of four images with two completions each; two prompts share their images."""
    segments = [_segment(group=i // 2, seed=i) for i in range(count)]

    def check(batch: PackedBatch) -> None:
        ids = [np.concatenate([s.prompt.input_ids, *s.completions]) for s in segments]
        length = len(ids[0])
        assert batch.input_ids.tolist() == np.concatenate(ids).tolist()
        starts = [
            s for k in range(count) for s in (k * length, (k + 1) * length - COMPLETION_TOKENS)
        ]
        assert batch.cu_seqlens_q.tolist() == [*starts, count * length]
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

    return Inputs(segments, check)


def _segment(group: int, seed: int) -> Segment:
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
