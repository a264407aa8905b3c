"""Attention over one packed row: our SDPA over pieces against SDPA with a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.proof import Checked, near
from perl.attention_sdpa import sdpa
from perl.layout import PackedLayout

HEADS, KV_HEADS, DIM = 8, 2, 64


class Piece(NamedTuple):
    """Tokens of a row, and those of the prefix they see besides: from where, and how many."""

    tokens: int
    prefix_start: int = 0
    prefix: int = 0


ROWS = {
    "even": [Piece(128)] * 8,
    "ragged": [Piece(n) for n in (300, 257, 190, 128, 77, 41, 30, 1)],
    # A prompt of 600 tokens and its 6 completions of 60, the first of which continues it.
    "shared": [Piece(660)] + [Piece(60, 0, 600)] * 5,
}
CASES = [(row, how) for row in ROWS for how in ("dense-mask", "sdpa")]
CASES.insert(-1, ("shared", "sdpa-repeated"))


@pytest.mark.parametrize(("row", "implementation"), CASES)
def test_attention(checked: Checked, device: torch.device, row: str, implementation: str) -> None:
    """Causal, grouped queries, forward and backward. Repeated: each completion after a prompt of its own."""
    pieces = ROWS[row]
    tokens = sum(piece.tokens for piece in pieces)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, tokens, DIM, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    q, k, v = inputs
    upstream = torch.randn(1, tokens, HEADS, DIM, generator=generator).to(device, dtype)
    # Made once, as all layers of a model share them.
    mask = dense_mask(pieces).to(device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(by_piece(exact, pieces), exact, upstream.double())
    prove = near(truth, with_gradients(dense(q, k, v, mask), inputs, upstream), dtype)

    if implementation == "dense-mask":
        run, proof = lambda: with_gradients(dense(q, k, v, mask), inputs, upstream), prove
    elif implementation == "sdpa":
        layout = layout_of(pieces, device)
        run, proof = lambda: with_gradients(ours(inputs, layout), inputs, upstream), prove
    else:
        run, proof = repeated(inputs, upstream, pieces, prove)
    checked(
        run,
        proof,
        group=f"attention, forward and backward, one {row} row of {tokens} tokens",
        # Per head and pair of tokens that see each other 2 products forward and 4 backward, of 2
        # DIM each; L tokens have L (L + 1) / 2 pairs among themselves.
        flops=6 * HEADS * DIM * sum(p.tokens * (p.tokens + 1 + 2 * p.prefix) for p in pieces),
    )


def ours(inputs: list[Tensor], layout: PackedLayout) -> Tensor:
    q, k, v = inputs
    return sdpa(q, k, v, layout, causal=True, scale=None, dropout=0.0)


def repeated(
    inputs: list[Tensor],
    upstream: Tensor,
    pieces: list[Piece],
    prove: Callable[[dict[str, Tensor]], None],
) -> tuple[Callable[[], dict[str, Tensor]], Callable[[dict[str, Tensor]], None]]:
    """The row with every prefix written out before its piece, and what proves its results, added up over copies."""
    device, tokens = upstream.device, upstream.shape[1]
    source, first, start = [], [], 0
    for piece in pieces:
        own = torch.arange(start, start + piece.tokens)
        prefix = torch.arange(piece.prefix_start, piece.prefix_start + piece.prefix)
        source += [prefix, own]
        first += [torch.zeros(piece.prefix), torch.ones(piece.tokens)]
        start += piece.tokens
    index, once = torch.cat(source).to(device), torch.cat(first).bool().to(device)
    copies = [x.detach().index_select(2, index).requires_grad_() for x in inputs]
    # The loss is taken of each token once.
    spread = upstream.index_select(1, index) * once[:, None, None]
    layout = layout_of([Piece(p.prefix + p.tokens) for p in pieces], device)

    def added_up(results: dict[str, Tensor]) -> None:
        sums = {"out": results["out"][:, once]}
        for name, x in results.items():
            if name != "out":
                total = torch.zeros(*x.shape[:2], tokens, x.shape[3], device=device)
                sums[name] = total.index_add(2, index, x.float()).to(x.dtype)
        prove(sums)

    return lambda: with_gradients(ours(copies, layout), copies, spread), added_up


def layout_of(pieces: list[Piece], device: torch.device) -> PackedLayout:
    lengths, starts, prefixes = torch.tensor(pieces).unbind(1)
    return PackedLayout(F.pad(lengths.cumsum(0), (1, 0)), starts, prefixes, device)


def dense_mask(pieces: list[Piece]) -> Tensor:
    """[T, T] bool: True where a token sees another: its prefix, itself and earlier ones of its piece."""
    mask = torch.block_diag(*(torch.ones(p.tokens, p.tokens).tril() for p in pieces)).bool()
    start = 0
    for piece in pieces:
        mask[
            start : start + piece.tokens, piece.prefix_start : piece.prefix_start + piece.prefix
        ] = True
        start += piece.tokens
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def by_piece(inputs: list[Tensor], pieces: list[Piece]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one piece after the other."""
    q, k, v = inputs
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    outputs, start = [], 0
    for piece in pieces:
        own = slice(start, start + piece.tokens)
        prefix = slice(piece.prefix_start, piece.prefix_start + piece.prefix)
        k_s, v_s = (torch.cat([x[:, :, prefix], x[:, :, own]], dim=2) for x in (k, v))
        scores = q[:, :, own] @ k_s.mT / DIM**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1 + piece.prefix)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(3) @ v_s)
        start += piece.tokens
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(out: Tensor, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    q, k, v = torch.autograd.grad(out, inputs, upstream)
    return {"out": out.detach(), "grad query": q, "grad key": k, "grad value": v}
