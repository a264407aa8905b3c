"""TRL: the fused LM head of its `GRPOTrainer`, and its log-probs of logits."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.harness.contest import Run, Unavailable
from benchmarks.harness.head_problem import HeadProblem, LogitsProblem
from benchmarks.providers import common

_PACKAGE = "trl"
_UTILS = "trl.trainer.utils"
_VOCABULARY_CHUNK = 32768
"""What its fused LM head sets, and its trainers with it."""


def _kernel(module: str, name: str) -> Any:
    """A function of its kernels. Their backward pass takes from its trainers what gathers a head that DeepSpeed has
    split; where these do not import, for want of datasets say, there is nothing to gather."""
    function = getattr(common.peer(f"trl.kernels.{module}", _PACKAGE), name)
    try:
        importlib.import_module(_UTILS)
    except ImportError:
        utils = ModuleType(_UTILS)
        vars(utils)["maybe_gather_lm_head_ctx"] = lambda *_: contextlib.nullcontext()
        sys.modules[_UTILS] = utils
    return function


@common.gives_logprobs(
    "TRL, ChunkedLogProbFunction", _PACKAGE, loss_note="gradients are summed in fp32"
)
def _chunked(p: HeadProblem) -> common.Logprobs:
    function = _kernel("chunked_logprob", "ChunkedLogProbFunction")
    softcap, scale, outputs = None, 1.0, ("log_probs", "entropy")
    options = (1.0, _VOCABULARY_CHUNK, softcap, scale, outputs)

    def logprobs() -> tuple[Tensor, Tensor]:
        found, entropy, *_ = function.apply(p.hidden, p.weight, None, p.targets, *options)
        return found, entropy

    return logprobs


def _of_logits(name: str, **options: Any) -> Any:
    """Decorate log-probs of logits: a provider of both contests of logits."""

    def add(prepare: Callable[[LogitsProblem, Tensor], common.Logprobs]) -> None:
        @common.takes_part(common.LOGITS_LOSS, name, _PACKAGE, common.EAGER, **options)
        def loss(p: LogitsProblem) -> Run:
            logits = p.logits.detach().requires_grad_()
            logprobs = prepare(p, logits)

            def call() -> dict[str, Tensor]:
                found, entropy = logprobs()
                return common.with_logits_gradient(logits, p.loss(found.float()), entropy)

            return Run(call)

        @common.takes_part(common.LOGITS_LOGPROBS, name, _PACKAGE, **options)
        def alone(p: LogitsProblem) -> Run:
            return common.logprobs_alone(prepare(p, p.logits))

    return add


@_of_logits("TRL, selective_log_softmax_and_entropy, Triton")
def _triton(p: LogitsProblem, logits: Tensor) -> common.Logprobs:
    common.need_cuda(p.logits)
    function = _kernel("logprob_entropy", "selective_log_softmax_and_entropy")

    def logprobs() -> tuple[Tensor, Tensor]:
        found, entropy = function(logits.view(*p.shape, -1), p.targets.view(p.shape))
        return found.flatten(), entropy.flatten()

    return logprobs


def _torch(p: LogitsProblem) -> Any:
    """The module whose functions run PyTorch on a CPU."""
    if p.logits.device.type == "cuda":
        raise Unavailable("on a GPU it runs its Triton kernel")
    utils = common.peer(_UTILS, _PACKAGE)
    if not hasattr(utils, "selective_log_softmax"):
        raise Unavailable("its trainers do not import here")
    return utils


@_of_logits("TRL, selective_log_softmax_and_entropy, PyTorch")
def _both(p: LogitsProblem, logits: Tensor) -> common.Logprobs:
    function = _torch(p).selective_log_softmax_and_entropy

    def logprobs() -> tuple[Tensor, Tensor]:
        padded, targets = logits.view(*p.shape, -1), p.targets.view(p.shape)
        found, entropy = function(padded, targets, entropy_requires_grad=False)
        return found.flatten(), entropy.flatten()

    return logprobs


@_of_logits("TRL, selective_log_softmax, PyTorch", entropy=False)
def _one(p: LogitsProblem, logits: Tensor) -> common.Logprobs:
    function = _torch(p).selective_log_softmax
    return lambda: (
        function(logits.view(*p.shape, -1), p.targets.view(p.shape)).flatten(),
        None,
    )
