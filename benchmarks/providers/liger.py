"""Liger-Kernel: GRPO losses of logits and of hidden states, and a fused head that gives log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contest import Run
from benchmarks.harness.head_problem import CLIP, KL, HeadProblem, LogitsProblem
from benchmarks.providers import common

_PACKAGE = "liger-kernel"


def _options(p: HeadProblem) -> dict[str, Any]:
    """Its names for the problem's loss: `bnpo` is the mean over tokens, `grpo` the mean over sequences of means over
    tokens."""
    if p.level == "sequence":
        return {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence"}
    return {"beta": KL, "loss_type": "bnpo", "importance_sampling_level": "token"}


@common.takes_part(
    common.LINEAR_LOSS,
    "Liger, LigerFusedLinearGRPOLoss",
    _PACKAGE,
    note="products of the backward pass in fp32, without TF32, as PyTorch has it by default",
    entropy=False,
)
def _linear_loss(p: HeadProblem) -> Run:
    chunked_loss = common.peer("liger_kernel.chunked_loss", _PACKAGE)
    options = _options(p)
    with_kl = options["beta"] != 0
    # Its defaults but for the loss: a sequence at a time, what is behind the log-probs compiled.
    loss = chunked_loss.LigerFusedLinearGRPOLoss(
        **options,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        temperature=1.0,
        use_ref_model=with_kl,
        compiled=common.can_compile(p.hidden.device),
    )
    mask = torch.ones(p.shape, device=p.hidden.device)

    def call() -> dict[str, Tensor]:
        value, _ = loss(
            p.hidden.view(*p.shape, -1),
            p.weight,
            p.targets.view(p.shape),
            mask,
            p.advantages,
            ref_per_token_logps=p.ref.view(p.shape) if with_kl else None,
            old_per_token_logps=p.old.view(p.shape),
        )
        return dict(p.gradients(value))

    return Run(call)


@common.gives_logprobs("Liger, fused linear scaled cross entropy", _PACKAGE)
def _scaled_cross_entropy(p: HeadProblem) -> common.Logprobs:
    function = common.peer("liger_kernel.ops", _PACKAGE).LigerFusedLinearScaledCrossEntropyFunction

    def logprobs() -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(p.hidden, p.weight, p.targets, return_entropy=True)
        return -nll, entropy

    return logprobs


def _padded(p: LogitsProblem) -> tuple[Tensor, Any]:
    """Logits as it wants them, [S, L + 1, V] with a row behind each sequence that is not read, and what restores
    them."""
    sequences, length = p.shape
    logits = p.logits.new_zeros(sequences, length + 1, p.logits.shape[1]).requires_grad_()

    def restore() -> None:
        logits.data[:, :-1].copy_(p.logits.view(sequences, length, -1))

    restore()
    return logits, restore


@common.takes_part(
    common.LOGITS_LOSS,
    "Liger, triton_grpo_loss",
    _PACKAGE,
    note="writes the gradient over the logits, which have one row more for each sequence",
    entropy=False,
)
def _logits_loss(p: LogitsProblem) -> Run:
    common.need_cuda(p.logits)
    triton_grpo_loss = common.peer("liger_kernel.transformers.grpo_loss", _PACKAGE).triton_grpo_loss
    logits, restore = _padded(p)
    options = _options(p)

    def call() -> dict[str, Tensor]:
        loss, _ = triton_grpo_loss(
            logits,
            p.old.view(p.shape),
            p.ref.view(p.shape) if options["beta"] else None,
            p.targets.view(p.shape),
            p.advantages,
            temperature=1.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=True,
            reduce=True,
            **options,
        )
        return common.with_logits_gradient(logits, loss)

    def read(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**results, "grad logits": results["grad logits"][:, :-1].flatten(0, 1)}

    return Run(call, restore, read)


@common.takes_part(
    common.LOGITS_LOGPROBS,
    "Liger, fused_selective_log_softmax",
    _PACKAGE,
    note="the logits have one row more for each sequence",
    entropy=False,
)
def _logits_logprobs(p: LogitsProblem) -> Run:
    common.need_cuda(p.logits)
    module = common.peer("liger_kernel.ops.grpo_loss", _PACKAGE)
    logits, _ = _padded(p)
    targets = p.targets.view(p.shape)

    def logprobs() -> tuple[Tensor, None]:
        found = module.fused_selective_log_softmax(logits.detach(), targets, temperature=1.0)
        return found.flatten(), None

    return common.logprobs_alone(logprobs)
