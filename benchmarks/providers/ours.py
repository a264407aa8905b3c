"""`perl_kernels` on each backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contest import Provider, Run, Unavailable
from benchmarks.harness.head_problem import CLIP, KL, HeadProblem, LogitsProblem
from benchmarks.providers import common
from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from perl_kernels.dispatch import select_backend

_BACKENDS = {"native": "native", "Triton": "triton", "PyTorch": "torch"}
_TOKEN = PolicyLoss(clip_low=CLIP, clip_high=CLIP, kl="k3", kl_coef=KL, aggregation="token-mean")
_SEQUENCE = PolicyLoss(
    clip_low=CLIP, clip_high=CLIP, ratio="sequence", aggregation="seq-mean-token-mean"
)


def _on_each_backend(contest: list[Provider], more: str = "", note: str = "", **extra: Any) -> Any:
    """Decorate the `prepare` of a provider for each backend; `more` follows its name, `extra` are for `prepare`."""

    def add(prepare: Callable[..., Run]) -> Callable[..., Run]:
        def ready(p: Any, backend: str) -> Run:
            if backend == "triton":
                # The interpreter shows nothing about speed.
                common.need_cuda(p.hidden)
            try:
                select_backend(backend, p.hidden)
            except ValueError as error:
                raise Unavailable(str(error)) from error
            return prepare(p, backend, **extra)

        for name, backend in _BACKENDS.items():
            prepared = partial(ready, backend=backend)
            contest.append(Provider(f"PeRL, {name}{more}", prepared, note=note))
        return prepare

    return add


def _options(p: HeadProblem) -> dict[str, Any]:
    """How the ops are told of the problem's loss, behind what they take it of."""
    sequence = p.level == "sequence"
    return {
        "advantages": p.advantages,
        "cu_seqlens": p.cu_seqlens,
        "loss": _SEQUENCE if sequence else _TOKEN,
        "old_logprobs": p.old,
        "ref_logprobs": None if sequence else p.ref,
    }


@_on_each_backend(common.LINEAR_LOSS)
def linear_loss(p: HeadProblem, backend: Any, **extra: Any) -> Run:
    options = {**_options(p), **extra}

    def call() -> dict[str, Tensor]:
        output = linear_grpo_loss(p.hidden, p.weight, p.targets, backend=backend, **options)
        return {**p.gradients(output.loss), "entropy": output.entropy}

    return Run(call)


@_on_each_backend(common.LOGPROBS)
def logprobs(p: HeadProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return linear_token_logprobs(p.hidden, p.weight, p.targets, backend=backend)._asdict()

    return Run(call)


@_on_each_backend(
    common.LOGITS_LOSS, ", in place", "writes the gradient over the logits", inplace=True
)
@_on_each_backend(common.LOGITS_LOSS, inplace=False)
def logits_loss(p: LogitsProblem, backend: Any, inplace: bool) -> Run:
    options = _options(p)
    logits, restore = common.fresh_logits(p)

    def call() -> dict[str, Tensor]:
        output = grpo_loss(logits, p.targets, inplace=inplace, backend=backend, **options)
        return common.with_logits_gradient(logits, output.loss, output.entropy)

    return Run(call, restore if inplace else None)


@_on_each_backend(common.LOGITS_LOGPROBS)
def logits_logprobs(p: LogitsProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return token_logprobs(p.logits, p.targets, backend=backend)._asdict()

    return Run(call)
