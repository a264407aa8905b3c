"""`perl_kernels` on each backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.contest import Provider, Run
from benchmarks.harness.head_problem import CLIP, KL, HeadProblem, LogitsProblem
from benchmarks.providers import common
from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)

_TOKEN = PolicyLoss(clip_low=CLIP, clip_high=CLIP, kl="k3", kl_coef=KL, aggregation="token-mean")
_SEQUENCE = PolicyLoss(
    clip_low=CLIP, clip_high=CLIP, ratio="sequence", aggregation="seq-mean-token-mean"
)


def _on_each_backend(contest: list[Provider], note: str = "") -> Any:
    def add(prepare: Callable[[Any, Any], Run]) -> Callable[[Any, Any], Run]:
        def triton(p: Any) -> Run:
            common.need_cuda(p.hidden)
            return prepare(p, "triton")

        contest.append(Provider("PeRL, PyTorch", partial(prepare, backend="torch"), note=note))
        contest.append(Provider("PeRL, Triton", triton, note=note))
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
def _linear_loss(p: HeadProblem, backend: Any) -> Run:
    options = _options(p)

    def call() -> dict[str, Tensor]:
        output = linear_grpo_loss(p.hidden, p.weight, p.targets, backend=backend, **options)
        return {**p.gradients(output.loss), "entropy": output.entropy}

    return Run(call)


@_on_each_backend(common.LOGPROBS)
def _logprobs(p: HeadProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return linear_token_logprobs(p.hidden, p.weight, p.targets, backend=backend)._asdict()

    return Run(call)


@_on_each_backend(common.LOGITS_LOSS, note="writes the gradient over the logits")
def _logits_loss(p: LogitsProblem, backend: Any) -> Run:
    options = _options(p)
    logits, restore = common.fresh_logits(p)

    def call() -> dict[str, Tensor]:
        output = grpo_loss(logits, p.targets, inplace=True, backend=backend, **options)
        return common.with_logits_gradient(logits, output.loss, output.entropy)

    return Run(call, restore)


@_on_each_backend(common.LOGITS_LOGPROBS)
def _logits_logprobs(p: LogitsProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return token_logprobs(p.logits, p.targets, backend=backend)._asdict()

    return Run(call)


def _persistent(p: HeadProblem) -> Run:
    """The kernel that makes the product itself, which nothing chooses yet."""
    common.need_cuda(p.hidden)
    run = _logprobs(p, "triton")
    return Run(mock.patch.dict(os.environ, PERL_PERSISTENT="1")(run.call))


common.LOGPROBS.append(Provider("PeRL, Triton persistent", _persistent))
