"""Which implementation serves a call, and how much of it is checked.

`backend="auto"` takes the fastest one that can; any other value is taken at its word or refused.
`PERL_BACKEND` sets the default of the process. With `PERL_CHECKS=1` the values of GPU tensors are
checked like those of CPU tensors, at the cost of a synchronisation.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "native", "torch"]

_logger = logging.getLogger("perl_kernels")
_ABSENT = "this build of perl_kernels has no {} backend"


def available_backends() -> dict[str, tuple[bool, str]]:
    """For each backend whether it can be used here, and why or why not."""
    return {
        "triton": (False, _ABSENT.format("triton")),
        "native": (False, _ABSENT.format("native")),
        "torch": (True, "plain PyTorch, on every device"),
    }


def select_backend(backend: str) -> str:
    """The backend for a call: `backend`, or what PERL_BACKEND says if that is `auto`.

    Raises:
        ValueError: no backend of that name, or one that cannot be used here.
    """
    known = get_args(Backend)
    if backend not in known:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(known)}")
    if backend == "auto":
        backend = os.environ.get("PERL_BACKEND") or "auto"
        if backend not in known:
            raise ValueError(f"PERL_BACKEND is {backend!r}, must be one of {', '.join(known)}")
    if backend == "auto":
        return _automatic()
    available, reason = available_backends()[backend]
    if not available:
        raise ValueError(f"backend {backend!r} is not available: {reason}")
    return backend


def values_visible(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at for a check."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("PERL_CHECKS") == "1"


def _automatic() -> str:
    chosen = next(name for name, (available, _) in available_backends().items() if available)
    if not torch.compiler.is_compiling():
        _announce(chosen)
    return chosen


@functools.cache
def _announce(chosen: str) -> None:
    backends = available_backends()
    passed = "; ".join(reason for available, reason in backends.values() if not available)
    _logger.info("backend auto: chose %s (%s); %s", chosen, backends[chosen][1], passed)
