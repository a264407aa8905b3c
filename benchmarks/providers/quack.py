"""QuACK: cross entropies in CuTe; the one of every token is its negative log-prob."""

from __future__ import annotations

from torch import Tensor

from benchmarks.contest import Provider, Run, Unavailable
from benchmarks.head_problem import CrossEntropyProblem, HeadProblem, LogitsProblem
from benchmarks.providers.common import (
    NO_ENTROPY,
    Logprobs,
    fresh_logits,
    logprobs_alone,
    loss_behind,
    need_cuda,
    peer,
    with_logits_gradient,
)

_PACKAGE = "quack-kernels"


def _linear(p: HeadProblem) -> Logprobs:
    """With all logits at once: its chunks give a mean or a sum only."""
    need_cuda(p.hidden)
    function = peer("quack.linear_cross_entropy", _PACKAGE).linear_cross_entropy_func

    def logprobs() -> tuple[Tensor, None]:
        loss = function(
            p.hidden, p.weight, None, p.targets, reduction="none", inplace_backward=True
        )
        return -loss, None

    return logprobs


def _chunked(p: HeadProblem) -> Run:
    need_cuda(p.hidden)
    if p.level == "sequence":
        raise Unavailable("its mean is of tokens")
    function = peer("quack.linear_cross_entropy", _PACKAGE).chunked_linear_cross_entropy
    return Run(lambda: p.gradients(function(p.hidden, p.weight, p.targets)))


def _logits_loss(p: LogitsProblem) -> Run:
    need_cuda(p.logits)
    cross_entropy = peer("quack", _PACKAGE).cross_entropy
    logits, restore = fresh_logits(p)

    def call() -> dict[str, Tensor]:
        loss = cross_entropy(logits, p.targets, reduction="none", inplace_backward=True)
        return with_logits_gradient(logits, p.loss(-loss.float()), None)

    return Run(call, restore)


def _logits_logprobs(p: LogitsProblem) -> Run:
    need_cuda(p.logits)
    cross_entropy = peer("quack", _PACKAGE).cross_entropy
    return logprobs_alone(lambda: (-cross_entropy(p.logits, p.targets, reduction="none"), None))


_LINEAR, _LOGITS = "QuACK, linear_cross_entropy_func", "QuACK, cross_entropy"
_EAGER = "no entropy; log-probs alone: the loss behind them is eager PyTorch"

LINEAR_LOSS = [
    Provider(
        _LINEAR,
        lambda p: loss_behind(p, _linear(p)),
        _PACKAGE,
        f"{_EAGER}; keeps all logits and writes the gradient over them",
        NO_ENTROPY,
    ),
    Provider(
        "QuACK, chunked_linear_cross_entropy",
        _chunked,
        _PACKAGE,
        "cross entropy alone, mean over tokens: no ratio, KL term or result of each token",
        NO_ENTROPY,
        CrossEntropyProblem.of,
    ),
]
LOGPROBS = [
    Provider(
        _LINEAR,
        lambda p: logprobs_alone(_linear(p)),
        _PACKAGE,
        "no entropy; keeps all logits",
        NO_ENTROPY,
    )
]
LOGITS_LOSS = [
    Provider(
        _LOGITS,
        _logits_loss,
        _PACKAGE,
        f"{_EAGER}; writes the gradient over the logits",
        NO_ENTROPY,
    )
]
LOGITS_LOGPROBS = [Provider(_LOGITS, _logits_logprobs, _PACKAGE, "no entropy", NO_ENTROPY)]
