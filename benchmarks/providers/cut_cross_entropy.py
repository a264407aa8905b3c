"""Apple's Cut Cross-Entropy: the cross entropy of every token is its negative log-prob."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.harness.contest import Unavailable
from benchmarks.harness.head_problem import HeadProblem
from benchmarks.providers import common

_PACKAGE = "cut-cross-entropy"


def _logprobs(p: HeadProblem, **options: Any) -> common.Logprobs:
    function = common.peer("cut_cross_entropy", _PACKAGE).linear_cross_entropy

    def logprobs() -> tuple[Tensor, None]:
        return -function(p.hidden, p.weight, p.targets, reduction="none", **options), None

    return logprobs


def _exact(p: HeadProblem) -> common.Logprobs:
    common.need_cuda(p.hidden)
    return _logprobs(p, impl="cce", filter_eps=None)


@common.takes_part(
    common.LINEAR_LOSS,
    "Cut Cross-Entropy",
    _PACKAGE,
    note=f"{common.EAGER}; negligible blocks of the gradient are left out",
    entropy=False,
)
def _filtered_loss(p: HeadProblem) -> Any:
    """As it comes: blocks of the gradient without an element above 1/32 of the precision are left out."""
    common.need_cuda(p.hidden)
    return common.loss_behind(p, _logprobs(p, impl="cce"))


@common.takes_part(
    common.LINEAR_LOSS,
    "Cut Cross-Entropy, every block",
    _PACKAGE,
    note=common.EAGER,
    entropy=False,
)
def _exact_loss(p: HeadProblem) -> Any:
    return common.loss_behind(p, _exact(p))


@common.takes_part(common.LOGPROBS, "Cut Cross-Entropy", _PACKAGE, entropy=False)
def _exact_logprobs(p: HeadProblem) -> Any:
    """Without a gradient there is nothing to leave out."""
    return common.logprobs_alone(_exact(p))


@common.gives_logprobs(
    "Cut Cross-Entropy, torch_compile", _PACKAGE, entropy=False, note="keeps all logits"
)
def _compiled(p: HeadProblem) -> common.Logprobs:
    """What it offers where its kernels do not run."""
    if p.hidden.device.type == "cuda":
        raise Unavailable("for machines without a GPU")
    if not common.can_compile(p.hidden.device):
        raise Unavailable("torch.compile needs a C++ compiler")
    return _logprobs(p, impl="torch_compile")
