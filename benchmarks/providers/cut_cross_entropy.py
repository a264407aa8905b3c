"""Apple's Cut Cross-Entropy: the cross entropy of every token is its negative log-prob."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.contest import Provider, Unavailable
from benchmarks.head_problem import HeadProblem
from benchmarks.providers.common import (
    NO_ENTROPY,
    Logprobs,
    can_compile,
    logprobs_alone,
    loss_behind,
    need_cuda,
    peer,
)

_PACKAGE = "cut-cross-entropy"


def _logprobs(p: HeadProblem, **options: Any) -> Logprobs:
    function = peer("cut_cross_entropy", _PACKAGE).linear_cross_entropy

    def logprobs() -> tuple[Tensor, None]:
        return -function(p.hidden, p.weight, p.targets, reduction="none", **options), None

    return logprobs


def _filtered(p: HeadProblem) -> Logprobs:
    """As it comes: blocks of the gradient without an element above 1/32 of the precision are left out."""
    need_cuda(p.hidden)
    return _logprobs(p, impl="cce")


def _exact(p: HeadProblem) -> Logprobs:
    need_cuda(p.hidden)
    return _logprobs(p, impl="cce", filter_eps=None)


def _compiled(p: HeadProblem) -> Logprobs:
    """What it offers where its kernels do not run."""
    if p.hidden.device.type == "cuda":
        raise Unavailable("for machines without a GPU")
    if not can_compile(p.hidden.device):
        raise Unavailable("torch.compile needs a C++ compiler")
    return _logprobs(p, impl="torch_compile")


_NOTE = "no entropy; log-probs alone: the loss behind them is eager PyTorch"
_WAYS = (
    ("Cut Cross-Entropy", _filtered, "; negligible blocks of the gradient are left out"),
    ("Cut Cross-Entropy, every block", _exact, ""),
    ("Cut Cross-Entropy, torch_compile", _compiled, "; keeps all logits"),
)

LINEAR_LOSS = [
    Provider(name, lambda p, way=way: loss_behind(p, way(p)), _PACKAGE, _NOTE + more, NO_ENTROPY)
    for name, way, more in _WAYS
]
# Without a gradient there is nothing to leave out.
LOGPROBS = [
    Provider(
        name, lambda p, way=way: logprobs_alone(way(p)), _PACKAGE, "no entropy" + more, NO_ENTROPY
    )
    for name, way, more in (
        ("Cut Cross-Entropy", _exact, ""),
        ("Cut Cross-Entropy, torch_compile", _compiled, "; keeps all logits"),
    )
]
