"""One way a kernel is launched, written down so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """A launch variant of one kernel.

    `signature` has Triton's type of every argument that is not a constant, in any order:
    "*bf16", "*fp32", "*i64", "i32", "i64", "fp32". `constexprs` has the value of every
    `tl.constexpr` argument, and None for a pointer that is not given. `divisible_by_16` names the
    arguments that a usual launch passes as multiples of 16 (pointers, strides, sizes): without
    them the compiler can not emit 128-bit accesses. `vector_loads` says that 128-bit global loads
    are expected in the machine code, `wgmma` that the warp-group matrix instruction is on sm_90.
    `max_registers` is the bound on the registers of a thread, if the launch sets one.
    `architectures` are the compute capabilities the variant is launched on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    vector_loads: bool = False
    wgmma: bool = False
    max_registers: int | None = None
    architectures: tuple[int, ...] = (80, 90, 100)
