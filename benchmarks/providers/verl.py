"""verl: the fused heads of its actors, in Triton and in PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.harness.contest import Unavailable
from benchmarks.harness.head_problem import HeadProblem
from benchmarks.providers import common

_PACKAGE = "verl"
_INSTALL = "--no-deps verl==0.9.1"
_NOTE = "the head's gradient also where it is frozen"


def _module(name: str) -> Any:
    """A module below `verl`, without the `__init__` of verl and verl.utils: they import the trainer, with Ray and
    tensordict, which the kernels do not need, and which its pins keep from being installed beside transformers 5.17."""
    spec = None if "verl" in sys.modules else importlib.util.find_spec("verl")
    if spec and spec.submodule_search_locations:
        (folder,) = spec.submodule_search_locations
        for package, path in (("verl", folder), ("verl.utils", f"{folder}/utils")):
            sys.modules[package] = module = ModuleType(package)
            module.__path__ = [path]
    return common.peer(name, _INSTALL)


@common.gives_logprobs("verl, linear_cross_entropy", _PACKAGE, loss_note=_NOTE)
def _triton(p: HeadProblem) -> common.Logprobs:
    common.need_cuda(p.hidden)
    if p.hidden.shape[1] % 128:
        raise Unavailable("its kernels need a width that is a multiple of 128")
    function = _module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda: function(p.hidden, p.weight, p.targets, 1.0, "none")


@common.gives_logprobs("verl, FusedLinearForPPO", _PACKAGE, loss_note=_NOTE)
def _torch(p: HeadProblem) -> common.Logprobs:
    module = _module("verl.utils.experimental.torch_functional")
    head = module.FusedLinearForPPO(impl_backend="torch")

    def logprobs() -> tuple[Tensor, Tensor]:
        return head(p.hidden, p.weight, p.targets, temperature=1.0)

    return logprobs
