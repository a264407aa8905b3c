"""FlexAttention over packed rows: a kernel that PyTorch compiles for a mask, in any floating dtype.

A token sees two spans of the row: its own sequence, up to itself where attention is causal, and the sequence's prefix.
So four numbers per token say it all, and the one compiled kernel reads them: another layout, causal or not, only
changes numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from perl.model.packed.layout import AttentionArgs, PackedLayout

BLOCK = 128
"""Rows and columns of a block, of which the kernel skips those that nobody sees; PyTorch's default."""


def flex(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, how: AttentionArgs
) -> Tensor:
    """FlexAttention, compiled on CUDA; elsewhere, where it has no gradients, the same mask is made dense for SDPA. It has
    no dropout. Its backward adds up in a fixed order: queries' and keys' gradients are made apart."""
    mask = layout.once(block_mask, how.causal)
    tokens = query.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, mask.seq_lengths[0] - tokens)) for x in (query, key, value))
    if query.is_cuda:
        out = run_compiled(_compiled(), q, k, v, mask, how.scale)
    else:
        row = torch.arange(q.shape[2], device=q.device)
        dense = mask.mask_mod(row, row, row[:, None], row)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense, scale=how.scale, enable_gqa=grouped
        )
    return out[:, :, :tokens].transpose(1, 2)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def run_compiled(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None,
) -> Tensor:
    """Call a compiled `flex_attention`, which is not compiled again for another number of tokens.

    Args:
        query, key, value: [1, heads, n, d] for a mask of [n, n].
    """
    for x in (query, key, value):
        # Else a number of blocks that happens to be that of the heads would be taken for it, and be fixed as it is.
        torch._dynamo.mark_static(x, 1)
        torch._dynamo.mark_static(x, 3)
    grouped = query.shape[1] != key.shape[1]
    # Also where layers run uncompiled (`perl.model.layers.uncompiled`): as written, it would make all scores.
    with torch.compiler.set_stance("default"):
        return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


def block_mask(layout: PackedLayout, causal: bool) -> BlockMask:
    """[1, 1, n, n] for the T tokens and a sequence of padding, n a multiple of 128.

    At least two blocks: torch.compile makes a kernel of its own for sizes of one.
    """
    n = max(-(-layout.tokens // BLOCK), 2) * BLOCK
    own_start, own_end, prefix_start, prefix_end = (
        x.to(layout.device) for x in _spans(layout, n, causal)
    )

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        own = (key >= own_start[query]) & (key < own_end[query])
        return own | ((key >= prefix_start[query]) & (key < prefix_end[query]))

    # create_block_mask() would make the mask of all pairs of tokens; of spans, the overlaps with each block do.
    block = torch.arange(0, n, BLOCK, device=layout.device)

    def overlap(start: Tensor, end: Tensor) -> Tensor:
        """[n, blocks]"""
        first = torch.maximum(start[:, None], block)
        return (torch.minimum(end[:, None], block + BLOCK) - first).clamp(min=0)

    seen = (overlap(own_start, own_end) + overlap(prefix_start, prefix_end)).view(
        n // BLOCK, BLOCK, n // BLOCK
    )
    full = (seen == BLOCK).all(1)
    partial = (seen > 0).any(1) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(n, n)
    )


def _spans(layout: PackedLayout, n: int, causal: bool) -> list[Tensor]:
    """Own start, own end, prefix start, prefix end of each of n tokens: int32 [n] on the CPU."""
    # Behind the row there is padding: one more sequence, without a prefix.
    starts = F.pad(layout.starts, (0, 1), value=layout.tokens)
    ends = F.pad(starts[1:], (0, 1), value=n)
    prefix_starts, prefix_lengths = (
        F.pad(x, (0, 1)) for x in (layout.prefix_starts, layout.prefix_lengths)
    )
    spans = [
        x.repeat_interleave(ends - starts).int()
        for x in (starts, ends, prefix_starts, prefix_starts + prefix_lengths)
    ]
    if causal:
        spans[1] = torch.arange(1, n + 1, dtype=torch.int32)
    return spans


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, columns] -> how many blocks a row has, int32 [1, 1, rows], and which, int32 [1, 1, rows, columns]"""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]
