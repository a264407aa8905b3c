"""Liger's Triton kernels for RMSNorm, SwiGLU and rotary embeddings in a transformers language model.

Liger's own `apply_liger_kernel_to_*` functions know each family by the names of one transformers version, and leave
out what a newer one has renamed. Here the layers are recognised by what they hold, and Liger's public functions put
behind them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from perl.types import UserError

logger = logging.getLogger(__name__)

_ROTARY = {
    "apply_rotary_pos_emb": "liger_rope",
    "apply_multimodal_rotary_pos_emb": "liger_qwen2vl_mrope",
}
"""Names of functions in transformers' model files, and of their replacements in Liger."""


def check_liger(device: torch.device) -> None:
    """See that Liger's kernels can run.

    Raises:
        UserError: liger-kernel is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "model.liger needs liger-kernel: pip install 'perl-rl[liger]' or liger-kernel, or leave it off"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"model.liger needs a GPU, this run is on {device.type}: leave it off")


def use_liger(language_model: nn.Module) -> list[str]:
    """Replace the forwards of norms and MLPs, and the rotary function of the attention's module.

    The rotary function is a module's, so other models of the same family in the process get it too.

    Args:
        language_model: a decoder of transformers, before LoRA.

    Returns:
        What was replaced, of `RMSNorm`, `SwiGLU`, `RoPE`.
    """
    from liger_kernel.transformers import functional

    replaced: set[str] = set()
    for module in language_model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, functional.liger_rms_norm, module)
            replaced.add("RMSNorm")
        elif _is_swiglu(module):
            module.forward = partial(_swiglu, functional.liger_swiglu, module)
            replaced.add("SwiGLU")
        elif type(module).__name__.endswith("Attention"):
            file = sys.modules[type(module).__module__]
            for name in _ROTARY.keys() & vars(file).keys():
                setattr(file, name, getattr(functional, _ROTARY[name]))
                replaced.add("RoPE")
    names = [name for name in ("RMSNorm", "SwiGLU", "RoPE") if name in replaced]
    logger.info("liger: %s of %s", ", ".join(names) or "nothing", type(language_model).__name__)
    return names


def _is_swiglu(module: Any) -> bool:
    """down(silu(gate(x)) * up(x)), as the MLPs of Llama and Qwen."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(hasattr(module, part) for part in parts) and "silu" in (
        type(module.act_fn).__name__.lower()
    )


def _rms_norm(kernel: Any, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    # "llama": the mean square in fp32, the rest in the dtype of the input, as transformers does. Not in place:
    # the gradient that arrives may be needed by others.
    return kernel(hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _swiglu(kernel: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(kernel(module.gate_proj(x), module.up_proj(x)))
