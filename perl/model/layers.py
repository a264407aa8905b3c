"""Faster layers: compiled decoder layers without a graph per step, Liger's Triton kernels, patches by a matrix product."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from perl.failures import install_command
from perl.types import UserError

logger = logging.getLogger(__name__)

_ROTARY = {
    "apply_rotary_pos_emb": "liger_rope",
    "apply_multimodal_rotary_pos_emb": "liger_qwen2vl_mrope",
}
"""Names of functions in transformers' model files, and of their replacements in Liger."""

LIGER, COMPILED, STOCK = "Liger's kernels", "compiled", "transformers' own"
Choice = Literal[True, False, "auto"]


def choose_layers(liger: Choice, compiled: Choice, device: torch.device) -> tuple[bool, bool, str]:
    """Which faster layers serve: Liger's kernels or not, compiled layers or not, and what and why in words.

    `auto` is for CUDA: Liger's kernels where they can run, for they need no minutes of compilation and are the same in
    generation and training, else compiled layers. Which of the two is faster on a GPU has not been measured.

    Args:
        liger: `model.liger`.
        compiled: `model.compile`.
        device: of the model.

    Raises:
        UserError: what is asked for cannot run here.
    """
    if liger is True:
        check_liger(device)
    if compiled is True:
        check_compiler()
    asked = [name for name, on in ((LIGER, liger), (COMPILED, compiled)) if on is True]
    if asked:
        return liger is True, compiled is True, f"{' and '.join(asked)} (asked for)"
    if not (liger or compiled):
        return False, False, f"{STOCK} (model.liger and model.compile are off)"
    if device.type != "cuda":
        return False, False, f"{STOCK} (no GPU)"
    if not _compiler("CC", "gcc", "clang"):  # Compiled layers run Triton's kernels too.
        return False, False, f"{STOCK} (there is no C compiler for Triton)"
    installed = importlib.util.find_spec("liger_kernel") is not None
    if liger and installed:
        return True, False, f"{LIGER} (liger-kernel is installed and a GPU is there)"
    no_liger = "liger-kernel is not installed" if liger else "model.liger is off"
    if compiled and _compiler(*_CXX):
        return False, True, f"{COMPILED} ({no_liger})"
    no_compiled = "there is no C++ compiler" if compiled else "model.compile is off"
    return False, False, f"{STOCK} ({no_liger}; {no_compiled})"


_CXX = ("CXX", "g++", "clang++", "c++")


def _compiler(variable: str, *names: str) -> bool:
    return any(name and shutil.which(name) for name in (os.environ.get(variable), *names))


def check_compiler() -> None:
    """See that torch.compile can build its code.

    Raises:
        UserError: there is no C++ compiler.
    """
    if not _compiler(*_CXX):
        raise UserError(
            "model.compile needs a C++ compiler (g++ or clang++ in the PATH): install one, or leave it off"
        )


def compile_layers(language_model: nn.Module, backend: Any = "inductor") -> None:
    """Compile the forward of each decoder layer of a transformers language model, in place.

    All layers run one compiled code: the length of the row is a symbol in it, and attention is a break in the graph
    (see `perl.model.packed.attention.attention_function`), so that neither a new length nor a new layout compiles anew.
    Checkpoints and names of parameters stay as they are.

    Args:
        language_model: with `layers`.
        backend: of torch.compile.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: Any = language_model.layers
    forward = type(layers[0]).forward
    # Older transformers checkpoint in `__call__` instead, around the `forward` that is compiled.
    inside = "__call__" not in vars(GradientCheckpointingLayer)
    logger.info("compiling decoder layers: the first steps take longer")
    compiled = torch.compile(
        forward.__wrapped__ if inside else forward, dynamic=True, backend=backend
    )
    # torch.compile skips a function that checkpoints code with a graph break: the checkpoint goes around it.
    run = partial(_run_checkpointed, compiled) if inside else compiled
    for layer in layers:
        layer.forward = partial(run, layer)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is compiled as it is written: generation grows its cache token by token, which would compile anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _run_checkpointed(compiled: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)


def checkpoint_layers(model: Any, share: float) -> None:
    """Keep no activations of some layers: they are computed again in the backward.

    Args:
        model: of transformers.
        share: of the layers of each stack (decoder, vision tower), rounded to a whole number; they lie evenly spread.

    Raises:
        UserError: the model checkpoints all of its layers or none.
    """
    # transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and _checkpointed(m)]
    if share < 1 and not stacks:
        raise UserError(
            f"model.gradient_checkpointing = {share}: {type(model).__name__} checkpoints all of its layers or none; "
            "take 0 or 1"
        )
    for stack in stacks:
        layers = len(stack)
        wanted = int(share * layers + 0.5)
        for number, layer in enumerate(cast(Any, stack)):
            before, until = number * wanted // layers, (number + 1) * wanted // layers
            layer.gradient_checkpointing = until > before


def _checkpointed(stack: nn.ModuleList) -> bool:
    return all(hasattr(layer, "gradient_checkpointing") for layer in stack)


def check_liger(device: torch.device) -> None:
    """See that Liger's kernels can run.

    Raises:
        UserError: liger-kernel is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            f"model.liger needs liger-kernel: {install_command('liger')}, or leave it off"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"model.liger needs a GPU, this run is on {device.type}: leave it off")


def use_liger(language_model: nn.Module) -> list[str]:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into a language model.

    Liger's own `apply_liger_kernel_to_*` know each family by the names of one transformers version, and leave out what
    a newer one has renamed. Here layers are recognised by what they hold, and Liger's public functions put behind them.
    The rotary function is one of a Python module, so other models of the family in the process get it too.

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


def use_linear_patches(tower: Iterable[nn.Module]) -> None:
    """Let the patch embedding of a Qwen vision tower run as a matrix product, in place.

    It is a Conv3d whose kernel is as large as the patch it is given: a product with its weight as [out, in]. In bfloat16
    cuDNN takes seconds for the convolution or has no backward. The parameter keeps its shape and its name.

    Args:
        tower: the modules of a vision tower.
    """
    for part in tower:
        for module in part.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size == module.stride:
                cast(Any, module).forward = partial(_linear_patch, module)


def _linear_patch(module: Any, patches: torch.Tensor) -> torch.Tensor:
    """[n, channels, *kernel] -> [n, out, 1, 1, 1]"""
    rows = F.linear(patches.flatten(1), module.weight.flatten(1), module.bias)
    return rows[:, :, None, None, None]
