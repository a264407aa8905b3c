"""QuACK: cross entropies in CuTe; the one of every token is its negative log-prob."""

from __future__ import annotations

from torch import Tensor

from benchmarks.harness.contest import Run, Unavailable
from benchmarks.harness.head_problem import CrossEntropyProblem, HeadProblem, LogitsProblem
from benchmarks.providers import common

_PACKAGE = "quack-kernels"


@common.gives_logprobs(
    "QuACK, linear_cross_entropy_func",
    _PACKAGE,
    entropy=False,
    note="keeps all logits",
    loss_note="writes the gradient over them",
)
def _linear(p: HeadProblem) -> common.Logprobs:
    """With all logits at once: its chunks give a mean or a sum only."""
    common.need_cuda(p.hidden)
    function = common.peer("quack.linear_cross_entropy", _PACKAGE).linear_cross_entropy_func

    def logprobs() -> tuple[Tensor, None]:
        loss = function(
            p.hidden, p.weight, None, p.targets, reduction="none", inplace_backward=True
        )
        return -loss, None

    return logprobs


@common.takes_part(
    common.LINEAR_LOSS,
    "QuACK, chunked_linear_cross_entropy",
    _PACKAGE,
    note="cross entropy alone, mean over tokens: no ratio, KL term or result of each token",
    entropy=False,
    asked=CrossEntropyProblem.of,
)
def _chunked(p: HeadProblem) -> Run:
    common.need_cuda(p.hidden)
    if p.level == "sequence":
        raise Unavailable("its mean is of tokens")
    function = common.peer("quack.linear_cross_entropy", _PACKAGE).chunked_linear_cross_entropy
    return Run(lambda: p.gradients(function(p.hidden, p.weight, p.targets)))


@common.takes_part(
    common.LOGITS_LOSS,
    "QuACK, cross_entropy",
    _PACKAGE,
    note=f"{common.EAGER}; writes the gradient over the logits",
    entropy=False,
)
def _logits_loss(p: LogitsProblem) -> Run:
    common.need_cuda(p.logits)
    cross_entropy = common.peer("quack", _PACKAGE).cross_entropy
    logits, restore = common.fresh_logits(p)

    def call() -> dict[str, Tensor]:
        loss = cross_entropy(logits, p.targets, reduction="none", inplace_backward=True)
        return common.with_logits_gradient(logits, p.loss(-loss.float()))

    return Run(call, restore)


@common.takes_part(
    common.LOGITS_LOGPROBS,
    "QuACK, cross_entropy",
    _PACKAGE,
    entropy=False,
)
def _logits_logprobs(p: LogitsProblem) -> Run:
    common.need_cuda(p.logits)
    cross_entropy = common.peer("quack", _PACKAGE).cross_entropy
    return common.logprobs_alone(
        lambda: (-cross_entropy(p.logits, p.targets, reduction="none"), None)
    )
