"""TRL: the fused LM head of its `GRPOTrainer`, and its log-probs of logits."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.contest import Provider, Run, Unavailable
from benchmarks.head_problem import HeadProblem, LogitsProblem
from benchmarks.providers.common import (
    NO_ENTROPY,
    Logprobs,
    logprobs_alone,
    loss_behind,
    need_cuda,
    peer,
    with_logits_gradient,
)

_PACKAGE = "trl"
_UTILS = "trl.trainer.utils"
_VOCABULARY_CHUNK = 32768
"""What its fused LM head sets, and its trainers with it."""


def _kernel(module: str, name: str) -> Any:
    """A function of its kernels. Their backward pass takes from its trainers what gathers a head that DeepSpeed has
    split; where these do not import, for want of datasets say, there is nothing to gather."""
    function = getattr(peer(f"trl.kernels.{module}", _PACKAGE), name)
    try:
        importlib.import_module(_UTILS)
    except ImportError:
        utils = ModuleType(_UTILS)
        vars(utils)["maybe_gather_lm_head_ctx"] = lambda *_: contextlib.nullcontext()
        sys.modules[_UTILS] = utils
    return function


def _chunked(p: HeadProblem) -> Logprobs:
    function = _kernel("chunked_logprob", "ChunkedLogProbFunction")
    softcap, scale, outputs = None, 1.0, ("log_probs", "entropy")
    options = (1.0, _VOCABULARY_CHUNK, softcap, scale, outputs)

    def logprobs() -> tuple[Tensor, Tensor]:
        found, entropy, *_ = function.apply(p.hidden, p.weight, None, p.targets, *options)
        return found, entropy

    return logprobs


def _triton(p: LogitsProblem, logits: Tensor) -> Logprobs:
    need_cuda(p.logits)
    function = _kernel("logprob_entropy", "selective_log_softmax_and_entropy")

    def logprobs() -> tuple[Tensor, Tensor]:
        found, entropy = function(logits.view(*p.shape, -1), p.targets.view(p.shape))
        return found.flatten(), entropy.flatten()

    return logprobs


def _torch(p: LogitsProblem) -> Any:
    """The module whose functions run PyTorch on a CPU."""
    if p.logits.device.type == "cuda":
        raise Unavailable("on a GPU it runs its Triton kernel")
    utils = peer(_UTILS, _PACKAGE)
    if not hasattr(utils, "selective_log_softmax"):
        raise Unavailable("its trainers do not import here")
    return utils


def _both(p: LogitsProblem, logits: Tensor) -> Logprobs:
    function = _torch(p).selective_log_softmax_and_entropy

    def logprobs() -> tuple[Tensor, Tensor]:
        padded, targets = logits.view(*p.shape, -1), p.targets.view(p.shape)
        found, entropy = function(padded, targets, entropy_requires_grad=False)
        return found.flatten(), entropy.flatten()

    return logprobs


def _one(p: LogitsProblem, logits: Tensor) -> Logprobs:
    function = _torch(p).selective_log_softmax
    return lambda: (
        function(logits.view(*p.shape, -1), p.targets.view(p.shape)).flatten(),
        None,
    )


def _logits_loss(p: LogitsProblem, way: Any) -> Run:
    logits = p.logits.detach().requires_grad_()
    logprobs = way(p, logits)

    def call() -> dict[str, Tensor]:
        found, entropy = logprobs()
        return with_logits_gradient(logits, p.loss(found.float()), entropy)

    return Run(call)


_EAGER = "log-probs alone: the loss behind them is eager PyTorch"
_LOGITS = (
    ("TRL, selective_log_softmax_and_entropy, Triton", _triton, "", frozenset[str]()),
    ("TRL, selective_log_softmax_and_entropy, PyTorch", _both, "", frozenset[str]()),
    ("TRL, selective_log_softmax, PyTorch", _one, "no entropy", NO_ENTROPY),
)

LINEAR_LOSS = [
    Provider(
        "TRL, ChunkedLogProbFunction",
        lambda p: loss_behind(p, _chunked(p)),
        _PACKAGE,
        f"{_EAGER}; gradients are summed in fp32",
    )
]
LOGPROBS = [
    Provider("TRL, ChunkedLogProbFunction", lambda p: logprobs_alone(_chunked(p)), _PACKAGE)
]
LOGITS_LOSS = [
    Provider(
        name,
        lambda p, way=way: _logits_loss(p, way),
        _PACKAGE,
        "; ".join(filter(None, (note, _EAGER))),
        omits,
    )
    for name, way, note, omits in _LOGITS
]
LOGITS_LOGPROBS = [
    Provider(name, lambda p, way=way: logprobs_alone(way(p, p.logits)), _PACKAGE, note, omits)
    for name, way, note, omits in _LOGITS
]
