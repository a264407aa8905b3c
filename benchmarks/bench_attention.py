"""Attention over one packed row: packed_sdpa against SDPA with a dense block-diagonal mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.proof import Checked, near
from perl.attention import packed_sdpa

HEADS, KV_HEADS, DIM = 8, 2, 64
# Segments of one row of 1024 tokens.
ROWS = {"even": [128] * 8, "ragged": [300, 257, 190, 128, 77, 41, 30, 1]}


@pytest.mark.parametrize("implementation", ["dense-mask", "packed_sdpa"])
@pytest.mark.parametrize("row", ROWS)
def test_attention(checked: Checked, device: torch.device, row: str, implementation: str) -> None:
    """Causal, grouped queries, forward and backward."""
    lengths = ROWS[row]
    tokens = sum(lengths)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = inputs = [
        torch.randn(1, heads, tokens, DIM, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    upstream = torch.randn(1, tokens, HEADS, DIM, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    # Made once, as all layers of a model share it.
    mask = block_diagonal(lengths).to(device)

    def run() -> dict[str, Tensor]:
        if implementation == "packed_sdpa":
            out, _ = packed_sdpa(
                nn.Identity(),
                q,
                k,
                v,
                None,
                is_causal=True,
                cu_seq_lens_q=cu_seqlens,
                max_length_q=max(lengths),
            )
        else:
            out = dense(q, k, v, mask)
        return with_gradients(out, inputs, upstream)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(by_segment(exact, lengths), exact, upstream.double())
    plain = with_gradients(dense(q, k, v, mask), inputs, upstream)
    checked(
        run,
        near(truth, plain, dtype),
        group=f"attention, forward and backward, one {row} row of {tokens} tokens",
        # Per head and pair of tokens that see each other 2 products forward and 4 backward, of 2
        # DIM each; a segment of L tokens has L (L + 1) / 2 pairs.
        flops=6 * HEADS * DIM * sum(n * (n + 1) for n in lengths),
    )


def block_diagonal(lengths: list[int]) -> Tensor:
    """[T, T] bool: True where a token sees another, itself and earlier ones of its segment."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def by_segment(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one segment after the other."""
    outputs = []
    for q_s, k_s, v_s in zip(*(x.split(lengths, dim=2) for x in inputs), strict=True):
        k_s, v_s = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k_s, v_s))
        scores = q_s @ k_s.transpose(2, 3) / DIM**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(3) @ v_s)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(out: Tensor, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    q, k, v = torch.autograd.grad(out, inputs, upstream)
    return {"out": out.detach(), "grad query": q, "grad key": k, "grad value": v}
