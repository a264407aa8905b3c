"""Attention over one packed row: each implementation of `perl.model.packed.attention` against SDPA as PyTorch has it."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.contest import Contest, Provider, Run, Unavailable, Work
from benchmarks.harness.proof import Proven, Results
from perl.model.packed.attention import IMPLEMENTATIONS, choose
from perl.model.packed.layout import AttentionArgs, PackedLayout
from perl.types import UserError


class Piece(NamedTuple):
    """Tokens of a row, and those of the prefix they see besides: from where, and how many."""

    tokens: int
    prefix_start: int = 0
    prefix: int = 0


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


def shared(prompt: int, completion: int, completions: int) -> list[Piece]:
    """A prompt and its completions, the first of which continues it."""
    return [Piece(prompt + completion)] + [Piece(completion, 0, prompt)] * (completions - 1)


SMALL = {
    "8 equal pieces": [Piece(128)] * 8,
    "8 ragged pieces": [Piece(n) for n in (300, 257, 190, 128, 77, 41, 30, 1)],
    "6 completions of a shared prompt": shared(600, 60, 6),
}
# 4 to 8 images of 330 tokens before each of 6 completions of 512 tokens.
LARGE = {
    "16 equal pieces": [Piece(1024)] * 16,
    "16 ragged pieces": [Piece(n) for n in range(64, 64 + 16 * 128, 128)],
    "6 completions of a shared prompt": shared(2700, 512, 6),
}


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Heads of Qwen2.5-VL-3B on a GPU, fewer and smaller ones on a CPU."""
    rows, heads = (LARGE, Heads(16, 2, 128)) if cuda else (SMALL, Heads(8, 2, 64))
    return [_contest(name, pieces, heads) for name, pieces in rows.items()]


def _contest(name: str, pieces: list[Piece], heads: Heads) -> Contest:
    tokens = sum(piece.tokens for piece in pieces)
    return Contest(
        "Packed attention, forward and backward",
        f"{name}, {tokens} tokens",
        {"tokens": tokens, "pieces": len(pieces), **heads._asdict()},
        partial(PackedRow, pieces, heads),
        [
            *[_ours(implementation) for implementation in IMPLEMENTATIONS],
            *(
                [Provider("PeRL, prompt repeated", _repeated)]
                if any(piece.prefix for piece in pieces)
                else []
            ),
            Provider("PyTorch, SDPA with a dense mask", _dense, "torch"),
            Provider("PyTorch, SDPA piece by piece", _by_piece, "torch"),
        ],
        # Per head and pair of tokens that see each other 2 products forward and 4 backward, of 2
        # operations an element each; L tokens have L (L + 1) / 2 pairs among themselves.
        Work(
            6
            * heads.queries
            * heads.size
            * sum(p.tokens * (p.tokens + 1 + 2 * p.prefix) for p in pieces)
        ),
    )


class PackedRow(Proven):
    """Queries, keys and values of one row, causal, with grouped queries; bfloat16 on a GPU, float32 on a CPU."""

    def __init__(self, pieces: list[Piece], heads: Heads, device: torch.device) -> None:
        self.pieces, self.heads = pieces, heads
        self.tokens = sum(piece.tokens for piece in pieces)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.inputs = [
            normal(1, n, self.tokens, heads.size).requires_grad_()
            for n in (heads.queries, heads.keys, heads.keys)
        ]
        self.upstream = normal(1, self.tokens, heads.queries, heads.size)

    @property
    def device(self) -> torch.device:
        return self.upstream.device

    @cached_property
    def mask(self) -> Tensor:
        """[T, T] bool: True where a token sees another: its prefix, itself and earlier ones of its piece."""
        blocks = (torch.ones(p.tokens, p.tokens).tril() for p in self.pieces)
        mask, start = torch.block_diag(*blocks).bool(), 0
        for p in self.pieces:
            mask[start : start + p.tokens, p.prefix_start : p.prefix_start + p.prefix] = True
            start += p.tokens
        return mask.to(self.device)

    def results(self, out: Tensor, inputs: list[Tensor], upstream: Tensor) -> Results:
        q, k, v = torch.autograd.grad(out, inputs, upstream)
        return {"out": out.detach(), "grad query": q, "grad key": k, "grad value": v}

    @property
    def dtype(self) -> torch.dtype:
        return self.upstream.dtype

    def expected(self, dtype: torch.dtype) -> Results:
        inputs = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        return self.results(_softmax(inputs, self), inputs, self.upstream.to(dtype))


def _pieces_of(inputs: list[Tensor], p: PackedRow) -> Any:
    """Of each piece its queries, and the keys and values that it sees."""
    start = 0
    q, k, v = inputs
    for piece in p.pieces:
        own = slice(start, start + piece.tokens)
        prefix = slice(piece.prefix_start, piece.prefix_start + piece.prefix)
        seen = [
            torch.cat([x[:, :, prefix], x[:, :, own]], 2) if piece.prefix else x[:, :, own]
            for x in (k, v)
        ]
        yield piece, q[:, :, own], *seen
        start += piece.tokens


def _softmax(inputs: list[Tensor], p: PackedRow) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one piece after the other."""
    outputs, times = [], p.heads.queries // p.heads.keys
    for piece, q, k, v in _pieces_of(inputs, p):
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        scores = q @ k.mT / p.heads.size**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1 + piece.prefix)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(3) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _ours(name: str) -> Provider:
    def prepare(p: PackedRow) -> Run:
        bfloat16 = p.dtype == torch.bfloat16
        if name == "flex" and not bfloat16:
            raise Unavailable("without a GPU it is SDPA with a dense mask")
        try:
            choose(name, p.device, bfloat16)
        except UserError as error:
            raise Unavailable(str(error)) from error
        layout = _layout(p.pieces, p.device)
        return Run(lambda: p.results(_packed(name, p.inputs, layout), p.inputs, p.upstream))

    return Provider(f"PeRL, {name}", prepare)


def _packed(name: str, inputs: list[Tensor], layout: PackedLayout) -> Tensor:
    q, k, v = inputs
    return IMPLEMENTATIONS[name](q, k, v, layout, AttentionArgs())


def _layout(pieces: list[Piece], device: torch.device) -> PackedLayout:
    lengths, starts, prefixes = torch.tensor(pieces).unbind(1)
    return PackedLayout(F.pad(lengths.cumsum(0), (1, 0)), starts, prefixes, device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's, causal without a mask. With one, CUDA's quick kernels want as many key heads as query heads, so those are
    repeated, as transformers does."""
    if mask is not None and q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _dense(p: PackedRow) -> Run:
    def call() -> Results:
        out = _sdpa(*p.inputs, p.mask)
        return p.results(out.transpose(1, 2), p.inputs, p.upstream)

    return Run(call)


def _by_piece(p: PackedRow) -> Run:
    """A loop with PyTorch's own causal kernels; a piece with a prefix needs a mask, aligned to the last key."""
    masks = {
        piece: torch.ones(
            piece.tokens, piece.prefix + piece.tokens, dtype=torch.bool, device=p.device
        ).tril(piece.prefix)
        for piece in p.pieces
        if piece.prefix
    }

    def call() -> Results:
        outputs = [_sdpa(q, k, v, masks.get(piece)) for piece, q, k, v in _pieces_of(p.inputs, p)]
        return p.results(torch.cat(outputs, 2).transpose(1, 2), p.inputs, p.upstream)

    return Run(call)


def _repeated(p: PackedRow) -> Run:
    """The row with every prefix written out before its piece, as without shared prompts."""
    source, first, start = [], [], 0
    for piece in p.pieces:
        prefix = torch.arange(piece.prefix_start, piece.prefix_start + piece.prefix)
        source += [prefix, torch.arange(start, start + piece.tokens)]
        first += [torch.zeros(piece.prefix), torch.ones(piece.tokens)]
        start += piece.tokens
    index, once = torch.cat(source).to(p.device), torch.cat(first).bool().to(p.device)
    copies = [x.detach().index_select(2, index).requires_grad_() for x in p.inputs]
    # The loss is taken of each token once.
    spread = p.upstream.index_select(1, index) * once[:, None, None]
    layout = _layout([Piece(piece.prefix + piece.tokens) for piece in p.pieces], p.device)
    name, _ = choose("auto", p.device, p.dtype == torch.bfloat16)

    def added_up(results: Results) -> Results:
        sums = {"out": results["out"][:, once]}
        for key, x in results.items():
            if key != "out":
                total = torch.zeros(*x.shape[:2], p.tokens, x.shape[3], device=p.device)
                sums[key] = total.index_add(2, index, x.float()).to(x.dtype)
        return sums

    return Run(lambda: p.results(_packed(name, copies, layout), copies, spread), read=added_up)
