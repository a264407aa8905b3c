"""Which tokens of a packed row see which, in the forms that attention kernels take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


class PackedLayout:
    """A row of T tokens cut into Q pieces, on one device; made once per forward, shared by all layers.

    A token sees its own piece (up to itself where attention is causal) and all of the piece's prefix, a span of the
    row before the piece. The sizes are known on the host, so that no layer waits for the device.

    Args:
        piece_starts: int [Q+1] on the CPU, where pieces start, ending at T.
        prefix_starts, prefix_lengths: int [Q] on the CPU; length 0: no prefix.
        device: of the queries.
    """

    def __init__(
        self,
        piece_starts: torch.Tensor,
        prefix_starts: torch.Tensor,
        prefix_lengths: torch.Tensor,
        device: torch.device,
    ) -> None:
        self.device = device
        self.starts: list[int] = piece_starts.tolist()
        self.prefixes: list[tuple[int, int]] = list(
            zip(prefix_starts.tolist(), prefix_lengths.tolist(), strict=True)
        )
        self.lengths = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self.tokens = self.starts[-1]
        self.max_query = max(self.lengths)
        self.max_key = max(
            n + prefix for n, (_, prefix) in zip(self.lengths, self.prefixes, strict=True)
        )
        self._made: dict[Callable[[PackedLayout], Any], Any] = {}

    @classmethod
    def of_segments(cls, cu_seqlens: torch.Tensor) -> PackedLayout:
        """Pieces without a prefix.

        Args:
            cu_seqlens: int [S+1] on any device, where segments start, ending at T; empty ones are left out.
        """
        starts = torch.tensor(sorted(set(cu_seqlens.tolist())))
        none = torch.zeros(len(starts) - 1, dtype=torch.int64)
        return cls(starts, none, none, cu_seqlens.device)

    def once(self, make: Callable[[PackedLayout], Made]) -> Made:
        """`make(self)`, made for the first layer that asks and kept for the others."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    @property
    def shared(self) -> bool:
        """Whether any piece has a prefix."""
        return any(length for _, length in self.prefixes)

    @cached_property
    def cu_query(self) -> torch.Tensor:
        """int32 [Q+1]"""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def cu_key(self) -> torch.Tensor:
        """int32 [Q+1]: where each piece's keys start among those of `key_index`."""
        lengths = [n + p for n, (_, p) in zip(self.lengths, self.prefixes, strict=True)]
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()

    @cached_property
    def key_index(self) -> torch.Tensor:
        """int64 [K]: for each piece the rows of its prefix, then its own."""
        spans = []
        for start, length, (prefix, size) in zip(
            self.starts, self.lengths, self.prefixes, strict=False
        ):
            spans += [torch.arange(prefix, prefix + size), torch.arange(start, start + length)]
        return torch.cat(spans).to(self.device)
