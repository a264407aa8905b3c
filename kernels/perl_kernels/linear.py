"""Functions of hidden states and LM head that never hold the logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks, ops, vocab_parallel
from .advantage import GroupedRewards
from .arguments import loss_inputs
from .dispatch import Backend, select_backend
from .objective import PolicyLoss
from .outputs import LossOutput, TokenLogprobs, loss_output
from .scalars import split_temperature
from .tuning import persistent_wanted


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
        bias: [V], added in fp32.
        temperature: above 0, a float or [N].
        softcap: above 0, or None.
        logits_dtype: what the product's fp32 sums are rounded to: the dtype of its operands if left
            out, or torch.float32, which keeps them as they are, without an fp32 product, at twice
            the memory of a block and, for the gradients, half as much again.
        chunk_size: tokens of a block.
        memory_budget: bytes of a block of logits, in place of `chunk_size`; if both are left out,
            1.25 GiB on a GPU and 4 MiB, but at least 128 tokens, on a CPU.
        group: the ranks that the head is split over, each with its own consecutive rows of it, in
            rank order: `weight [V_rank, H]` and `bias [V_rank]`, where V_rank may differ and be 0.
            See below.
        backend: see `perl_kernels.dispatch`.

    With a `group` every rank of it makes this call with the same `hidden`, `temperature`, `softcap`
    and `targets`, which are ids of the whole vocabulary, and gets the same results to the last bit.
    Every rank makes the backward too, with the same derivatives of the one loss by `logprobs` and
    `entropy`; the gradient of `hidden` is then the whole one, the same on all ranks, and those of
    `weight` and `bias` are those of the rank's rows. `hidden` must need a gradient on all ranks or
    on none. The price: in the forward two collectives, of 3 integers and of 4 numbers per token;
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
    given = (hidden, weight, targets, bias, temperature, softcap)
    if group is None:
        checks.check_linear(*given)
    else:
        vocab_parallel.check_shard(*given, group)
    arguments = (
        hidden,
        weight,
        bias,
        targets,
        *split_temperature(temperature),
        None if softcap is None else float(softcap),
        *_products(hidden, weight, logits_dtype, chunk_size, memory_budget),
    )
    chosen = select_backend(backend, hidden)
    if group is None:
        forward_only = not any(_needs_gradient(tensor) for tensor in (hidden, weight, bias))
        persistent = forward_only and chosen == "triton" and persistent_wanted()
        logprobs, entropy, *_ = ops.linear_token_logprobs(*arguments, persistent, chosen)
    else:
        logprobs, entropy = vocab_parallel.linear_token_logprobs(*arguments, chosen, group)
    return TokenLogprobs(logprobs, entropy)


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

    The gradients of the loss are those with respect to `hidden`, `weight` and `bias`.
    """
    checks.check_linear(hidden, weight, targets, bias, temperature, softcap)
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
    needs = [_needs_gradient(tensor) for tensor in (hidden, weight, bias)]
    value, metrics, logprobs, entropy, *_ = ops.linear_grpo_loss(
        hidden,
        weight,
        bias,
        targets,
        *split_temperature(temperature),
        None if softcap is None else float(softcap),
        *ops.loss_arguments(loss, inputs),
        *needs,
        bool(skip_idle),
        *_products(hidden, weight, logits_dtype, chunk_size, memory_budget),
        select_backend(backend, hidden),
    )
    return loss_output(value, metrics, logprobs, entropy)


def _products(
    hidden: Tensor,
    weight: Tensor,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[int | None, int | None, torch.dtype, torch.dtype]:
    """Rows or bytes of a block, dtype of the operands, dtype of the logits."""
    checks.check_blocks(logits_dtype, chunk_size, memory_budget)
    device = hidden.device
    # Like autocast itself, leave fp64 alone.
    cast = torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64
    matmul_dtype = torch.get_autocast_dtype(device.type) if cast else hidden.dtype
    wide = logits_dtype == torch.float32 and matmul_dtype.itemsize < 4
    kept = torch.float32 if wide else matmul_dtype
    return chunk_size, memory_budget, matmul_dtype, kept


def _needs_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
