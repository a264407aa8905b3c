"""The loss functions, of log-probs, of logits, or of hidden states and LM head; and the log-probs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks, operators, vocab_parallel
from .advantage import GroupedRewards
from .dispatch import Backend, select_backend, tracing
from .head import Products, autocast_dtype
from .objective import PolicyLoss
from .values import METRICS, LossInputs, LossOutput, TokenLogprobs, compute_dtype


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """The loss `loss` of N scored tokens in B completions.

    Args:
        logprobs: [N] log-prob of each token under the policy.
        advantages: [B], [N] (taken as [B] where B = N), or `GroupedRewards` of the B completions.
        cu_seqlens: [B + 1] int32 or int64, monotone from 0 to N; completions may be empty. On the CPU or
            where the log-probs are; on the CPU its values are checked without a synchronisation.
        loss: what is optimised; the formulas are in `PolicyLoss`.
        old_logprobs: [N] under the policy that the ratio refers to; left out, the policy itself, so
            that every ratio is 1.
        ref_logprobs: [N] under the reference model; needed by a KL term. Without a KL term, the k3
            estimate is reported in the metrics.
        rollout_logprobs: [N] as the rollout engine gave them; needed by `loss.correction`.
        entropy: [N]; needed by an entropy bonus.
        weights: [N] factor of each token's term, at least 0. Tokens of weight 0 take no part in
            anything: sequence ratios are over the other tokens. Their other values may be anything,
            but for targets, which must be in range.
        normalizer: denominator in place of the call's own count (the sum of the weights, or the
            number of sequences): the whole step's, if the step is split over several calls. Above
            0 and finite, a float or a 0-dim tensor.
        backend: see `perl_kernels.dispatch`.

    Returns:
        `LossOutput`, computed in fp32 (fp64 for fp64 log-probs). The loss is differentiable with
        respect to `logprobs` and `entropy`, and everything else is taken as a constant; it is 0
        without tokens, and NaN where an input is NaN or infinite, or the values of a tensor that
        may not be looked at (on a GPU, or under torch.compile) are refused ones (see
        `invalid_rows`).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    checks.check_floating("logprobs", logprobs, 1, "[N]")
    if entropy is not None:
        checks.check_logprobs("entropy", entropy, logprobs.shape[0])
        checks.check_same_device(logprobs, entropy=entropy)
    inputs = _inputs(
        logprobs,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        weights,
        normalizer,
        entropy is not None,
    )
    arguments = operators.loss_arguments(loss, inputs)
    chosen = select_backend(backend, logprobs)
    value, metrics, *_ = operators.policy_loss(logprobs, entropy, *arguments, chosen)
    dtype = compute_dtype(logprobs)
    seen = logprobs.detach().clone().to(dtype)
    if entropy is None:
        return _output(value, metrics, seen, torch.full_like(seen, torch.nan))
    return _output(value, metrics, seen, entropy.detach().clone().to(dtype))


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of each target and entropy of each row of `logits / temperature`.

    Args:
        logits: [N, V], any floating dtype; row t is the one that predicts `targets[t]`. -inf is a
            probability of 0.
        targets: [N] int64 or int32 in [0, V).
        temperature: above 0, a float or [N].
        backend: see `perl_kernels.dispatch`.

    Returns:
        `TokenLogprobs(logprobs [N], entropy [N])` in fp32 (fp64 for fp64 logits), both
        differentiable once with respect to `logits`. Neither pass makes an fp32 copy of all logits.
        NaN in a row with a NaN, +inf, or nothing above -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    checks.check_logits(logits, targets, temperature)
    chosen = select_backend(backend, logits, logits.dtype)
    scoring = operators.scoring_arguments(targets, temperature)
    return TokenLogprobs(*operators.token_logprobs(logits, *scoring, chosen)[:2])


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

    Arguments, results and errors are those of the two functions, but for `entropy`, which is
    computed here and not taken as an argument, and for

        inplace: compute the gradient in the forward, while the logits are at hand, and write it over
            them: that saves their size in memory and a pass over them. They must not be read
            afterwards, and one can differentiate once only. Has no effect where no gradient is
            needed, and under torch.compile.
    """
    checks.check_logits(logits, targets, temperature)
    inputs = _inputs(
        logits,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        weights,
        normalizer,
    )
    chosen = select_backend(backend, logits, logits.dtype)
    if inplace and _needs_gradient(logits) and not tracing():
        if any(
            size > 1 and step == 0 for size, step in zip(logits.shape, logits.stride(), strict=True)
        ):
            raise ValueError(
                f"logits has strides {list(logits.stride())}, so that elements share memory; "
                "inplace=True cannot write to it"
            )
        arguments = operators.loss_arguments(loss, inputs, temperature)
        per_row = operators.per_row(temperature)
        return _output(*_InPlace.apply(logits, targets, per_row, *arguments, chosen))  # type: ignore[misc]
    scoring = operators.scoring_arguments(targets, temperature)
    logprobs, entropy, *_ = operators.token_logprobs(logits, *scoring, chosen)
    return _of_rows(logprobs, entropy, loss, inputs, chosen)


class _InPlace(torch.autograd.Function):
    """Operators that change an argument cannot have a gradient formula, so this one stands outside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        # Of the detached tensor, so that a leaf is served.
        *outputs, ctx.unit = operators.grpo_loss_(logits.detach(), *arguments)
        # So that autograd refuses if another backward still needs the logits.
        torch.autograd.graph.increment_version(logits)
        ctx.gradient, ctx.backend = logits.detach(), arguments[-1]
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(operators.ONCE)
        if ctx.gradient is None:
            raise RuntimeError(
                "grpo_loss(inplace=True) has given its gradient away in the first backward; "
                "leave inplace out to differentiate twice"
            )
        gradient, ctx.gradient = ctx.gradient, None
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        by = grad_loss / ctx.unit if ctx.unit.numel() else grad_loss
        operators.scale_(gradient, by, ctx.backend)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of each target and entropy of each row, from hidden states and LM head.

    The logits are softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature, made for a
    block of tokens at a time in the forward and again in the backward, so 8NHV operations for
    both, 6NHV if only one of `hidden` and `weight` needs a gradient.

    Args:
        hidden: [N, H]; row t is the one that predicts `targets[t]`.
        weight: [V, H], of the dtype of `hidden` (any under autocast, whose dtype is then used).
        targets: [N] int64 or int32 in [0, V).
        bias: [V], added in fp32; without a softcap, -inf leaves a column out.
        temperature: above 0, a float or [N].
        softcap: above 0, or None.
        logits_dtype: what the product's fp32 sums are rounded to: the dtype of its operands if left
            out, or torch.float32, which keeps them as they are, without an fp32 product, at twice
            the memory of a block and, for the gradients, half as much again.
        chunk_size: tokens of a block.
        memory_budget: bytes of a block of logits, in place of `chunk_size`; if both are left out,
            see `perl_kernels.head.block_rows`.
        group: the ranks that the head is split over, each with its own consecutive rows of it, in
            rank order: `weight [V_rank, H]` and `bias [V_rank]`, where V_rank may differ and be 0.
            See below.
        backend: see `perl_kernels.dispatch`.

    With a `group` every rank of it makes this call with the same `hidden`, `temperature`, `softcap`
    and `targets`, which are ids of the whole vocabulary, and gets the same results to the last bit.
    Every rank makes the backward too, with the same derivatives of the one loss by `logprobs` and
    `entropy`; the gradient of `hidden` is then the whole one, the same on all ranks, and those of
    `weight` and `bias` are those of the rank's rows. `hidden` must need a gradient on all ranks or
    on none. The price: in the forward two collectives, of 4 integers and of 4 numbers per token;
    in the backward one, the sum over the ranks of the gradient [N, H], in fp32 also for narrower
    inputs; none if `hidden` needs no gradient. The host does not wait for a GPU, but with
    PERL_CHECKS=1 does. An error in the arguments of only one rank leaves the others waiting, and
    `torch.compile` breaks its graph at the call.

    Returns:
        `TokenLogprobs(logprobs [N], entropy [N])` in fp32 (fp64 for fp64 inputs), both
        differentiable once with respect to `hidden`, `weight` and `bias`. The gradient of `weight`
        is accumulated in fp32 over the blocks, and costs nothing if it is frozen.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    group = _check_head(hidden, weight, targets, bias, temperature, softcap, group)
    products = _products(hidden, logits_dtype, chunk_size, memory_budget)
    chosen = select_backend(backend, hidden, products.operands)
    if group is not None:
        return TokenLogprobs(
            *vocab_parallel.linear_token_logprobs(
                hidden, weight, bias, targets, temperature, softcap, products, chosen, group
            )
        )
    scoring = operators.scoring_arguments(targets, temperature, softcap)
    found = operators.linear_token_logprobs(hidden, weight, bias, *scoring, *products, chosen)
    return TokenLogprobs(*found[:2])


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
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    skip_idle: bool = False,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """`policy_loss` of `linear_token_logprobs(hidden, weight, targets)`, in one pass if possible.

    The gradients of `hidden`, `weight` and `bias` are computed in the forward. Where the
    coefficient of a token follows from its own log-prob (all token-level losses, and the
    sequence-level ones as long as `old_logprobs` is left out, see `onepass.py`), the logits are
    made once: 6NHV operations, 4NHV with a frozen `weight`. Else that holds for completions that
    fit in a block, if `cu_seqlens` is on the CPU; other logits are made twice, 8NHV.

    Arguments, results and errors are those of the two functions, but for `entropy`, which is
    computed here and not taken as an argument, and for

        skip_idle: leave rows whose coefficient is exactly 0 (advantage 0 and no KL or entropy
            term, clipped, weight 0) out of the two products of the gradient. With a share f of
            active rows 2 + 4f NHV operations are left of 6. The host waits once per block for the
            number of active rows, and they are copied together; so it pays only where many rows
            are idle (LOG.md has figures), and cannot be captured in a CUDA graph.
        group: as in `linear_token_logprobs`, with its collectives and no others. All ranks give the
            same tokens, advantages, log-probs and weights too, and get the same loss and metrics to
            the last bit. A rank makes its part of the logits twice, in the forward and in the
            backward: 8NHV_rank operations, 6NHV_rank with a frozen `weight`.

    The gradients of the loss are those with respect to `hidden`, `weight` and `bias`.
    """
    group = _check_head(hidden, weight, targets, bias, temperature, softcap, group)
    inputs = _inputs(
        hidden,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        weights,
        normalizer,
    )
    products = _products(hidden, logits_dtype, chunk_size, memory_budget)
    chosen = select_backend(backend, hidden, products.operands)
    if group is not None:
        found = vocab_parallel.linear_token_logprobs(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            softcap,
            products,
            chosen,
            group,
            bool(skip_idle),
        )
        return _of_rows(*found, loss, inputs, chosen)
    value, metrics, logprobs, entropy, *_ = operators.linear_grpo_loss(
        hidden,
        weight,
        bias,
        targets,
        operators.per_row(temperature),
        *operators.loss_arguments(loss, inputs, temperature, softcap),
        [_needs_gradient(tensor) for tensor in (hidden, weight, bias)],
        bool(skip_idle),
        *products,
        chosen,
    )
    return _output(value, metrics, logprobs, entropy)


def _of_rows(
    logprobs: Tensor, entropy: Tensor, loss: PolicyLoss, inputs: LossInputs, backend: str
) -> LossOutput:
    # Without a bonus no gradient comes from the entropy, which would cost half a pass.
    bonus = entropy if loss.entropy_coef != 0 else entropy.detach()
    arguments = operators.loss_arguments(loss, inputs)
    value, metrics, *_ = operators.policy_loss(logprobs, bonus, *arguments, backend)
    return _output(value, metrics, logprobs.detach(), entropy.detach())


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    group: ProcessGroup | None,
) -> ProcessGroup | None:
    """The group that the head is split over, None where one process has all of it."""
    given = (hidden, weight, targets, bias, temperature, softcap)
    if group is not None:
        vocab_parallel.check_shard(*given, group)
        if group.size() > 1:
            return group
    checks.check_linear(*given)
    return None


def _inputs(
    like: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
    has_entropy: bool = True,
) -> LossInputs:
    """The arguments that all losses have in common, checked against `like [N, ...]`, the tensor that
    is scored."""
    n_tokens = like.shape[0]
    checks.check_objective(loss, ref_logprobs, rollout_logprobs, has_entropy)
    bounds = checks.check_cu_seqlens(cu_seqlens, n_tokens)
    checks.check_advantages(advantages, bounds.shape[0] - 1, n_tokens)
    checks.check_normalizer(normalizer)
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    for name, tensor in optional.items():
        if tensor is not None:
            checks.check_logprobs(name, tensor, n_tokens)
    if weights is not None:
        checks.check_weights(weights, n_tokens)
    grouped = advantages.checked() if isinstance(advantages, GroupedRewards) else None
    checks.check_same_device(
        like,
        advantages=advantages if grouped is None else grouped.rewards,
        weights=weights,
        **optional,
    )
    if bounds.device.type != "cpu":
        checks.check_same_device(like, cu_seqlens=bounds)
    if isinstance(normalizer, Tensor) and normalizer.device.type != "cpu":
        checks.check_same_device(like, normalizer=normalizer)
    on_device = isinstance(normalizer, Tensor)
    return LossInputs(
        bounds,
        advantages if grouped is None else None,  # type: ignore[arg-type]
        grouped,
        *optional.values(),
        weights=weights,
        normalizer=normalizer.detach() if on_device else None,  # type: ignore[union-attr]
        count=None if on_device or normalizer is None else float(normalizer),
    )


def _products(
    hidden: Tensor,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> Products:
    checks.check_blocks(logits_dtype, chunk_size, memory_budget)
    operands = autocast_dtype(hidden)
    wide = logits_dtype == torch.float32 and operands.itemsize < 4
    kept = torch.float32 if wide else operands
    return Products(chunk_size or 0, memory_budget or 0, operands, kept)


def _needs_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _output(loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor) -> LossOutput:
    return LossOutput(loss, logprobs, entropy, dict(zip(METRICS, metrics.unbind(), strict=True)))
