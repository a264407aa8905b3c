"""verl: the fused heads of its actors, in Triton and in PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.contest import Provider, Unavailable
from benchmarks.head_problem import HeadProblem
from benchmarks.providers.common import (
    Logprobs,
    logprobs_alone,
    loss_behind,
    need_cuda,
    peer,
)

_PACKAGE = "verl"
_INSTALL = "--no-deps verl==0.9.1"


def _module(name: str) -> Any:
    """A module below `verl`, without the `__init__` of verl and verl.utils: they import the trainer, with Ray and
    tensordict, which the kernels do not need, and which its pins keep from being installed beside transformers 5.17."""
    spec = None if "verl" in sys.modules else importlib.util.find_spec("verl")
    if spec and spec.submodule_search_locations:
        (folder,) = spec.submodule_search_locations
        for package, path in (("verl", folder), ("verl.utils", f"{folder}/utils")):
            sys.modules[package] = module = ModuleType(package)
            module.__path__ = [path]
    return peer(name, _INSTALL)


def _triton(p: HeadProblem) -> Logprobs:
    need_cuda(p.hidden)
    if p.hidden.shape[1] % 128:
        raise Unavailable("its kernels need a width that is a multiple of 128")
    function = _module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda: function(p.hidden, p.weight, p.targets, 1.0, "none")


def _torch(p: HeadProblem) -> Logprobs:
    module = _module("verl.utils.experimental.torch_functional")
    head = module.FusedLinearForPPO(impl_backend="torch")

    def logprobs() -> tuple[Tensor, Tensor]:
        return head(p.hidden, p.weight, p.targets, temperature=1.0)

    return logprobs


_TRITON, _TORCH = "verl, linear_cross_entropy", "verl, FusedLinearForPPO"
_NOTE = "log-probs alone: the loss behind them is eager PyTorch; the head's gradient also where it is frozen"

LINEAR_LOSS = [
    Provider(_TRITON, lambda p: loss_behind(p, _triton(p)), _PACKAGE, _NOTE),
    Provider(_TORCH, lambda p: loss_behind(p, _torch(p)), _PACKAGE, _NOTE),
]
LOGPROBS = [
    Provider(_TRITON, lambda p: logprobs_alone(_triton(p)), _PACKAGE),
    Provider(_TORCH, lambda p: logprobs_alone(_torch(p)), _PACKAGE),
]
