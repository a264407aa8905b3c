"""What PyTorch itself offers: the formula as it is written, compiled, and its chunked cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.contest import Provider, Run, Unavailable
from benchmarks.harness.head_problem import (
    HeadProblem,
    LogitsProblem,
    ProductsProblem,
    ScaledLogitsProblem,
)
from benchmarks.providers import common

Function = Callable[..., Any]


def _same(function: Function, device: torch.device) -> Function:
    return function


def _compiled(function: Function, device: torch.device) -> Function:
    if not common.can_compile(device):
        raise Unavailable("torch.compile needs a C++ compiler")
    # Each size has code of its own, as its documentation advises where sizes are few.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _eager_and_compiled(contest: list[Provider]) -> Any:
    def add(prepare: Callable[[Any, Callable[[Function, torch.device], Function]], Run]) -> None:
        for name, made in (("eager", _same), ("torch.compile", _compiled)):
            contest.append(Provider(f"PyTorch, {name}", partial(prepare, made=made), "torch"))

    return add


def _selected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of logits [N, V], in fp32 as trainers compute them."""
    log_p = logits.float().log_softmax(1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def _of_hidden(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _selected(hidden @ weight.T, targets)


@_eager_and_compiled(common.LINEAR_LOSS)
def _linear_loss(p: HeadProblem, made: Any) -> Run:
    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _of_hidden(hidden, weight, p.targets)
        return p.loss(logprobs), entropy

    run = made(loss, p.hidden.device)

    def call() -> dict[str, Tensor]:
        value, entropy = run(p.hidden, p.weight)
        return {**p.gradients(value), "entropy": entropy}

    return Run(call)


@_eager_and_compiled(common.LOGITS_LOSS)
def _logits_loss(p: LogitsProblem, made: Any) -> Run:
    logits = p.logits.detach().requires_grad_()

    def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _selected(logits, p.targets)
        return p.loss(logprobs), entropy

    run = made(loss, logits.device)
    return Run(lambda: common.with_logits_gradient(logits, *run(logits)))


def _without_gradients(function: Function, *inputs: Tensor) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        logprobs, entropy = function(*inputs)
        return {"logprobs": logprobs, "entropy": entropy}

    return Run(call)


@_eager_and_compiled(common.LOGPROBS)
def _logprobs(p: HeadProblem, made: Any) -> Run:
    return _without_gradients(made(_of_hidden, p.hidden.device), p.hidden, p.weight, p.targets)


@_eager_and_compiled(common.LOGITS_LOGPROBS)
def _logits_logprobs(p: LogitsProblem, made: Any) -> Run:
    return _without_gradients(made(_selected, p.logits.device), p.logits, p.targets)


@common.gives_logprobs("PyTorch, F.linear_cross_entropy", "torch", entropy=False)
def _chunked(p: HeadProblem) -> common.Logprobs:
    """The chunked one, which torch has from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy with options")
    options = torch.nn.LinearCrossEntropyOptions()

    def logprobs() -> tuple[Tensor, None]:
        loss = F.linear_cross_entropy(
            p.hidden, p.weight, p.targets, reduction="none", options=options
        )
        return -loss, None

    return logprobs


@common.takes_part(
    common.LINEAR_LOSS,
    "PyTorch, the products alone",
    "torch",
    "a yardstick: no loss",
    asked=ProductsProblem.of,
)
def _products(p: ProductsProblem) -> Run:
    hidden, weight = p.hidden.detach(), p.weight.detach()

    def call() -> dict[str, Tensor]:
        logits = hidden @ weight.T
        results = {"grad hidden": logits @ weight}
        return results if p.frozen else {**results, "grad weight": logits.T @ hidden}

    return Run(call)


@common.takes_part(
    common.LOGITS_LOSS,
    "PyTorch, one read and write in place",
    "torch",
    "a yardstick: no loss",
    asked=ScaledLogitsProblem.of,
)
def _scaled(p: ScaledLogitsProblem) -> Run:
    logits, restore = common.fresh_logits(p)
    memory = logits.detach()
    return Run(lambda: {"grad logits": memory.mul_(0.5)}, restore)
