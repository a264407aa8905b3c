"""Attention of single queries to cached keys, with the log-sum-exp that merges it with attention to other keys.

    softmax over both = lerp(own, prompt, sigmoid(lse_prompt - lse_own))

as the weights of a part are exp(score - lse of both) = exp(score - lse of the part) * exp(lse of the part - lse of both).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perl.model.packed.flash import flash_attn_problem


@dataclass(slots=True)
class Span:
    """How many of the cached tokens of each batch element are there; at least one.

    `lengths` int32 [b] on the device; `shortest` and `longest` of them, or bounds, known on the host.
    """

    lengths: Tensor
    shortest: int
    longest: int
    _made: dict[Any, Tensor] = field(default_factory=dict)
    """For the first layer, kept for the others."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[b, 1, 1, longest], -inf where there is no token; None: all are there."""
        if dtype not in self._made and self.shortest < self.longest:
            column = torch.arange(self.longest, device=self.lengths.device)
            gone = column >= self.lengths.view(-1, 1, 1, 1)
            self._made[dtype] = torch.zeros_like(gone, dtype=dtype).masked_fill_(gone, -torch.inf)
        return self._made.get(dtype)

    def starts(self, tokens: int) -> Tensor:
        """int32 [b + 1]: where each of b runs of so many tokens starts, and where the last one ends."""
        if tokens not in self._made:
            end = len(self.lengths) * tokens + 1
            device = self.lengths.device
            self._made[tokens] = torch.arange(0, end, tokens, dtype=torch.int32, device=device)
        return self._made[tokens]


Attend = Callable[[Tensor, Tensor, Tensor, Span, float], tuple[Tensor, Tensor]]
"""attend(query [b, h, m, d], key [b, T, h, d], value [b, T, h, d], span, scale) -> softmax(scale q k^T) v over the span
[b, h, m, d], and the log-sum-exp of its scores [b, h, m], in fp32 at least. Any strides."""


def choose(device: torch.device, dtype: torch.dtype) -> Attend:
    """The fastest that serves here. The flash kernels read no key beyond a span, and wait for nothing."""
    if device.type == "cpu":
        return on_cpu
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        if not flash_attn_problem():
            return flash_attention_2
        if varlen_serves():
            return varlen
    return plain


def flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn's decoding kernel, which reads a key once for all queries of its head."""
    kernel = importlib.import_module("flash_attn").flash_attn_with_kvcache
    out, lse = kernel(
        query.flatten(1, 2).unsqueeze(1),
        key,
        value,
        cache_seqlens=span.lengths,
        softmax_scale=scale,
        return_softmax_lse=True,
    )
    return out.view(query.shape), lse.view(query.shape[:3])


def varlen(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernels: a batch element is a sequence of one query with h * m heads."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    tokens = key.shape[1]
    out, lse = varlen_attn(
        query.flatten(1, 2),
        key.flatten(0, 1),
        value.flatten(0, 1),
        span.starts(1),
        span.starts(tokens),
        1,
        tokens,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        enable_gqa=True,
        seqused_k=span.lengths,
    )
    return out.view(query.shape), lse.t().unflatten(1, query.shape[1:3])


def varlen_serves() -> bool:
    """Whether this PyTorch's kernels take spans and fewer key heads; 2.11 lacks both."""
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa", "seqused_k"} <= inspect.signature(varlen_attn).parameters.keys()


def on_cpu(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel for CPUs, in one pass over the keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key[:, : span.longest].transpose(1, 2),
        value[:, : span.longest].transpose(1, 2),
        attn_mask=span.mask(query.dtype),
        scale=scale,
    )


def plain(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """On every device, in every dtype."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (x[:, : span.longest].transpose(1, 2).to(wide) for x in (key, value))
    scores = query.to(wide) @ key.transpose(2, 3) * scale
    if (mask := span.mask(wide)) is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value).to(query.dtype), lse
