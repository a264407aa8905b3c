"""`perl_kernels` on each backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Provider, Run
from benchmarks.head_problem import CLIP, KL, HeadProblem, LogitsProblem
from benchmarks.providers.common import fresh_logits, need_cuda, with_logits_gradient
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


def _each_backend(prepare: Callable[[Any, Any], Run], **options: Any) -> list[Provider]:
    def torch_backend(p: Any) -> Run:
        return prepare(p, "torch")

    def triton_backend(p: Any) -> Run:
        need_cuda(p.hidden)
        return prepare(p, "triton")

    return [
        Provider("PeRL, PyTorch", torch_backend, **options),
        Provider("PeRL, Triton", triton_backend, **options),
    ]


def _linear_loss(p: HeadProblem, backend: Any) -> Run:
    def call() -> dict[str, Tensor]:
        output = linear_grpo_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            p.cu_seqlens,
            _SEQUENCE if p.level == "sequence" else _TOKEN,
            old_logprobs=p.old,
            ref_logprobs=None if p.level == "sequence" else p.ref,
            backend=backend,
        )
        return {**p.gradients(output.loss), "entropy": output.entropy}

    return Run(call)


def _logprobs(p: HeadProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return linear_token_logprobs(p.hidden, p.weight, p.targets, backend=backend)._asdict()

    return Run(call)


def _logits_loss(p: LogitsProblem, backend: Any) -> Run:
    logits, restore = fresh_logits(p)

    def call() -> dict[str, Tensor]:
        output = grpo_loss(
            logits,
            p.targets,
            p.advantages,
            p.cu_seqlens,
            _SEQUENCE if p.level == "sequence" else _TOKEN,
            old_logprobs=p.old,
            ref_logprobs=None if p.level == "sequence" else p.ref,
            inplace=True,
            backend=backend,
        )
        return with_logits_gradient(logits, output.loss, output.entropy)

    return Run(call, restore)


def _logits_logprobs(p: LogitsProblem, backend: Any) -> Run:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return token_logprobs(p.logits, p.targets, backend=backend)._asdict()

    return Run(call)


def _persistent(p: HeadProblem) -> Run:
    """The kernel that makes the product itself, which nothing chooses yet: PERL_PERSISTENT=1."""
    need_cuda(p.hidden)
    run = _logprobs(p, "triton")

    def call() -> dict[str, Tensor]:
        before = os.environ.get("PERL_PERSISTENT")
        os.environ["PERL_PERSISTENT"] = "1"
        try:
            return run.call()
        finally:
            os.environ.pop("PERL_PERSISTENT")
            if before is not None:
                os.environ["PERL_PERSISTENT"] = before

    return Run(call)


LINEAR_LOSS = _each_backend(_linear_loss)
LOGPROBS = [*_each_backend(_logprobs), Provider("PeRL, Triton persistent", _persistent)]
LOGITS_LOSS = _each_backend(_logits_loss, note="writes the gradient over the logits")
LOGITS_LOGPROBS = _each_backend(_logits_logprobs)
