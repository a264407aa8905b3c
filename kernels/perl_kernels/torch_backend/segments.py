"""Completions packed in one dimension: which completion a token belongs to, and sums over each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """`index [N]` int64: the completion of each token; `count`: B; `valid []` bool: whether
    `cu_seqlens` describes the N tokens (looked at without a synchronisation)."""

    index: Tensor
    count: int
    valid: Tensor

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, n_tokens: int) -> Segments:
        bounds = cu_seqlens.to(torch.int64)
        positions = torch.arange(n_tokens, device=bounds.device)
        # right=True skips empty completions: the first end strictly behind the position.
        index = torch.searchsorted(bounds[1:], positions, right=True)
        count = bounds.numel() - 1
        ordered = (bounds[1:] >= bounds[:-1]).all()
        valid = (bounds[0] == 0) & (bounds[-1] == n_tokens) & ordered
        return cls(index.clamp(max=max(count - 1, 0)), count, valid)

    def sum(self, tokens: Tensor) -> Tensor:
        """[N] -> [B], 0 for empty completions."""
        if self.count == 0:
            return tokens[:0]
        return tokens.new_zeros(self.count).index_add(0, self.index, tokens)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[B] -> [N]."""
        if self.count == 0:
            return per_sequence
        return per_sequence[self.index]

    def mean(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[N] -> [N]: each token gets the mean over its completion's tokens where `mask`. What is
        masked in `tokens` must be 0 already."""
        lengths = self.sum(mask.to(tokens.dtype)).clamp(min=1)
        return self.spread(self.sum(tokens) / lengths)
