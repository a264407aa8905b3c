"""Segments end to end in rows of a token budget: plain data in, plain data out.

A row holds whole segments [prompt | completion 1 | ... | completion R]. Each completion sees its prompt and itself and
takes the positions it would have if it stood alone behind the prompt, so hidden states and gradients are those of one
sequence at a time. Each distinct image stands once in the batch however many segments show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from perl.model.packed.plan import Load, Share, plan
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment


def pack(segments: Sequence[Segment], budget: int, share: bool = True) -> list[PackedBatch]:
    """Pack segments into micro-batches of at most `budget` tokens each; see `perl.model.packed.plan.plan`.

    Args:
        segments: prompts with their completions; completions may be empty.
        budget: maximum tokens of a micro-batch; a prompt and one completion over it get a row to themselves.
        share: whether completions share their prompt; if not, each has a copy of it.
    """
    loads = [
        Load(len(s.prompt.input_ids), tuple(len(c) for c in s.completions), s.group)
        for s in segments
    ]
    return [pack_row(segments, row) for row in plan(loads, budget, share)]


def pack_row(segments: Sequence[Segment], shares: Sequence[Share] | None = None) -> PackedBatch:
    """Put completions behind their prompts into one row.

    The hidden state of the last prompt token scores the first token of every completion, so a completion of L tokens
    is scored by the last prompt row and the first L - 1 of its own.

    Args:
        segments: prompts with their completions.
        shares: which completions of which segments; left out, all.
    """
    if shares is None:
        shares = [Share(i, tuple(range(len(s.completions)))) for i, s in enumerate(segments)]
    row = _Row()
    for share in shares:
        segment = segments[share.segment]
        start = row.add_prompt(segment.prompt)
        for number in share.completions:
            row.add_completion(segment.prompt, start, segment.completions[number])
            row.advantages.append(segment.advantages[number])
            row.source.append((share.segment, number))
            row.off_policy.append(segment.off_policy)
            if segment.sampled_logprobs is not None:
                row.sampled.append(segment.sampled_logprobs[number])
    return row.batch()


def prompt_row(prompts: Sequence[EncodedPrompt]) -> PackedBatch:
    """Prompts alone, end to end; `scored` is the last token of each."""
    row = _Row()
    for prompt in prompts:
        start = row.add_prompt(prompt)
        row.scored.append(np.array([start + len(prompt.input_ids) - 1]))
    return row.batch()


def empty_row(axes: int) -> PackedBatch:
    """A row to take part with in the forwards and backwards of other processes: a few tokens, none of which is scored.

    Args:
        axes: of the model's position ids.
    """
    tokens = np.arange(_EMPTY)
    positions = np.broadcast_to(tokens, (axes, _EMPTY))
    # Whatever the tokens mean: none is an image.
    prompt = EncodedPrompt(np.zeros_like(tokens), positions, _EMPTY, (), image_token_id=-1)
    row = pack_row([Segment(prompt, (), ())])
    return replace(row, sampled_logprobs=torch.empty(0))


_EMPTY = 16
"""Tokens; a compiled layer makes a special case of one."""


class _Row:
    """A row as it grows."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.starts: list[int] = []
        self.prefixes: list[tuple[int, int]] = []
        self.scored: list[np.ndarray] = []
        self.completions: list[np.ndarray] = []
        self.advantages: list[float] = []
        self.source: list[tuple[int, int]] = []
        self.sampled: list[np.ndarray] = []
        self.off_policy: list[bool] = []
        self.visual_positions: list[np.ndarray] = []
        self.visual_source: list[np.ndarray] = []
        self.images: dict[str, EncodedImage] = {}
        self.feature_start: dict[str, int] = {}
        self.tokens = self.features = 0

    def add_prompt(self, prompt: EncodedPrompt) -> int:
        """Append a prompt, which starts a sequence; returns where it starts."""
        start = self.tokens
        self._append(prompt.input_ids, prompt.position_ids)
        self.starts.append(start)
        self.prefixes.append((0, 0))
        # Only the prompt's image tokens are pictures: one sampled inside a completion stays text.
        self.visual_positions.append(
            np.flatnonzero(prompt.input_ids == prompt.image_token_id) + start
        )
        for image in prompt.images:
            if image.key not in self.images:
                self.images[image.key] = image
                self.feature_start[image.key] = self.features
                self.features += image.tokens
            self.visual_source.append(np.arange(image.tokens) + self.feature_start[image.key])
        return start

    def add_completion(self, prompt: EncodedPrompt, prompt_start: int, ids: np.ndarray) -> None:
        """Append a completion of the prompt that starts at `prompt_start`."""
        prompt_end = prompt_start + len(prompt.input_ids)
        start = self.tokens
        # The first that has any tokens goes on in the prompt's sequence: so its prefix keys need no gather.
        if len(ids) and start > prompt_end:
            self.starts.append(start)
            self.prefixes.append((prompt_start, len(prompt.input_ids)))
        following = np.arange(len(ids)) + prompt.next_position
        self._append(ids, np.broadcast_to(following, (len(prompt.position_ids), len(ids))))
        rows = np.arange(len(ids)) + start - 1
        # What stands before it in the row is another completion: its first token is predicted by the prompt's last.
        rows[:1] = prompt_end - 1
        self.scored.append(rows)
        self.completions.append(ids)

    def _append(self, ids: np.ndarray, positions: np.ndarray) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.tokens += len(ids)

    def batch(self) -> PackedBatch:
        ends = np.cumsum([0, *(len(c) for c in self.completions)])
        return PackedBatch(
            input_ids=_join(self.ids),
            position_ids=torch.from_numpy(np.concatenate(self.positions, axis=1)),
            cu_seqlens_q=torch.tensor([*self.starts, self.tokens], dtype=torch.int32),
            prefix_starts=torch.tensor([s for s, _ in self.prefixes], dtype=torch.int32),
            prefix_lengths=torch.tensor([n for _, n in self.prefixes], dtype=torch.int32),
            scored=_join(self.scored),
            targets=_join(self.completions),
            completion_cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            advantages=torch.tensor(self.advantages, dtype=torch.float32),
            images=tuple(self.images.values()),
            visual_positions=_join(self.visual_positions),
            visual_source=_join(self.visual_source),
            source=tuple(self.source),
            sampled_logprobs=torch.from_numpy(np.concatenate(self.sampled).astype(np.float32))
            if self.sampled
            else None,
            off_policy=torch.from_numpy(np.repeat(self.off_policy, np.diff(ends)))
            if any(self.off_policy)
            else None,
        )


def _join(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return (
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if parts
        else torch.empty(0, dtype=torch.int64)
    )


def packing_counts(
    batches: Sequence[PackedBatch], segments: Sequence[Segment], budget: int
) -> dict[str, float]:
    """What rows hold and what was shared, in numbers that add up over processes.

    Args:
        batches: what `pack` made of `segments`, and rows without any that only take part.
        budget: most tokens of a row.

    Returns:
        `rows`; `tokens` that go through the language model and distinct `images` that go through the tower; `room`, rows x
        budget; `unshared_tokens` and `unshared_images`, which there would be if every completion had its own prompt.
    """
    repeated = sum(
        len(s.prompt.input_ids) * len(s.completions) + sum(map(len, s.completions))
        for s in segments
    )
    shown = sum(len(s.prompt.images) * len(s.completions) for s in segments)
    distinct = len({image.key for b in batches for image in b.images})
    tokens = sum(b.num_tokens for b in batches if b.source)
    return {
        "rows": len(batches),
        "tokens": tokens,
        "images": distinct,
        "room": len(batches) * budget,
        "unshared_tokens": repeated,
        "unshared_images": shown,
    }


def packing_report(counts: Mapping[str, float]) -> dict[str, float]:
    """Of `packing_counts`: `rows`, `tokens` and `images`; `fill`, tokens over room; `token_sharing` and `image_sharing`, how
    many times as many tokens and images there would be without sharing."""
    tokens, images, room = (counts[name] for name in ("tokens", "images", "room"))
    return {
        **{name: counts[name] for name in ("rows", "tokens", "images")},
        "fill": tokens / room if room else 0.0,
        "token_sharing": counts["unshared_tokens"] / tokens if tokens else 1.0,
        "image_sharing": counts["unshared_images"] / images if images else 1.0,
    }
