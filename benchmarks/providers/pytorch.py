"""What PyTorch itself offers: the formula as it is written, compiled, and its chunked cross entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import Provider, Run, Unavailable
from benchmarks.head_problem import HeadProblem, LogitsProblem
from benchmarks.providers.common import NO_ENTROPY, can_compile, loss_behind, with_logits_gradient


def _selected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of logits [N, V], in fp32 as trainers compute them."""
    log_p = logits.float().log_softmax(1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def _of_hidden(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _selected(hidden @ weight.T, targets)


def _same(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return function


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    if not can_compile(device):
        raise Unavailable("torch.compile needs a C++ compiler")
    # Each size has code of its own, as its documentation advises where sizes are few.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _linear_loss(p: HeadProblem, made: Callable[..., Any]) -> Run:
    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _of_hidden(hidden, weight, p.targets)
        return p.loss(logprobs), entropy

    run = made(loss, p.hidden.device)

    def call() -> dict[str, Tensor]:
        value, entropy = run(p.hidden, p.weight)
        return {**p.gradients(value), "entropy": entropy}

    return Run(call)


def _logprobs(p: HeadProblem, made: Callable[..., Any]) -> Run:
    run = made(_of_hidden, p.hidden.device)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        logprobs, entropy = run(p.hidden, p.weight, p.targets)
        return {"logprobs": logprobs, "entropy": entropy}

    return Run(call)


def _logits_loss(p: LogitsProblem, made: Callable[..., Any]) -> Run:
    logits = p.logits.detach().requires_grad_()

    def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _selected(logits, p.targets)
        return p.loss(logprobs), entropy

    run = made(loss, logits.device)
    return Run(lambda: with_logits_gradient(logits, *run(logits)))


def _logits_logprobs(p: LogitsProblem, made: Callable[..., Any]) -> Run:
    run = made(_selected, p.logits.device)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        logprobs, entropy = run(p.logits, p.targets)
        return {"logprobs": logprobs, "entropy": entropy}

    return Run(call)


def _cross_entropy(p: HeadProblem) -> Callable[[], Tensor]:
    """Log-probs by `F.linear_cross_entropy`, chunked, which torch has from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy with options")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: (
        -F.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none", options=options)
    )


def _chunked_loss(p: HeadProblem) -> Run:
    logprobs = _cross_entropy(p)
    return loss_behind(p, lambda: (logprobs(), None))


def _chunked_logprobs(p: HeadProblem) -> Run:
    logprobs = torch.no_grad()(_cross_entropy(p))
    return Run(lambda: {"logprobs": logprobs().float()})


def _both(prepare: Callable[[Any, Callable[..., Any]], Run]) -> list[Provider]:
    return [
        Provider("PyTorch, eager", functools.partial(prepare, made=_same), "torch"),
        Provider("PyTorch, torch.compile", functools.partial(prepare, made=_compiled), "torch"),
    ]


_CHUNKED = ("PyTorch, F.linear_cross_entropy", "torch", "no entropy", NO_ENTROPY)


def _chunked(prepare: Callable[[Any], Run]) -> Provider:
    name, package, note, omits = _CHUNKED
    return Provider(name, prepare, package, note, omits)


LINEAR_LOSS = [*_both(_linear_loss), _chunked(_chunked_loss)]
LOGPROBS = [*_both(_logprobs), _chunked(_chunked_logprobs)]
LOGITS_LOSS = _both(_logits_loss)
LOGITS_LOGPROBS = _both(_logits_logprobs)
