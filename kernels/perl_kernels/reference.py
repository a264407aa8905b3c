"""Every operation as one would write it down: all logits at once, gradients by autograd.

The truth that the other implementations are measured against, in fp64, with which they share no
formula. Differentiable any number of times. Takes
the arguments of the public functions of the same name and returns the same, without their checks
and without an eye to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .advantage import GroupedRewards
from .inputs import compute_dtype
from .objective import PolicyLoss
from .outputs import LossOutput, TokenLogprobs
from .reference_advantage import group_advantages
from .reference_loss import policy_loss

__all__ = [
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
]


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the targets, and -sum p log p."""
    scores = logits.to(compute_dtype(logits))
    scores = scores / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_probs = torch.log_softmax(scores, dim=1)
    chosen = log_probs.gather(1, targets.to(torch.int64)[:, None])[:, 0]
    return TokenLogprobs(chosen, -(log_probs.exp() * log_probs).sum(1))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of the softcapped hidden @ weight.T + bias."""
    logits = (hidden @ weight.t()).to(compute_dtype(hidden))
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs(logits, targets, temperature=temperature)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    temperature: float | Tensor = 1.0,
    **others: Any,
) -> LossOutput:
    """`policy_loss(..., **others)` of `token_logprobs`."""
    logprobs, entropy = token_logprobs(logits, targets, temperature=temperature)
    return policy_loss(logprobs, advantages, cu_seqlens, loss, entropy=entropy, **others)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **others: Any,
) -> LossOutput:
    """`policy_loss(..., **others)` of `linear_token_logprobs`."""
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap
    )
    return policy_loss(logprobs, advantages, cu_seqlens, loss, entropy=entropy, **others)
