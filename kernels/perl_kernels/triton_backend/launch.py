"""How the kernels are declared and what their compile cases have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton

from .compile_case import CompileCase

_COUNTS = [
    "n_rows",
    "n_tokens",
    "n_completions",
    "n_groups",
    "n_rewards",
    "n_rollouts",
    "n_values",
    "n_metrics",
]
_VECTORS = {"tile_ptr", "out_ptr", "bias_ptr"}


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest of those that `device` is not older than; 90 without a GPU."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return 80 if major < 9 else 90 if major == 9 else 100


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel that is not compiled anew for another number of rows, tokens, completions or groups,
    nor for tensors that start elsewhere: only logits and bias are read in vectors, so that only
    their addresses and strides matter."""
    pointers = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    return triton.jit(
        do_not_specialize=_COUNTS,
        do_not_specialize_on_alignment=[name for name in pointers if name not in _VECTORS],
    )(function)


def compile_case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int,
    vector_loads: bool = False,
    max_registers: int | None = None,
    architectures: tuple[int, ...] = (80, 90, 100),
) -> CompileCase:
    """A case whose arguments are, unless `types` or `constants` say otherwise, pointers to fp32
    (`_ptr`), integers (`n_`, `_stride`) and fp32 numbers."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in types:
            signature[argument] = types[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32"
        elif argument.startswith("n_") or argument.endswith("_stride"):
            signature[argument] = "i32"
        else:
            signature[argument] = "fp32"
    aligned = {*_VECTORS, "tile_stride", "out_stride", "n_columns"}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible_by_16=tuple(argument for argument in signature if argument in aligned),
        num_warps=num_warps,
        vector_loads=vector_loads,
        max_registers=max_registers,
        architectures=architectures,
    )
