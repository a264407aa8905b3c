"""Apple's Cut Cross-Entropy: the cross entropy of every token is its negative log-prob."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.harness.contest import Unavailable
from benchmarks.harness.head_problem import HeadProblem
from benchmarks.providers.common import (
    EAGER,
    LINEAR_LOSS,
    LOGPROBS,
    NO_ENTROPY,
    Logprobs,
    can_compile,
    gives_logprobs,
    logprobs_alone,
    loss_behind,
    need_cuda,
    peer,
    takes_part,
)

_PACKAGE = "cut-cross-entropy"


def _logprobs(p: HeadProblem, **options: Any) -> Logprobs:
    function = peer("cut_cross_entropy", _PACKAGE).linear_cross_entropy

    def logprobs() -> tuple[Tensor, None]:
        return -function(p.hidden, p.weight, p.targets, reduction="none", **options), None

    return logprobs


def _exact(p: HeadProblem) -> Logprobs:
    need_cuda(p.hidden)
    return _logprobs(p, impl="cce", filter_eps=None)


@takes_part(
    LINEAR_LOSS,
    "Cut Cross-Entropy",
    _PACKAGE,
    note=f"no entropy; {EAGER}; negligible blocks of the gradient are left out",
    omits=NO_ENTROPY,
)
def _filtered_loss(p: HeadProblem) -> Any:
    """As it comes: blocks of the gradient without an element above 1/32 of the precision are left out."""
    need_cuda(p.hidden)
    return loss_behind(p, _logprobs(p, impl="cce"))


@takes_part(
    LINEAR_LOSS,
    "Cut Cross-Entropy, every block",
    _PACKAGE,
    note=f"no entropy; {EAGER}",
    omits=NO_ENTROPY,
)
def _exact_loss(p: HeadProblem) -> Any:
    return loss_behind(p, _exact(p))


@takes_part(LOGPROBS, "Cut Cross-Entropy", _PACKAGE, note="no entropy", omits=NO_ENTROPY)
def _exact_logprobs(p: HeadProblem) -> Any:
    """Without a gradient there is nothing to leave out."""
    return logprobs_alone(_exact(p))


@gives_logprobs(
    "Cut Cross-Entropy, torch_compile", _PACKAGE, entropy=False, note="keeps all logits"
)
def _compiled(p: HeadProblem) -> Logprobs:
    """What it offers where its kernels do not run."""
    if p.hidden.device.type == "cuda":
        raise Unavailable("for machines without a GPU")
    if not can_compile(p.hidden.device):
        raise Unavailable("torch.compile needs a C++ compiler")
    return _logprobs(p, impl="torch_compile")
