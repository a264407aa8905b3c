"""Attention over packed rows: which implementation runs, and how transformers' models come to call it.

Each implementation has a file of its own: `flash_attention_2` and `varlen` (flash.py), `flex` (flex.py), `sdpa` (sdpa.py).
transformers' models take any attention that is registered by name, so no model code is patched:
`use_packed_attention` puts the chosen name into the configs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from perl.model.packed.flash import flash_attention_2, flash_attn_problem, varlen
from perl.model.packed.flex import flex
from perl.model.packed.layout import AttentionArgs, PackedLayout
from perl.model.packed.sdpa import sdpa
from perl.types import UserError

IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "flash_attention_2": flash_attention_2,
    "varlen": varlen,
    "flex": flex,
    "sdpa": sdpa,
}
"""Each computes softmax(scale q k^T) v over the keys that each query sees, called as

    f(query [1, heads, T, d], key [1, kv_heads, T, d], value [1, kv_heads, T, d], layout, how)

-> [1, T, heads, d], all of one dtype.
"""

WITHOUT_DROPOUT = ("varlen", "flex")
"""Implementations whose kernels have no dropout."""


def choose(wanted: str, device: torch.device, bfloat16: bool = True) -> tuple[str, str]:
    """The implementation that serves, and why: (a name in `IMPLEMENTATIONS`, one sentence).

    Args:
        wanted: `model.attention`.
        device: of the model.
        bfloat16: whether the forward runs in bfloat16, without which the flash kernels do not work.

    Raises:
        UserError: what is asked for cannot run here.
    """
    if wanted == "flex" and device.type != "cuda":
        return wanted, "asked for; slow without a GPU"
    if wanted != "auto":
        if problem := _obstacle(wanted, device, bfloat16):
            raise UserError(f"model.attention = {wanted} needs {problem}")
        return wanted, "asked for"
    if device.type != "cuda":
        return "sdpa", "no GPU"
    if not bfloat16:
        return "flex", "the flash kernels do not take float32"
    if not _obstacle("flash_attention_2", device, bfloat16):
        return "flash_attention_2", "flash-attn is installed and a GPU is there"
    if not _obstacle("varlen", device, bfloat16):
        return "varlen", f"PyTorch's own flash kernels; flash-attn: {flash_attn_problem()}"
    return "flex", "no flash kernels for this GPU"


def _obstacle(name: str, device: torch.device, bfloat16: bool) -> str:
    """What a flash kernel lacks here and what to do instead; empty if nothing, and for the others."""
    if name not in ("flash_attention_2", "varlen"):
        return ""
    if device.type != "cuda":
        return f"a CUDA device, this run is on {device.type}: use sdpa"
    if name == "flash_attention_2" and (problem := flash_attn_problem()):
        return f"flash-attn ({problem}): pip install flash-attn, or use varlen"
    if not bfloat16:
        return "model.dtype = bfloat16; change one of them"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 (Ampere) or newer: use flex"
    if name == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "a PyTorch that was built with flash attention: use flex"
    return ""


def use_packed_attention(language_model: nn.Module, tower: Iterable[nn.Module], name: str) -> None:
    """Make a transformers language model and its vision tower attend inside their sequences only.

    The language model must then be called with `packed_layout=PackedLayout(...)` and without a cache; a Qwen tower
    passes its own `cu_seq_lens_q`. Calls with neither (generation, towers that take a batch of images) are
    transformers' own SDPA with its mask.

    Args:
        language_model: a decoder with a `config` of its own.
        tower: the vision tower's modules with a `config` of their own; none: it keeps its attention.
        name: one of `IMPLEMENTATIONS`.
    """
    registered = _register(name)
    # set_attn_implementation() refuses names that it does not know.
    for module in (language_model, *tower):
        config: Any = module.config
        config._attn_implementation = registered


def attention_function(name: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function that transformers' attention layers call.

    It takes what they pass (see `_attend`) and is a graph break to torch.compile: decoder layers may be compiled, and
    no layout makes them compile anew.

    Args:
        name: one of `IMPLEMENTATIONS`.
    """
    return cast(Any, torch.compiler.disable(partial(_attend, name)))


def _attend(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    kv_cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer.

    Args:
        query: [1, heads, T, d]; key, value: [1, kv_heads, T, d].
        packed_layout: given to the language model.
        cu_seq_lens_q: int [S+1], from a vision tower: where its sequences start, ending at T.
        kv_cache: given to the language model; see `Policy.forward`.

    Returns:
        [1, T, heads, d], and None (no weights).

    Raises:
        ValueError: a packed row with a sliding window.
    """
    if cu_seq_lens_q is not None:
        layout = _tower_layout(cu_seq_lens_q)
    elif packed_layout is not None:
        layout = packed_layout
    else:
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
    if sliding_window is not None:
        raise ValueError(
            f"packed rows cannot be attended with a sliding window (here {sliding_window} tokens)"
        )
    causal = bool(module.is_causal if is_causal is None else is_causal)
    if kv_cache is not None:
        kv_cache.store(module.layer_idx, key, value)
    out = IMPLEMENTATIONS[name](query, key, value, layout, AttentionArgs(causal, scaling, dropout))
    # The same memory, but no view to autograd: code compiled after this would else be bound to the sizes of the padded
    # batch under it, and be compiled again for another layout.
    return torch.ops.aten._unsafe_view(out, out.shape), None


_layouts = WeakTensorKeyDictionary()


def _tower_layout(cu_seqlens: torch.Tensor) -> PackedLayout:
    """The layout of a tower's sequences, made by its first layer; the device is waited for once, not by every layer."""
    if cu_seqlens not in _layouts:
        _layouts[cu_seqlens] = PackedLayout.from_cu_seqlens(cu_seqlens)
    return _layouts[cu_seqlens]


@cache
def _register(name: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    # transformers hands towers whole packed rows, rather than one image after the other, only for names with "flash".
    registered = f"perl_flash_{name}"
    AttentionInterface.register(registered, attention_function(name))
    AttentionMaskInterface.register(registered, cast(Any, _padding_mask))
    return registered


def _padding_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """What masks a padded batch; nothing for a packed row, for which transformers would make a mask of [T, T] where it
    sees positions restart."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
