"""Which tokens of a packed row see which, in the forms that attention kernels take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional as F

Made = TypeVar("Made")


class AttentionArgs(NamedTuple):
    """How a layer attends: softmax(scale q k^T) v, from which weights drop out."""

    causal: bool = True
    """Whether a token sees its own sequence only up to itself."""
    scale: float | None = None
    """None: 1 / sqrt(d)."""
    dropout: float = 0.0


class PackedLayout:
    """A row of T tokens as Q sequences, some of which share a prefix; made once per forward, shared by all layers.

    A token sees its own sequence (up to itself where attention is causal) and all of the sequence's prefix, a span of
    the row before the sequence. Everything here is on the CPU, so that no layer waits for the device; what kernels
    read (`cu_seqlens_q`, `cu_seqlens_k`, `key_index`) is on the device.

    Args:
        cu_seqlens_q: int [Q+1] on the CPU, where the sequences' own tokens start, ending at T.
        prefix_starts, prefix_lengths: int [Q] on the CPU; length 0: no prefix.
        device: of the queries.
    """

    def __init__(
        self,
        cu_seqlens_q: torch.Tensor,
        prefix_starts: torch.Tensor,
        prefix_lengths: torch.Tensor,
        device: torch.device,
    ) -> None:
        self.device = device
        self.starts, self.lengths = cu_seqlens_q[:-1].long(), cu_seqlens_q.diff().long()
        self.prefix_starts, self.prefix_lengths = prefix_starts.long(), prefix_lengths.long()
        self.key_lengths = self.prefix_lengths + self.lengths
        self.tokens = int(cu_seqlens_q[-1])
        self.max_seqlen_q, self.max_seqlen_k = int(self.lengths.max()), int(self.key_lengths.max())
        self.shared = bool(self.prefix_lengths.any())
        """Whether any sequence has a prefix."""
        self.cu_seqlens_q = cu_seqlens_q.int().to(device)
        """int32 [Q+1]"""
        self._made: dict[Any, Any] = {}

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> PackedLayout:
        """Sequences without a prefix.

        Args:
            cu_seqlens: int [S+1] on any device, where sequences start, ending at T; empty ones are left out.
        """
        starts = cu_seqlens.cpu().unique()
        none = torch.zeros(len(starts) - 1, dtype=torch.int64)
        return cls(starts, none, none, cu_seqlens.device)

    def once(self, make: Callable[..., Made], *args: Any) -> Made:
        """`make(self, *args)`, made for the first layer that asks and kept for the others."""
        if (make, args) not in self._made:
            self._made[make, args] = make(self, *args)
        return self._made[make, args]

    @cached_property
    def cu_seqlens_k(self) -> torch.Tensor:
        """int32 [Q+1]: where each sequence's keys start among those of `key_index`."""
        return F.pad(self.key_lengths.cumsum(0), (1, 0)).int().to(self.device)

    @cached_property
    def key_index(self) -> torch.Tensor:
        """int64 [K]: for each sequence the rows of its prefix, then its own."""
        row = torch.arange(self.tokens)
        own = row.split(self.lengths.tolist())
        prefixes = zip(self.prefix_starts.tolist(), self.prefix_lengths.tolist(), strict=True)
        spans = [
            torch.cat([row[start : start + length], rows])
            for (start, length), rows in zip(prefixes, own, strict=True)
        ]
        return torch.cat(spans).to(self.device)
