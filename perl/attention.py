"""Attention over packed rows: which implementation, and the one that needs nothing but PyTorch.

A packed row holds several sequences end to end, their boundaries in `cu_seqlens` [S+1]. transformers' models take
any attention registered by name, so no model code is patched: `use_packed_attention` puts the chosen name into the
language model's and the vision tower's config.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

SDPA_NAME = "perl_flash_sdpa"
"""transformers hands whole packed rows, rather than one image after the other, only to names with "flash"."""

Attention = Literal["auto", "sdpa", "flash_attention_2"]


def choose(wanted: Attention, device: torch.device, bfloat16: bool = True) -> tuple[str, str]:
    """The implementation that serves, and why: (`"sdpa"` | `"flash_attention_2"`, one sentence).

    Args:
        wanted: `model.attention`.
        device: of the model.
        bfloat16: whether the forward runs in bfloat16, without which flash-attn does not work.

    Raises:
        ValueError: `flash_attention_2` is asked for where it cannot run.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if wanted == "flash_attention_2":
        if not installed:
            raise ValueError(
                "model.attention = flash_attention_2 needs flash-attn: pip install flash-attn, or use sdpa"
            )
        if device.type != "cuda":
            raise ValueError(
                f"model.attention = flash_attention_2 needs a CUDA device, this run is on {device.type}: use sdpa"
            )
        if not bfloat16:
            raise ValueError(
                "model.attention = flash_attention_2 needs model.dtype = bfloat16; change one of them"
            )
        return wanted, "asked for"
    if wanted == "sdpa":
        return wanted, "asked for"
    if device.type == "cuda" and installed and bfloat16:
        return "flash_attention_2", "flash-attn is installed and a GPU is there"
    if device.type != "cuda":
        return "sdpa", "no GPU"
    return "sdpa", "float32" if installed else "flash-attn is not installed"


def use_packed_attention(model: nn.Module, name: str) -> None:
    """Make a transformers vision-language model attend inside segments only.

    Args:
        model: a model with `.model.language_model` and `.model.visual`.
        name: `"sdpa"` or `"flash_attention_2"`.
    """
    _register()
    implementation = SDPA_NAME if name == "sdpa" else name
    core: Any = model.model
    # The vision tower reads its own config object; set_attn_implementation() refuses names it does not know.
    core.language_model.config._attn_implementation = implementation
    core.visual.config._attn_implementation = implementation


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention inside each segment of a packed row.

    The segments are spread to a batch [S, longest], attended there, and gathered back: rows of one segment never
    meet another's. Without `cu_seq_lens_q` (generation with a cache) it is transformers' own SDPA.

    Args:
        query: [1, heads, T, d]; key, value: [1, kv_heads, T, d].
        cu_seq_lens_q: int [S+1], starts of the segments, ending at T.
        max_length_q: length of the longest segment.

    Returns:
        [1, T, heads, d] and None (no weights).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
        )
    causal = bool(module.is_causal if is_causal is None else is_causal)
    layout = _Layout(cu_seq_lens_q.long(), max_length_q)
    q, k, v = (layout.spread(x) for x in (query, key, value))
    mask = None if causal or layout.even else layout.valid[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return layout.gather(out), None


class _Layout:
    """Where the tokens of S segments stand in a batch [S, longest], and back."""

    def __init__(self, cu_seqlens: torch.Tensor, longest: int | None) -> None:
        lengths = cu_seqlens.diff()
        self.segments = len(lengths)
        self.longest = int(longest) if longest is not None else int(lengths.max())
        self.tokens = int(cu_seqlens[-1]) if cu_seqlens.device.type == "cpu" else -1
        self.even = self.tokens == self.segments * self.longest
        if not self.even:
            column = torch.arange(self.longest, device=cu_seqlens.device)
            self.valid = column < lengths[:, None]
            # Columns past a segment's end repeat its last token: never read by a causal query, masked otherwise.
            last = (cu_seqlens[1:] - 1).clamp(min=0)
            self.source = torch.minimum(cu_seqlens[:-1, None] + column, last[:, None]).flatten()

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[1, h, T, d] -> [S, h, longest, d]"""
        _, heads, tokens, dim = x.shape
        rows = x[0].transpose(0, 1).reshape(tokens, heads * dim)
        if not self.even:
            rows = rows.index_select(0, self.source)
        return rows.view(self.segments, self.longest, heads, dim).transpose(1, 2)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[S, h, longest, d] -> [1, T, h, d]"""
        rows = x.transpose(1, 2)
        if self.even:
            return rows.reshape(1, self.segments * self.longest, *rows.shape[2:])
        flat = self.valid.flatten().nonzero().squeeze(1)
        return (
            rows.reshape(self.segments * self.longest, -1)
            .index_select(0, flat)
            .view(1, len(flat), *rows.shape[2:])
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SDPA_NAME, packed_sdpa)
    # Packed calls pass no mask and no text positions, so this returns None for them and a dense mask for padded ones.
    AttentionMaskInterface.register(SDPA_NAME, sdpa_mask)
