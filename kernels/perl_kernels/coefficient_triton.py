"""The functions of `coefficient.py` as Triton device functions, from the same source."""

from __future__ import annotations

import types
from typing import Any

import triton
import triton.language as tl

from . import coefficient


def _compiled(module: types.ModuleType) -> dict[str, Any]:
    """The functions of `module` for Triton: `tl` is Triton's, they call each other's compiled form,
    and module constants are known when compiling."""
    namespace: dict[str, Any] = {"tl": tl}
    for name, value in vars(module).items():
        if isinstance(value, float):
            namespace[name] = tl.constexpr(value)
        elif isinstance(value, type) and issubclass(value, tuple):
            namespace[name] = value
        elif isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            copy = types.FunctionType(value.__code__, namespace, name)
            copy.__module__ = __name__
            copy.__qualname__ = name
            namespace[name] = triton.jit(copy)
    return namespace


_functions = _compiled(coefficient)

correction_weight = _functions["correction_weight"]
bounded = _functions["bounded"]
pessimistic = _functions["pessimistic"]
ratio_and_slope = _functions["ratio_and_slope"]
token_term = _functions["token_term"]
vespo_log = _functions["vespo_log"]
vespo_weight = _functions["vespo_weight"]
