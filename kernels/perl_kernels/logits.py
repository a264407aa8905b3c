"""Functions of materialised logits: `token_logprobs` and `grpo_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, ops
from .advantage import GroupedRewards
from .arguments import loss_inputs
from .dispatch import Backend, select_backend
from .objective import PolicyLoss
from .outputs import LossOutput, TokenLogprobs, loss_output
from .scalars import split_temperature


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of each target and entropy of each row of `logits / temperature`.

    Args:
        logits: [N, V], any floating dtype; row t is the one that predicts `targets[t]`.
        targets: [N] int64 or int32 in [0, V).
        temperature: above 0, a float or [N].
        backend: see `perl_kernels.dispatch`.

    Returns:
        `TokenLogprobs(logprobs [N], entropy [N])` in fp32 (fp64 for fp64 logits), both
        differentiable once with respect to `logits`. Neither pass makes an fp32 copy of all logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    checks.check_logits(logits, targets, temperature)
    chosen = select_backend(backend, logits)
    logprobs, entropy, *_ = ops.token_logprobs(
        logits, targets, *split_temperature(temperature), chosen
    )
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
    inplace: bool = False,
    backend: Backend = "auto",
) -> LossOutput:
    """`policy_loss` of `token_logprobs(logits, targets)`, differentiable with respect to `logits`.

    The gradient is computed in the forward. Arguments, results and errors are those of the two
    functions, but for `entropy`, which is computed here and not taken as an argument, and for

        inplace: write the gradient over the logits, which saves their size in memory. They must
            not be read afterwards, and one can differentiate once only. Has no effect where no
            gradient is needed, and under torch.compile.
    """
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
    chosen = select_backend(backend, logits)
    scoring = (targets, *split_temperature(temperature))
    arguments = ops.loss_arguments(loss, inputs)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and gradient and not torch.compiler.is_compiling():
        if any(
            size > 1 and step == 0 for size, step in zip(logits.shape, logits.stride(), strict=True)
        ):
            raise ValueError(
                f"logits has strides {list(logits.stride())}, so that elements share memory; "
                "inplace=True cannot write to it"
            )
        return loss_output(*_InPlace.apply(logits, *scoring, *arguments, chosen))  # type: ignore[misc]
    value, metrics, logprobs, entropy, *_ = ops.grpo_loss(
        logits, *scoring, *arguments, gradient, chosen
    )
    return loss_output(value, metrics, logprobs, entropy)


class _InPlace(torch.autograd.Function):
    """Operators that change an argument cannot have a gradient formula, so this one stands outside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        # Of the detached tensor, so that a leaf is served.
        *outputs, factor = ops.grpo_loss_(logits.detach(), *arguments)
        # So that autograd refuses if another backward still needs the logits.
        torch.autograd.graph.increment_version(logits)
        ctx.gradient, ctx.factor = logits.detach(), factor
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradient is None:
            raise RuntimeError(
                "grpo_loss(inplace=True) has given its gradient away in the first backward; "
                "leave inplace out to differentiate twice"
            )
        gradient, ctx.gradient = ctx.gradient, None
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        by = (grad_loss.to(ctx.factor.dtype) * ctx.factor).expand(gradient.shape)
        torch.mul(gradient, by, out=gradient)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)
