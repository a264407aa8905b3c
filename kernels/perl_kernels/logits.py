"""Functions of materialised logits: `token_logprobs` and `grpo_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks
from .advantage import GroupedRewards
from .dispatch import Backend, select_backend
from .head import (
    RowStats,
    block_rows,
    blocks,
    logits_gradient,
    row_stats,
    rows_of,
    scaled,
)
from .inputs import compute_dtype, loss_inputs
from .objective import PolicyLoss
from .outputs import LossOutput, TokenLogprobs
from .policy import evaluate


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of each target and entropy of each row of `logits / temperature`.

    Args:
        logits: [N, V], any floating dtype.
        targets: [N] int64 or int32 in [0, V).
        temperature: above 0, a float or [N].
        backend: see `perl_kernels.dispatch`.

    Returns:
        `TokenLogprobs(logprobs [N], entropy [N])` in fp32 (fp64 for fp64 logits), both
        differentiable once with respect to `logits`. Neither pass makes an fp32 copy of all logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    select_backend(backend)
    checks.check_logits(logits, targets, temperature)
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature)  # type: ignore[misc]
    return TokenLogprobs(logprobs, entropy)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> LossOutput:
    """`policy_loss` of `token_logprobs(logits, targets)`, differentiable with respect to `logits`.

    Arguments, results and errors are those of the two functions, but for `entropy`: that is
    computed here and not taken as an argument.
    """
    select_backend(backend)
    checks.check_logits(logits, targets, temperature)
    inputs = loss_inputs(
        logits,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        weights=weights,
        normalizer=normalizer,
    )
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature)  # type: ignore[misc]
    return evaluate(loss, inputs, logprobs, entropy)


class _TokenLogprobs(torch.autograd.Function):
    """Works through blocks of rows, so that the fp32 temporaries stay small."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        n_tokens, vocab = logits.shape
        ctx.dtype, ctx.rows = compute_dtype(logits), block_rows(vocab)
        out = RowStats(*(logits.new_empty(n_tokens, dtype=ctx.dtype) for _ in range(2)))
        for part in blocks(n_tokens, ctx.rows):
            scores = scaled(logits[part].to(ctx.dtype), rows_of(temperature, part), None)
            stats = row_stats(torch.log_softmax(scores, 1), targets[part])
            for whole, piece in zip(out, stats, strict=True):
                whole[part] = piece
        ctx.set_materialize_grads(False)
        tau = temperature if isinstance(temperature, Tensor) else None
        ctx.temperature = None if tau is not None else temperature
        ctx.save_for_backward(logits, targets, out.entropy, tau)
        return out.logprobs, out.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:  # type: ignore[override]
        logits, targets, entropy, tau = ctx.saved_tensors
        temperature = ctx.temperature if tau is None else tau
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad = torch.empty_like(logits)
        for part in blocks(logits.shape[0], ctx.rows):
            tau = rows_of(temperature, part)
            scores = scaled(logits[part].to(ctx.dtype), tau, None)
            grad[part] = logits_gradient(
                scores,
                torch.log_softmax(scores, 1),
                targets[part],
                entropy[part],
                grad_logprobs[part],
                rows_of(grad_entropy, part),
                tau,
                None,
            )
        return grad, None, None
