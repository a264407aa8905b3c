"""The contests of heads, how a provider joins them, and what providers of different packages have in common."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contest import Provider, Run, Unavailable
from benchmarks.harness.head_problem import HeadProblem, LogitsProblem

LINEAR_LOSS: list[Provider] = []
"""`HeadProblem`: hidden states to the loss and its gradients."""
LOGPROBS: list[Provider] = []
"""`LogprobsProblem`: hidden states to log-probs."""
LOGITS_LOSS: list[Provider] = []
"""`LogitsProblem`: logits to the loss and their gradient."""
LOGITS_LOGPROBS: list[Provider] = []
"""`LogitsLogprobsProblem`: logits to log-probs."""

EAGER = "log-probs alone: the loss behind them is eager PyTorch"

Logprobs = Callable[[], tuple[Tensor, Tensor | None]]
"""Differentiable log-probs [N], and entropies [N] without a gradient or None."""


def takes_part(
    contest: list[Provider],
    name: str,
    package: str,
    note: str = "",
    entropy: bool = True,
    **options: Any,
) -> Any:
    """Decorate the `prepare` of a provider; `options` are the other fields of `Provider`.

    Args:
        entropy: whether it gives entropies; the note says if it does not.
    """
    omits = frozenset() if entropy else frozenset({"entropy"})
    said = joined("" if entropy else "no entropy", note)

    def add(prepare: Callable[[Any], Run]) -> Callable[[Any], Run]:
        contest.append(Provider(name, prepare, package, said, omits, **options))
        return prepare

    return add


def gives_logprobs(
    name: str, package: str, *, entropy: bool = True, note: str = "", loss_note: str = ""
) -> Any:
    """Decorate what makes `Logprobs` of a HeadProblem: a provider of both contests of hidden states.

    Args:
        note: for both, `loss_note` for the loss.
    """
    loss = takes_part(LINEAR_LOSS, name, package, joined(EAGER, note, loss_note), entropy)
    alone = takes_part(LOGPROBS, name, package, note, entropy)

    def add(prepare: Callable[[HeadProblem], Logprobs]) -> Callable[[HeadProblem], Logprobs]:
        loss(lambda p: loss_behind(p, prepare(p)))
        alone(lambda p: logprobs_alone(prepare(p)))
        return prepare

    return add


def joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def loss_behind(p: HeadProblem, logprobs: Logprobs) -> Run:
    """The step of an implementation that gives log-probs: the loss behind them is plain PyTorch's on [N], as in
    trainers that use it."""

    def call() -> dict[str, Tensor]:
        found, entropy = logprobs()
        results = dict(p.gradients(p.loss(found.float())))
        return results if entropy is None else {**results, "entropy": entropy.detach()}

    return Run(call)


def logprobs_alone(logprobs: Logprobs) -> Run:
    """Log-probs, and entropies where there are any, without gradients."""

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        found, entropy = logprobs()
        results = {"logprobs": found.float()}
        return results if entropy is None else {**results, "entropy": entropy}

    return Run(call)


def with_logits_gradient(
    logits: Tensor, loss: Tensor, entropy: Tensor | None = None
) -> dict[str, Tensor]:
    """Results of an implementation that takes logits, differentiated now.

    The gradient is taken as it is handed back: `loss.backward()` would copy one that lies in the logits' memory.
    """
    (gradient,) = torch.autograd.grad(loss, (logits,))
    results = {"loss": loss.detach(), "grad logits": gradient}
    return results if entropy is None else {**results, "entropy": entropy.detach()}


def fresh_logits(p: LogitsProblem) -> tuple[Tensor, Callable[[], Any]]:
    """Logits that a call may write over, and what restores them."""
    logits = p.logits.clone().requires_grad_()

    def restore() -> None:
        logits.data.copy_(p.logits)

    return logits, restore


def need_cuda(tensor: Tensor) -> None:
    """Raise Unavailable where Triton kernels cannot run."""
    if tensor.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can make code for it."""
    return device.type != "cpu" or any(map(shutil.which, ("c++", "g++", "clang++")))


def peer(module: str, install: str) -> Any:
    """A module of another package; raises Unavailable with what to install where it is not."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name == module.partition(".")[0]:
            raise Unavailable(f"not installed: pip install {install}") from error
        raise Unavailable(f"it needs {error.name}, which is not installed") from error
