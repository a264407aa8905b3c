"""Which implementation serves a call, and how much of it is checked.

`backend="triton"` (CUDA devices from sm_80 on, and any device with TRITON_INTERPRET=1; fp32, fp16 and
bf16), `backend="native"` (C++ for CPUs, fp32 and bf16, where a compiler was found when perl_kernels was
installed) and `backend="torch"` (everything) are taken at their word or refused. `"auto"` takes the
fastest one that can serve the tensors of the call, and says so once to the logger `perl_kernels`, at
level INFO. `PERL_BACKEND` sets the default of the process. With `PERL_CHECKS=1` the values of GPU
tensors are checked like those of CPU tensors, at the cost of a synchronisation.
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

from . import rows_native

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
        "native": _NATIVE,
        "torch": (True, "plain PyTorch, on every device"),
    }


def select_backend(backend: str, tensor: Tensor, rows: torch.dtype | None = None) -> str:
    """The backend for a call on tensors like `tensor`, with `rows` the dtype of logits if there are
    any: `backend`, or what PERL_BACKEND says if that is `auto`.

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
        return _automatic(tensor, rows)
    reason = _refuses(backend, tensor, rows)
    if reason is not None:
        raise ValueError(f"backend {backend!r} is not available: {reason}")
    return backend


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def values_visible(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at for a check: not while something traces, nor
    of a tensor without values (fake, meta)."""
    kind = tensor.device.type
    if kind != "cpu" and (kind == "meta" or os.environ.get("PERL_CHECKS") != "1"):
        return False
    return not tracing()


def tracing() -> bool:
    """Whether `torch.compile`, `make_fx` or a `FakeTensorMode` runs this code."""
    if torch.compiler.is_compiling():
        return True
    mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return mode(keys.FAKE) is not None or mode(keys.PROXY) is not None


# Looked at here, as torch.compile traces what the functions below do.
_NATIVE = rows_native.available()
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _triton_missing() -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if interpreted():
        return None
    # PyTorch calls a GPU of AMD a CUDA device too.
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"
    return None


def _refuses(backend: str, tensor: Tensor, rows: torch.dtype | None) -> str | None:
    """Why `backend` cannot serve such tensors."""
    device, (available, reason) = tensor.device, available_backends()[backend]
    if not available:
        return reason
    if backend == "native":
        if device.type != "cpu":
            return f"the native rows are for a CPU, the tensors are on {device.type}"
        if rows is not None and rows not in rows_native.DTYPES:
            return f"the native rows are for fp32 and bf16, these are {rows}"
    if backend == "triton":
        if tensor.dtype == torch.float64:
            return "the Triton kernels compute in fp32; fp64 tensors need backend='torch'"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
            major, minor = torch.cuda.get_device_capability(device)
            return f"{device} is sm_{major}{minor}, sm_80 is the oldest supported"
        if device.type not in ("cuda", "meta") and not interpreted():
            return f"the tensors are on {device.type}, and TRITON_INTERPRET is not 1"
    return None


def _automatic(tensor: Tensor, rows: torch.dtype | None) -> str:
    # Interpreted kernels are for tests and debugging: nobody gets them without asking.
    fastest = "triton" if tensor.device.type == "cuda" else "native"
    refusal = _refuses(fastest, tensor, rows)
    chosen = fastest if refusal is None else "torch"
    if not torch.compiler.is_compiling():
        _announce(chosen, refusal or available_backends()[chosen][1])
    return chosen


@functools.cache
def _announce(chosen: str, reason: str) -> None:
    _logger.info("backend auto: chose %s (%s)", chosen, reason)
