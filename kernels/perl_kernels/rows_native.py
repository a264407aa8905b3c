"""Rows of logits in C++ (`kernels/csrc`), for fp32 and bf16 tiles on a CPU.

The same three functions as `rows_torch`, which has their mathematics. A row is worked on while it is
in the cache: one reading from memory for the statistics, and for the loss one writing more, in the
threads of PyTorch (`torch.set_num_threads`). Sums are in fp64 over blocks of up to 2048 columns. The
code for AVX-512, for AVX2 with FMA or for any processor is chosen on the first call;
`PERL_NATIVE_ISA=avx512 | avx2 | portable` in the environment chooses another. `PERL_NATIVE_LIBRARY`
names a library to load in place of the installed one.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import coefficient
from .objective import PolicyLoss, coefficient_arguments
from .values import Coefficients, LossInputs, Prepared, RowStats, Scoring

DTYPES = (torch.float32, torch.bfloat16)


def available() -> tuple[bool, str]:
    """Whether the library can be used, and what it is or why not; loads it."""
    given = os.environ.get("PERL_NATIVE_LIBRARY")
    folders = map(Path, sys.modules[__package__ or ""].__path__)
    found = [path for path in (folder / "_C.so" for folder in folders) if path.exists()]
    if not found and not given:
        return False, (
            "the native rows are not built: no C++ compiler or no torch was there when perl_kernels was "
            "installed (install it again, now that torch is there; --verbose says why)"
        )
    library = given or str(found[0])
    try:
        # Twice would end the process; another import of this module finds the operators there.
        if not hasattr(torch.ops.perl_native, "source"):
            torch.ops.load_library(library)
        mathematics, chosen = (
            torch.ops.perl_native.source(),
            torch.ops.perl_native.instruction_set(),
        )
    except (OSError, RuntimeError) as error:
        return False, f"{library} cannot be used: {error}"
    if mathematics != zlib.crc32(Path(coefficient.__file__).read_bytes()):
        return False, f"{library} was built from another coefficient.py; install perl_kernels again"
    return True, f"C++ for CPUs, fp32 and bf16, with {chosen}"


def row_stats(tile: Tensor, scoring: Scoring) -> RowStats:
    stats = RowStats(*(_per_row(tile) for _ in range(4)))
    torch.ops.perl_native.row_stats(*_scored(tile, scoring), list(stats))
    return stats


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    place = _place(out)
    numbers = (stats.shift, stats.log_sum, stats.entropy, *coefficients)
    torch.ops.perl_native.row_gradient(*_scored(tile, scoring), *map(_vector, numbers), place)
    if place is not out:
        out.copy_(place)


def row_loss(
    tile: Tensor,
    scoring: Scoring,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    out: Tensor | None,
) -> tuple[RowStats, Coefficients]:
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    rollout = None if loss.correction is None else inputs.rollout
    of_tokens = (prepared.scale, prepared.advantages, inputs.old, inputs.ref, rollout)
    stats = RowStats(*(_per_row(tile) for _ in range(4)))
    found = Coefficients(_per_row(tile), _per_row(tile) if axes.has_entropy else None)
    place = None if out is None else _place(out)
    torch.ops.perl_native.row_loss(
        *_scored(tile, scoring),
        [str(axis) for axis in axes],
        list(numbers),
        *map(_vector, of_tokens),
        list(stats),
        *found,
        place,
    )
    if out is not None and place is not None and place is not out:
        out.copy_(place)
    return stats, found


def _scored(tile: Tensor, scoring: Scoring) -> tuple[Any, ...]:
    tau = scoring.temperature
    per_row = tau if isinstance(tau, Tensor) else None
    return (
        tile if tile.stride(1) == 1 else tile.contiguous(),
        scoring.targets.to(torch.int64).contiguous(),
        _vector(scoring.bias),
        _vector(per_row),
        1.0 if isinstance(tau, Tensor) else float(tau),
        float(scoring.softcap or 0.0),
    )


def _per_row(tile: Tensor) -> Tensor:
    return tile.new_empty(tile.shape[0], dtype=torch.float32)


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _place(out: Tensor) -> Tensor:
    """`out`, or a tensor like it whose rows are in one piece."""
    return out if out.stride(1) == 1 else out.new_empty(out.shape)
