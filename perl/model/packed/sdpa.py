"""PyTorch's SDPA over packed rows: sequences are spread to padded batches, attended there, and gathered back.

Sequences without a prefix, which SDPA masks itself, and those with one, which see it beside themselves through a
small dense mask, stand in batches of their own, long ones apart from short ones. Every sequence is a row of its batch,
so that none can see another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from perl.model.packed.gather import gather_rows
from perl.model.packed.layout import AttentionArgs, PackedLayout


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, how: AttentionArgs
) -> Tensor:
    """On every device, in every dtype."""
    sequences = len(layout.lengths)
    if not layout.shared and layout.tokens == sequences * layout.max_seqlen_q:
        # Sequences of one length are a batch already.
        q, k, v = (_as_batch(_rows(x), sequences, x.shape[1]) for x in (query, key, value))
        out = _attend(q, k, v, None, how)
        return out.transpose(1, 2).reshape(1, layout.tokens, *query.shape[1::2])
    batches = layout.once(_batches)
    q, k, v = (_rows(x) for x in (query, key, value))
    outputs = []
    for batch in batches.parts:
        mask = batch.causal if how.causal else batch.full
        # Only keys may repeat in a way that gradients have to be summed: a query's padding is never gathered.
        out = _attend(
            _as_batch(q.index_select(0, batch.queries), batch.sequences, query.shape[1]),
            _as_batch(gather_rows(k, batch.keys), batch.sequences, key.shape[1]),
            _as_batch(gather_rows(v, batch.keys), batch.sequences, key.shape[1]),
            mask,
            how._replace(causal=mask is None),
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out.index_select(0, batches.slots).view(1, layout.tokens, *query.shape[1::2])


def _rows(x: Tensor) -> Tensor:
    """[1, h, T, d] -> [T, h d]"""
    return x[0].transpose(0, 1).flatten(1)


def _as_batch(rows: Tensor, sequences: int, heads: int) -> Tensor:
    """[sequences longest, h d] -> [sequences, h, longest, d]"""
    return rows.unflatten(1, (heads, -1)).unflatten(0, (sequences, -1)).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: AttentionArgs
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # Of CUDA's kernels only flash takes fewer key heads, and it takes neither masks nor float32; SDPA would
        # fall back to all scores in memory.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=how.dropout,
        is_causal=how.causal,
        scale=how.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some sequences, spread to rows of one length. Places past an end repeat the last token of the span: no
    query of a token sees them, and what their own queries give is not gathered."""

    sequences: int
    queries: Tensor
    """int64 [sequences L]: the token at each place, L the longest sequence."""
    keys: Tensor
    """int64 [sequences K]: the token at each place, those of the prefix first."""
    causal: Tensor | None
    """bool [sequences, 1, L, K]: which keys a query sees; None: those up to itself."""
    full: Tensor
    """The same, [sequences, 1, 1, K], where a query sees its whole sequence."""


@dataclass(frozen=True, slots=True)
class _Batches:
    parts: list[_Batch]
    slots: Tensor
    """int64 [T]: the place of each token among those of all parts."""


def _batches(layout: PackedLayout) -> _Batches:
    """Made on the CPU, so that a GPU is not waited for."""
    slots = torch.empty(layout.tokens, dtype=torch.int64)
    parts: list[_Batch] = []
    places = 0
    for chosen in _alike(layout):
        own, own_valid = _spread(layout.starts[chosen], layout.lengths[chosen])
        prefix, prefix_valid = _spread(layout.prefix_starts[chosen], layout.prefix_lengths[chosen])
        slots[own[own_valid]] = places + own_valid.flatten().nonzero().squeeze(1)
        places += own.numel()
        full = torch.cat([prefix_valid, own_valid], 1)[:, None, None, :]
        causal = None
        if prefix.shape[1]:
            earlier = torch.ones(own.shape[1], full.shape[3], dtype=torch.bool)
            causal = (full & earlier.tril(prefix.shape[1])).to(layout.device)
        parts.append(
            _Batch(
                sequences=len(own),
                queries=own.flatten().to(layout.device),
                keys=torch.cat([prefix, own], 1).flatten().to(layout.device),
                causal=causal,
                full=full.to(layout.device),
            )
        )
    return _Batches(parts, slots.to(layout.device))


def _alike(layout: PackedLayout) -> list[list[int]]:
    """Numbers of the sequences that share a batch: with a prefix or without, and none much shorter than the longest.

    Attention grows with the square of the length, so padding to 4/3 of it costs up to 16/9. Below 128 keys one batch
    more costs more than padding does; beyond 512 it costs next to nothing.
    """
    prefixes, keys = layout.prefix_lengths.tolist(), layout.key_lengths.tolist()
    groups: list[list[int]] = []
    for i in sorted(range(len(keys)), key=lambda i: (prefixes[i] > 0, -keys[i])):
        first = groups[-1][0] if groups else i
        same_kind = bool(groups) and (prefixes[first] > 0) == (prefixes[i] > 0)
        longest = keys[first]
        least = 0 if longest <= 128 else longest * 3 // 4 if longest <= 512 else longest * 15 // 16
        if not same_kind or keys[i] < least:
            groups.append([])
        groups[-1].append(i)
    return groups


def _spread(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """[n] spans -> the tokens [n, longest] of each, its last one repeated to the end, and which are its own."""
    column = torch.arange(int(length.max()))
    source = start[:, None] + torch.minimum(column, length[:, None] - 1)
    return source, column < length[:, None]
