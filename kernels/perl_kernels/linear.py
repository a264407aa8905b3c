"""Functions of hidden states and LM head that never hold the logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .advantage import GroupedRewards
from .dispatch import Backend, select_backend
from .inputs import loss_inputs
from .linear_autograd import HeadCall, differentiable_logprobs, one_pass_loss
from .objective import PolicyLoss
from .onepass import one_pass_form
from .outputs import LossOutput, TokenLogprobs
from .policy import evaluate


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of each target and entropy of each row, from hidden states and LM head.

    The logits are softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature, made for
    `chunk_size` tokens at a time in the forward and again in the backward, so 8NHV operations for
    both, 6NHV if only one of `hidden` and `weight` needs a gradient.

    Args:
        hidden: [N, H].
        weight: [V, H], of the dtype of `hidden` (any under autocast, whose dtype is then used).
        targets: [N] int64 or int32 in [0, V).
        bias: [V], added in fp32.
        temperature: above 0, a float or [N].
        softcap: above 0, or None.
        chunk_size: tokens whose logits are held at once; chosen by memory if left out.
        backend: see `perl_kernels.dispatch`.

    Returns:
        `TokenLogprobs(logprobs [N], entropy [N])` in fp32 (fp64 for fp64 inputs), both
        differentiable once with respect to `hidden`, `weight` and `bias`. The gradient of `weight`
        is accumulated in fp32 over the chunks, and costs nothing if it is frozen.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    select_backend(backend)
    checks.check_linear(hidden, weight, targets, bias, temperature, softcap, chunk_size)
    call = HeadCall.of(hidden, weight, targets, bias, temperature, softcap, chunk_size)
    return TokenLogprobs(*differentiable_logprobs(call))


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """`policy_loss` of `linear_token_logprobs(hidden, weight, targets)`, in one pass if possible.

    Where the coefficient of a token follows from its own log-prob (all token-level losses, and the
    sequence-level ones as long as `old_logprobs` is left out, see `onepass.py`), the gradients of
    `hidden`, `weight` and `bias` are computed in the forward, 6NHV operations; otherwise the logits
    are made a second time in the backward, 8NHV, as always under `torch.compile`. Values and
    gradients are the same either way. `torch.compile` unrolls the loop over chunks: a new N
    recompiles where it changes their number, N / `chunk_size` rounded up.

    Arguments, results and errors are those of the two functions, but for `entropy`: that is
    computed here and not taken as an argument. The gradients of the loss are those with respect to
    `hidden`, `weight` and `bias`.
    """
    select_backend(backend)
    checks.check_linear(hidden, weight, targets, bias, temperature, softcap, chunk_size)
    inputs = loss_inputs(
        hidden,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        weights=weights,
        normalizer=normalizer,
    )
    call = HeadCall.of(hidden, weight, targets, bias, temperature, softcap, chunk_size)
    # Tracing does not see the derivative taken within the forward.
    one_pass = call.needs_gradient() and not torch.compiler.is_compiling()
    form = one_pass_form(loss, inputs) if one_pass else None
    if form is not None:
        return one_pass_loss(call, loss, inputs, form)
    return evaluate(loss, inputs, *differentiable_logprobs(call))
