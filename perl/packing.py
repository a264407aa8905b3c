"""Sequences end to end in rows of a token budget: plain data in, plain data out.

A row holds whole segments [prompt | completion]. Positions restart in every segment, attention stays inside it
(`cu_seqlens`), and each distinct image stands once in the batch however many segments show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perl.types import EncodedImage, PackedBatch, Segment


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Assign sequences to rows of at most `budget` tokens by best-fit decreasing.

    A sequence longer than the budget gets a row of its own. Rows and the sequences in them keep the order of the
    input where the fit allows, so the same input always gives the same plan.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens of a row.

    Returns:
        For each row the indices of its sequences, ascending.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row, room in enumerate(free) if room >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda row: (free[row], row))
        else:
            best = len(rows)
            rows.append([])
            free.append(budget)
        rows[best].append(index)
        free[best] -= lengths[index]
    for row in rows:
        row.sort()
    return sorted(rows)


def pack(segments: Sequence[Segment], budget: int) -> list[PackedBatch]:
    """Pack segments into micro-batches of at most `budget` tokens each.

    Args:
        segments: prompts with their completions; completions may be empty.
        budget: most tokens of a micro-batch; a longer segment stands alone.
    """
    lengths = [len(s.prompt.input_ids) + len(s.completion_ids) for s in segments]
    return [pack_row([segments[i] for i in row], tuple(row)) for row in plan(lengths, budget)]


def pack_row(segments: Sequence[Segment], index: tuple[int, ...] = ()) -> PackedBatch:
    """Put segments into one row; `index` says where they stood in a larger list.

    The hidden state of the last prompt token scores the first completion token, so a completion of L tokens is
    scored by L rows that start one before it.
    """
    if not segments:
        raise ValueError("a packed row needs at least one segment")
    ids, positions, scored, targets = [], [], [], []
    visual_positions, visual_source = [], []
    images: dict[str, EncodedImage] = {}
    feature_start: dict[str, int] = {}
    starts, completion_starts, features = [0], [0], 0
    for segment in segments:
        prompt, completion = segment.prompt, np.asarray(segment.completion_ids, dtype=np.int64)
        offset, prompt_length = starts[-1], len(prompt.input_ids)
        ids += [prompt.input_ids, completion]
        positions.append(_positions(segment))
        scored.append(np.arange(len(completion)) + offset + prompt_length - 1)
        targets.append(completion)
        # Only the prompt's image tokens are pictures: one sampled inside a completion stays text.
        visual_positions.append(np.flatnonzero(prompt.input_ids == prompt.image_token_id) + offset)
        for image in prompt.images:
            if image.key not in images:
                images[image.key] = image
                feature_start[image.key] = features
                features += image.tokens
            visual_source.append(np.arange(image.tokens) + feature_start[image.key])
        starts.append(offset + prompt_length + len(completion))
        completion_starts.append(completion_starts[-1] + len(completion))
    return PackedBatch(
        input_ids=_join(ids),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(np.diff(starts)).item(),
        scored=_join(scored),
        targets=_join(targets),
        completion_cu_seqlens=torch.tensor(completion_starts, dtype=torch.int32),
        advantages=torch.tensor([s.advantage for s in segments], dtype=torch.float32),
        images=tuple(images.values()),
        visual_positions=_join(visual_positions),
        visual_source=_join(visual_source),
        segment_index=index or tuple(range(len(segments))),
    )


def _positions(segment: Segment) -> np.ndarray:
    """int64 [4, length]: a counter that restarts, then M-RoPE's axes going on through the completion."""
    prompt, length = segment.prompt, len(segment.completion_ids)
    following = np.broadcast_to(np.arange(length) + prompt.next_position, (3, length))
    axes = np.concatenate([prompt.position_ids, following], axis=1)
    return np.concatenate([np.arange(axes.shape[1])[None], axes])


def _join(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return (
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if parts
        else torch.empty(0, dtype=torch.int64)
    )
