"""What the rows of a token-level loss need from their completion, in one launch: advantages, folded
with what is known beforehand, and the scale of the aggregation. Semantics: `torch_backend.prepare`."""

# Triton, not Python, compiles the device functions, whose results a type checker cannot tell.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton.language as tl

from ..inputs import LossInputs, Prepared
from ..objective import PolicyLoss
from ..onepass import Fold
from .compile_case import CompileCase
from .completion import (
    COMPILE_TYPES,
    MAX_REGISTERS,
    WARPS,
    advantages,
    bounds,
    compile_constants,
    completion_arguments,
    contiguous,
    optional,
    shared_advantage,
    weights,
)
from .device import correction_weight
from .launch import compile_case, kernel


@kernel
def prepare_kernel(
    cu_seqlens_ptr,
    advantages_ptr,
    rewards_ptr,
    sizes_ptr,
    reward_weights_ptr,
    old_ptr,
    rollout_ptr,
    weights_ptr,
    out_advantages_ptr,
    out_scale_ptr,
    n_tokens,
    n_completions,
    n_groups,
    n_rewards,
    eps,
    correction_low,
    correction_high,
    FOLD: tl.constexpr,
    CORRECTION: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`Prepared` for the tokens of one completion."""
    completion = tl.program_id(0).to(tl.int64)
    start, stop = bounds(cu_seqlens_ptr, completion, n_tokens)
    shared = shared_advantage(
        completion,
        n_completions,
        advantages_ptr,
        rewards_ptr,
        sizes_ptr,
        reward_weights_ptr,
        n_groups,
        n_rewards,
        eps,
        PER_TOKEN,
        SCALE,
        LEAVE_ONE_OUT,
        UNBIASED,
        BLOCK,
        SCAN,
    )
    lanes = tl.arange(0, TOKENS).to(tl.int64)
    count = tl.zeros([TOKENS], dtype=tl.float32)
    sum_weight = tl.zeros([TOKENS], dtype=tl.float32)
    sum_advantage = tl.zeros([TOKENS], dtype=tl.float32)
    sum_weighted = tl.zeros([TOKENS], dtype=tl.float32)
    sum_log = tl.zeros([TOKENS], dtype=tl.float32)
    if SEQUENCE_MEAN or FOLD != "none":
        for first in range(start, stop, TOKENS):
            token = first + lanes
            weight, counts = weights(weights_ptr, token, token < stop)
            value = advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN)
            count += tl.where(counts, 1.0, 0.0)
            sum_weight += weight
            sum_advantage += value
            sum_weighted += tl.where(counts, weight * value, 0.0)
            if FOLD == "correction":
                old = optional(old_ptr, token, counts, 0.0)
                sum_log += old - optional(rollout_ptr, token, counts, 0.0)
    n = tl.maximum(tl.sum(count, axis=0), 1.0)
    whole_weight = tl.sum(sum_weight, axis=0)
    for first in range(start, stop, TOKENS):
        token = first + lanes
        weight, counts = weights(weights_ptr, token, token < stop)
        value = advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN)
        if FOLD == "correction":
            if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
                log_weight = tl.sum(sum_log, axis=0)
            else:
                old = optional(old_ptr, token, counts, 0.0)
                log_weight = old - optional(rollout_ptr, token, counts, 0.0)
            value *= correction_weight(CORRECTION, log_weight, correction_low, correction_high)
        elif FOLD == "shared":
            value = tl.sum(sum_weighted, axis=0) / n / weight
        elif FOLD == "shared_gmpo":
            value = (tl.sum(sum_advantage, axis=0) / n) * (whole_weight / n) / weight
        scale = weight
        if SEQUENCE_MEAN:
            scale = tl.where(weight == 0, 0.0, weight / whole_weight)
        tl.store(out_advantages_ptr + token, tl.where(counts, value, 0.0), mask=token < stop)
        tl.store(out_scale_ptr + token, scale, mask=token < stop)


def prepare(
    loss: PolicyLoss, inputs: LossInputs, fold: Fold, n_tokens: int, dtype: torch.dtype
) -> Prepared:
    """As `torch_backend.prepare`, in one launch."""
    inputs = contiguous(inputs)
    n_completions = inputs.cu_seqlens.shape[0] - 1
    out = torch.empty(2, n_tokens, dtype=torch.float32, device=inputs.cu_seqlens.device)
    if n_completions:
        prepare_kernel[(n_completions,)](
            old_ptr=inputs.old,
            rollout_ptr=inputs.rollout,
            out_advantages_ptr=out[0],
            out_scale_ptr=out[1],
            correction_low=float(loss.correction_low),
            correction_high=float(loss.correction_high),
            FOLD=fold,
            CORRECTION=loss.correction or "",
            **completion_arguments(loss, inputs, n_tokens),
        )
    return Prepared(*out.unbind())


def compile_cases() -> list[CompileCase]:
    """The launch variants, see `perl_kernels.resources`: the barest and the fullest."""
    bare = {**compile_constants(full=False), "old_ptr": None, "FOLD": "none", "CORRECTION": ""}
    full = {
        **compile_constants(full=True),
        "FOLD": "correction",
        "CORRECTION": "token_truncate",
    }
    return [
        compile_case(
            name,
            prepare_kernel,
            COMPILE_TYPES,
            constants,
            num_warps=WARPS,
            max_registers=MAX_REGISTERS,
        )
        for name, constants in (("token mean", bare), ("rewards, weights, correction", full))
    ]
