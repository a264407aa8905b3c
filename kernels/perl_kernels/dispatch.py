"""Which implementation serves a call, and how much of it is checked.

`backend="triton"` (CUDA devices from sm_80 on, and any device with TRITON_INTERPRET=1; fp32, fp16 and
bf16) and `backend="torch"` (everything) are taken at their word or refused, `"native"` is always
refused: no build has it yet. `"auto"` takes the fastest one that can serve the tensors of the call,
and says so once to the logger `perl_kernels`, at level INFO. `PERL_BACKEND` sets the default of the
process. With `PERL_CHECKS=1` the values of GPU tensors are checked like those of CPU tensors, at the
cost of a synchronisation.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "native", "torch"]

_OLDEST_CAPABILITY = (8, 0)
_logger = logging.getLogger("perl_kernels")


class Engine(NamedTuple):
    """The modules of a backend: `rows` is one of `rows_*.py`, `completions` of `completions_*.py`;
    what they have in common is written down in `rows_torch.py` and `completions_torch.py`."""

    rows: Any
    completions: Any


@functools.cache
def engine(backend: str) -> Engine:
    def load(name: str) -> Any:
        return importlib.import_module(f".{name}", __package__)

    completions = "completions_triton" if backend == "triton" else "completions_torch"
    return Engine(load(f"rows_{backend}"), load(completions))


def available_backends() -> dict[str, tuple[bool, str]]:
    """For each backend whether it can be used here, and why or why not."""
    why_not = _triton_missing()
    return {
        "triton": (why_not is None, why_not or "Triton kernels, fp32, fp16 and bf16"),
        "native": (False, "this build of perl_kernels has no native backend"),
        "torch": (True, "plain PyTorch, on every device"),
    }


def select_backend(backend: str, tensor: Tensor) -> str:
    """The backend for a call on tensors like `tensor`: `backend`, or what PERL_BACKEND says if that
    is `auto`.

    Raises:
        ValueError: no backend of that name, or one that cannot serve the call.
    """
    known = get_args(Backend)
    if backend not in known:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(known)}")
    if backend == "auto":
        backend = os.environ.get("PERL_BACKEND") or "auto"
        if backend not in known:
            raise ValueError(f"PERL_BACKEND is {backend!r}, must be one of {', '.join(known)}")
    if backend == "auto":
        return _automatic(tensor.device, tensor.dtype)
    if backend == "torch":
        return backend
    available, reason = available_backends()[backend]
    if available and backend == "triton":
        reason = _triton_refuses(tensor.device, tensor.dtype)
        available = reason is None
    if not available:
        raise ValueError(f"backend {backend!r} is not available: {reason}")
    return backend


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def values_visible(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at for a check: not while something traces, nor
    of a tensor without values (fake, meta)."""
    if tensor.device.type != "cpu" and os.environ.get("PERL_CHECKS") != "1":
        return False
    return not (tensor.device.type == "meta" or tracing())


def tracing() -> bool:
    """Whether `torch.compile`, `make_fx` or a `FakeTensorMode` runs this code."""
    if torch.compiler.is_compiling():
        return True
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _triton_missing() -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"
    return None


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the Triton kernels compute in fp32; fp64 tensors need backend='torch'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} is sm_{major}{minor}, sm_80 is the oldest supported"
    if device.type not in ("cuda", "meta") and not interpreted():
        return f"the tensors are on {device.type}, and TRITON_INTERPRET is not 1"
    return None


def _automatic(device: torch.device, dtype: torch.dtype) -> str:
    # Interpreted kernels are for tests and debugging: nobody gets them without asking.
    available, reason = available_backends()["triton"]
    if available and device.type != "cuda":
        available, reason = False, f"triton is for CUDA tensors, these are on {device.type}"
    elif available:
        refusal = _triton_refuses(device, dtype)
        available, reason = refusal is None, refusal or reason
    chosen = "triton" if available else "torch"
    if not torch.compiler.is_compiling():
        _announce(chosen, reason)
    return chosen


@functools.cache
def _announce(chosen: str, reason: str) -> None:
    _logger.info("backend auto: chose %s (%s)", chosen, reason)
