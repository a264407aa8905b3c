"""Flash kernels over packed rows: flash-attn's, and those that PyTorch brings.

Both take sequences whose queries and keys differ in number. Queries stay where they are. The keys of a sequence are
those of its prefix and then its own, gathered only if any sequence has a prefix; causal attention aligned to the last
query and the last key of each sequence then lets a query see all of the prefix, and its own sequence up to itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from perl.model.packed.gather import gather_rows
from perl.model.packed.layout import AttentionArgs, PackedLayout


def flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, how: AttentionArgs
) -> Tensor:
    """`flash_attn_varlen_func` of flash-attn: it aligns to the last query and key, and its backward can be
    deterministic, which it is where PyTorch's is to be. On CUDA, in bfloat16 or float16."""
    out = _flash_attn_kernel()(
        *_rows(query, key, value, layout),
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k,
        dropout_p=how.dropout,
        softmax_scale=how.scale,
        causal=how.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[None]


def varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, how: AttentionArgs
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, which has no dropout. On CUDA, in bfloat16 or float16.

    It aligns to the last query and key as flash-attn does: the window (-1, 0) becomes `is_causal`, `mha_varlen_fwd` in
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp sets `window_size_right = 0`, and the kernel, which
    is flash-attn's, masks columns from `row + 1 + seqlen_k - seqlen_q + window_size_right` on (`apply_mask` in mask.h). Its
    backward is deterministic where PyTorch's is to be (`_flash_attention_backward` in cuda/attention_backward.cu).
    """
    from torch.nn.attention import varlen as torch_varlen

    kernel = torch_varlen.varlen_attn
    q, k, v = _rows(query, key, value, layout)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        # PyTorch 2.11 wants as many key heads as query heads.
        if "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Any = kernel(
        q,
        k,
        v,
        cu_seq_q=layout.cu_seqlens_q,
        cu_seq_k=layout.cu_seqlens_k,
        max_q=layout.max_seqlen_q,
        max_k=layout.max_seqlen_k,
        scale=how.scale,
        window_size=(-1, 0 if how.causal else -1),
        **options,
    )
    return out[None]


@cache
def flash_attn_problem() -> str:
    """Why flash-attn cannot be used, as far as an import tells: another package of that name, a build for another
    PyTorch, a version whose decoding gives no log-sum-exp. Empty if it can."""
    try:
        module = importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:  # A build for another PyTorch fails in many ways.
        return f"its import fails: {str(error).strip().partition(chr(10))[0]}"
    if not hasattr(module, "flash_attn_varlen_func"):
        return "what is installed under that name has no flash_attn_varlen_func"
    version = getattr(module, "__version__", "0")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 6):
        return f"version {version} is older than 2.6"
    return ""


def _flash_attn_kernel() -> Callable[..., Any]:
    return importlib.import_module("flash_attn").flash_attn_varlen_func


def _rows(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """[1, h, T, d] -> queries [T, h, d], keys and values [K, h, d]"""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.shared:
        k, v = (gather_rows(x, layout.key_index) for x in (k, v))
    return q, k, v
