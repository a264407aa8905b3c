"""Losses of packed log-probs in Triton, one program per completion.

A program goes over its completion up to three times: for the sums that its tokens share, for the
terms, and for what each token's log-prob does to a shared ratio. Rewards of groups are normalised
in the same launch. A second launch adds up what the programs found. Formulas: `coefficient.py`;
semantics: `torch_backend/losses.py`.
"""

# Triton, not Python, compiles the device functions, whose results a type checker cannot tell.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..axes import axes, numbers
from ..inputs import Coefficients, Evaluated, LossInputs
from ..objective import PolicyLoss
from ..outputs import METRICS
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
from .device import (
    bounded,
    correction_weight,
    pessimistic,
    ratio_and_slope,
    token_term,
    vespo_log,
    vespo_weight,
)
from .launch import compile_case, kernel

_BLOCK = 1024
# What each program leaves for the second launch: rows of a table [_PARTIALS, B].
_TERM, _COUNT, _WEIGHT, _WEIGHTED, _INVALID, _RATIO_MAX = (tl.constexpr(i) for i in range(6))
_KL, _ENTROPY, _CLIPPED, _LOW, _HIGH, _DUAL, _RATIO, _GAP, _CORRECTION = (
    tl.constexpr(i) for i in range(6, 15)
)
_PARTIALS = 15


@kernel
def completion_kernel(
    cu_seqlens_ptr,
    logprobs_ptr,
    entropy_ptr,
    advantages_ptr,
    rewards_ptr,
    sizes_ptr,
    reward_weights_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    weights_ptr,
    by_logprob_ptr,
    by_entropy_ptr,
    partials_ptr,
    n_tokens,
    n_completions,
    n_groups,
    n_rewards,
    eps,
    entropy_coef,
    correction_low,
    correction_high,
    k_pos,
    lambda_pos,
    k_neg,
    lambda_neg,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    ratio_cap,
    kl_coef,
    SURROGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    DELTA: tl.constexpr,
    KL: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    RATIO: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Terms, metrics and coefficients of the tokens of one completion."""
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
    by_sequence: tl.constexpr = CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask"
    by_completion: tl.constexpr = RATIO != "token" or SURROGATE == "vespo" or SURROGATE == "gmpo"
    lanes = tl.arange(0, TOKENS).to(tl.int64)

    # First: what the tokens share.
    sum_count = tl.zeros([TOKENS], dtype=tl.float32)
    sum_weight = tl.zeros([TOKENS], dtype=tl.float32)
    sum_ratio = tl.zeros([TOKENS], dtype=tl.float32)
    sum_advantage = tl.zeros([TOKENS], dtype=tl.float32)
    sum_gap = tl.zeros([TOKENS], dtype=tl.float32)
    sum_correction = tl.zeros([TOKENS], dtype=tl.float32)
    if by_completion or by_sequence or SEQUENCE_MEAN:
        for first in range(start, stop, TOKENS):
            token = first + lanes
            weight, counts = weights(weights_ptr, token, token < stop)
            logprob = tl.load(logprobs_ptr + token, mask=counts, other=0.0).to(tl.float32)
            old = optional(old_ptr, token, counts, logprob)
            value = advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN)
            log_ratio = logprob - old
            sum_count += tl.where(counts, 1.0, 0.0)
            sum_weight += weight
            sum_advantage += value
            if SURROGATE == "vespo":
                sum_ratio += bounded(log_ratio)
            elif SURROGATE == "gmpo":
                clipped, _, _ = pessimistic(log_ratio, value, clip_low, clip_high)
                sum_ratio += clipped
            else:
                sum_ratio += log_ratio
            if CORRECTION != "":
                gap = old - optional(rollout_ptr, token, counts, 0.0)
                sum_gap += gap
                if SURROGATE == "vespo" and not by_sequence:
                    correction = correction_weight(CORRECTION, gap, correction_low, correction_high)
                    sum_correction += tl.where(counts, vespo_log(tl.log(correction)), 0.0)
    n = tl.maximum(tl.sum(sum_count, axis=0), 1.0)
    whole_weight = tl.sum(sum_weight, axis=0)
    common = tl.sum(sum_ratio, axis=0)
    whole_correction = 1.0
    if by_sequence:
        whole_correction = correction_weight(
            CORRECTION, tl.sum(sum_gap, axis=0), correction_low, correction_high
        )
    if SURROGATE == "vespo":
        if CORRECTION != "":
            if by_sequence:
                common += vespo_log(tl.log(whole_correction))
            else:
                common += tl.sum(sum_correction, axis=0)
        common = vespo_log(common)
    else:
        common = common / n
    mean_advantage = tl.sum(sum_advantage, axis=0) / n

    # Second: the terms.
    term_sum = tl.zeros([TOKENS], dtype=tl.float32)
    moved = tl.zeros([TOKENS], dtype=tl.float32)
    count_sum = tl.zeros([TOKENS], dtype=tl.float32)
    weight_sum = tl.zeros([TOKENS], dtype=tl.float32)
    invalid_sum = tl.zeros([TOKENS], dtype=tl.float32)
    ratio_max = tl.zeros([TOKENS], dtype=tl.float32)
    kl_sum = tl.zeros([TOKENS], dtype=tl.float32)
    entropy_sum = tl.zeros([TOKENS], dtype=tl.float32)
    clipped_sum = tl.zeros([TOKENS], dtype=tl.float32)
    low_sum = tl.zeros([TOKENS], dtype=tl.float32)
    high_sum = tl.zeros([TOKENS], dtype=tl.float32)
    dual_sum = tl.zeros([TOKENS], dtype=tl.float32)
    ratio_sum = tl.zeros([TOKENS], dtype=tl.float32)
    gap_sum = tl.zeros([TOKENS], dtype=tl.float32)
    correction_sum = tl.zeros([TOKENS], dtype=tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + lanes
        weight, counts = weights(weights_ptr, token, token < stop)
        logprob = tl.load(logprobs_ptr + token, mask=counts, other=0.0).to(tl.float32)
        entropy = optional(entropy_ptr, token, counts, tl.zeros([TOKENS], dtype=tl.float32))
        old = optional(old_ptr, token, counts, logprob)
        ref = optional(ref_ptr, token, counts, logprob)
        rollout = optional(rollout_ptr, token, counts, old)
        value = advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN)
        own_ratio = logprob - old
        log_ratio = own_ratio
        if RATIO != "token":
            log_ratio = common + logprob * 0.0
        correction = whole_correction
        if CORRECTION != "" and not by_sequence:
            correction = correction_weight(
                CORRECTION, old - rollout, correction_low, correction_high
            )
        sequence = 1.0
        gains = value
        if SURROGATE == "vespo":
            sequence = vespo_weight(value, common, k_pos, lambda_pos, k_neg, lambda_neg)
        elif SURROGATE == "gmpo":
            sequence = tl.exp(bounded(common)) + logprob * 0.0
            gains = mean_advantage + logprob * 0.0
        term, by_ratio, kl_by_ratio, by_itself, ratio, kl, low, high, dual = token_term(
            SURROGATE,
            DUAL_CLIP,
            DELTA,
            KL,
            HAS_KL,
            HAS_REF,
            KL_BIAS_CORRECTION,
            log_ratio,
            logprob,
            old,
            ref,
            gains,
            correction,
            sequence,
            clip_low,
            clip_high,
            dual_clip,
            delta,
            tau_pos,
            tau_neg,
            ratio_cap,
            kl_coef,
        )
        if SURROGATE == "gmpo":
            _, low, high = pessimistic(own_ratio, value, clip_low, clip_high)
        if HAS_ENTROPY:
            term -= entropy_coef * entropy
        scale = weight
        if SEQUENCE_MEAN:
            scale = tl.where(weight == 0, 0.0, weight / whole_weight)
        if SURROGATE == "gmpo":
            _, slope = ratio_and_slope(common)
            moved += tl.where(counts, tl.where(slope == 0, 0.0, scale * by_ratio), 0.0)
            by_logprob = scale * (kl_by_ratio + by_itself)
        elif RATIO == "sequence":
            moved += tl.where(counts, scale * (by_ratio + kl_by_ratio), 0.0)
            by_logprob = scale * by_itself
        else:
            by_logprob = scale * (by_ratio + kl_by_ratio + by_itself)
        tl.store(by_logprob_ptr + token, tl.where(counts, by_logprob, 0.0), mask=token < stop)
        if HAS_ENTROPY:
            by_entropy = tl.where(counts, -entropy_coef * scale, 0.0)
            tl.store(by_entropy_ptr + token, by_entropy, mask=token < stop)
        finite = (tl.abs(term) < float("inf")) & (tl.abs(logprob) < float("inf"))
        term_sum += tl.where(counts, scale * term, 0.0)
        count_sum += tl.where(counts, 1.0, 0.0)
        weight_sum += weight
        invalid_sum += tl.where(counts, tl.where(finite, 0.0, 1.0), 0.0)
        # NaN comes in and stays: nothing is above it.
        higher = (ratio > ratio_max) | (ratio != ratio)
        ratio_max = tl.where(counts & higher, ratio, ratio_max)
        kl_sum += tl.where(counts, kl, 0.0)
        entropy_sum += entropy
        low_sum += tl.where(counts & low, 1.0, 0.0)
        high_sum += tl.where(counts & high, 1.0, 0.0)
        clipped_sum += tl.where(counts & (low | high), 1.0, 0.0)
        dual_sum += tl.where(counts & dual, 1.0, 0.0)
        ratio_sum += tl.where(counts, ratio, 0.0)
        gap_sum += rollout - old
        correction_sum += tl.where(counts, correction, 0.0)

    # Third: every token moves the ratio that all of them share.
    if SURROGATE == "gmpo" or RATIO == "sequence":
        share = tl.sum(moved, axis=0) / n
        tl.debug_barrier()
        for first in range(start, stop, TOKENS):
            token = first + lanes
            weight, counts = weights(weights_ptr, token, token < stop)
            by_logprob = tl.load(by_logprob_ptr + token, mask=counts, other=0.0)
            mine = share + by_logprob * 0.0
            if SURROGATE == "gmpo":
                logprob = tl.load(logprobs_ptr + token, mask=counts, other=0.0).to(tl.float32)
                old = optional(old_ptr, token, counts, logprob)
                value = advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN)
                _, low, high = pessimistic(logprob - old, value, clip_low, clip_high)
                mine = tl.where(low | high, 0.0, mine)
            tl.store(by_logprob_ptr + token, by_logprob + mine, mask=counts)

    table = partials_ptr + completion
    tl.store(table + _TERM * n_completions, tl.sum(term_sum, axis=0))
    tl.store(table + _COUNT * n_completions, tl.sum(count_sum, axis=0))
    whole = tl.sum(weight_sum, axis=0)
    tl.store(table + _WEIGHT * n_completions, whole)
    tl.store(table + _WEIGHTED * n_completions, tl.where(whole != 0, 1.0, 0.0))
    tl.store(table + _INVALID * n_completions, tl.sum(invalid_sum, axis=0))
    # The sum carries NaN, which a maximum may drop.
    nan = tl.sum(ratio_max, axis=0) * 0.0
    tl.store(table + _RATIO_MAX * n_completions, tl.max(ratio_max, axis=0) + nan)
    tl.store(table + _KL * n_completions, tl.sum(kl_sum, axis=0))
    tl.store(table + _ENTROPY * n_completions, tl.sum(entropy_sum, axis=0))
    tl.store(table + _CLIPPED * n_completions, tl.sum(clipped_sum, axis=0))
    tl.store(table + _LOW * n_completions, tl.sum(low_sum, axis=0))
    tl.store(table + _HIGH * n_completions, tl.sum(high_sum, axis=0))
    tl.store(table + _DUAL * n_completions, tl.sum(dual_sum, axis=0))
    tl.store(table + _RATIO * n_completions, tl.sum(ratio_sum, axis=0))
    tl.store(table + _GAP * n_completions, tl.sum(gap_sum, axis=0))
    tl.store(table + _CORRECTION * n_completions, tl.sum(correction_sum, axis=0))


@triton.jit
def _total(partials_ptr, row, n_completions, BLOCK: tl.constexpr):
    found = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n_completions, BLOCK):
        column = first + tl.arange(0, BLOCK)
        found += tl.load(
            partials_ptr + row * n_completions + column, mask=column < n_completions, other=0.0
        )
    return tl.sum(found, axis=0)


@kernel
def finish_kernel(
    partials_ptr,
    cu_seqlens_ptr,
    normalizer_ptr,
    out_ptr,
    n_tokens,
    n_completions,
    n_metrics,
    normalizer,
    max_completion_length,
    HAS_NORMALIZER: tl.constexpr,
    AGGREGATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out [12 + 2]`: the metrics in the order of `METRICS`, the loss, and 1 / denominator."""
    # Whether cu_seqlens runs from 0 to N without a step back, which the host has not looked at.
    wrong = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, n_completions, BLOCK):
        column = first + tl.arange(0, BLOCK)
        here = column < n_completions
        low = tl.load(cu_seqlens_ptr + column, mask=here, other=0)
        high = tl.load(cu_seqlens_ptr + column + 1, mask=here, other=0)
        wrong += (high < low).to(tl.int32)
    begin = tl.load(cu_seqlens_ptr)
    end = tl.load(cu_seqlens_ptr + n_completions)
    valid = (tl.sum(wrong, axis=0) == 0) & (begin == 0) & (end == n_tokens)

    count = _total(partials_ptr, _COUNT, n_completions, BLOCK)
    if HAS_NORMALIZER:
        if normalizer_ptr is not None:
            denominator = tl.load(normalizer_ptr).to(tl.float32)
        else:
            denominator = normalizer
        valid = valid & (denominator > 0) & (denominator < float("inf"))
    elif AGGREGATION == "token-mean":
        denominator = _total(partials_ptr, _WEIGHT, n_completions, BLOCK)
    elif AGGREGATION == "seq-mean-token-mean":
        denominator = _total(partials_ptr, _WEIGHTED, n_completions, BLOCK)
    else:
        denominator = n_completions * 1.0
    if AGGREGATION == "seq-mean-token-sum-norm":
        denominator = denominator * max_completion_length
    denominator = tl.where(valid, denominator, float("nan"))

    total = _total(partials_ptr, _TERM, n_completions, BLOCK)
    loss = tl.where(denominator == 0, 0.0, total / denominator)
    loss = tl.where(tl.abs(loss) < float("inf"), loss, float("nan"))
    some = tl.where(count > 0, count, 1.0)
    tl.store(out_ptr + 0, _total(partials_ptr, _KL, n_completions, BLOCK) / some)
    tl.store(out_ptr + 1, _total(partials_ptr, _ENTROPY, n_completions, BLOCK) / some)
    tl.store(out_ptr + 2, _total(partials_ptr, _CLIPPED, n_completions, BLOCK) / some)
    tl.store(out_ptr + 3, _total(partials_ptr, _LOW, n_completions, BLOCK) / some)
    tl.store(out_ptr + 4, _total(partials_ptr, _HIGH, n_completions, BLOCK) / some)
    tl.store(out_ptr + 5, _total(partials_ptr, _DUAL, n_completions, BLOCK) / some)
    mean_ratio = _total(partials_ptr, _RATIO, n_completions, BLOCK) / some
    tl.store(out_ptr + 6, tl.where(count > 0, mean_ratio, 1.0))
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n_completions, BLOCK):
        column = first + tl.arange(0, BLOCK)
        ratio = tl.load(
            partials_ptr + _RATIO_MAX * n_completions + column,
            mask=column < n_completions,
            other=0.0,
        )
        largest = tl.where((ratio > largest) | (ratio != ratio), ratio, largest)
    nan = tl.sum(largest, axis=0) * 0.0
    tl.store(out_ptr + 7, tl.where(count > 0, tl.max(largest, axis=0) + nan, 1.0))
    tl.store(out_ptr + 8, _total(partials_ptr, _GAP, n_completions, BLOCK) / some)
    mean_correction = _total(partials_ptr, _CORRECTION, n_completions, BLOCK) / some
    tl.store(out_ptr + 9, tl.where(count > 0, mean_correction, 1.0))
    tl.store(out_ptr + 10, count)
    invalid = _total(partials_ptr, _INVALID, n_completions, BLOCK)
    tl.store(out_ptr + 11, tl.where(valid, invalid, tl.maximum(n_tokens, 1) * 1.0))
    tl.store(out_ptr + n_metrics, loss)
    tl.store(out_ptr + n_metrics + 1, tl.where(denominator == 0, 0.0, 1.0 / denominator))


def evaluate(
    loss: PolicyLoss, inputs: LossInputs, logprobs: Tensor, entropy: Tensor | None
) -> Evaluated:
    """As `torch_backend.evaluate`, in two launches."""
    inputs = contiguous(inputs)
    device, n_tokens = logprobs.device, logprobs.shape[0]
    n_completions = inputs.cu_seqlens.shape[0] - 1
    has_entropy = loss.entropy_coef != 0 and entropy is not None

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=device)

    by_logprob, by_entropy = empty(n_tokens), empty(n_tokens) if has_entropy else None
    partials, out = empty(_PARTIALS, n_completions), empty(len(METRICS) + 2)
    if n_completions:
        completion_kernel[(n_completions,)](
            logprobs_ptr=logprobs.contiguous(),
            entropy_ptr=None if entropy is None else entropy.contiguous(),
            old_ptr=inputs.old,
            ref_ptr=inputs.ref,
            rollout_ptr=inputs.rollout,
            by_logprob_ptr=by_logprob,
            by_entropy_ptr=by_entropy,
            partials_ptr=partials,
            entropy_coef=float(loss.entropy_coef),
            correction_low=float(loss.correction_low),
            correction_high=float(loss.correction_high),
            k_pos=float(loss.vespo_k_pos),
            lambda_pos=float(loss.vespo_lambda_pos),
            k_neg=float(loss.vespo_k_neg),
            lambda_neg=float(loss.vespo_lambda_neg),
            RATIO=loss.ratio,
            CORRECTION=loss.correction or "",
            HAS_ENTROPY=has_entropy,
            **numbers(loss),
            **axes(loss, inputs.ref is not None),
            **completion_arguments(loss, inputs, n_tokens),
        )
    finish_kernel[(1,)](
        partials_ptr=partials,
        cu_seqlens_ptr=inputs.cu_seqlens,
        normalizer_ptr=inputs.normalizer,
        out_ptr=out,
        n_tokens=n_tokens,
        n_completions=n_completions,
        n_metrics=len(METRICS),
        normalizer=1.0 if inputs.count is None else float(inputs.count),
        max_completion_length=float(loss.max_completion_length or 1.0),
        HAS_NORMALIZER=inputs.count is not None or inputs.normalizer is not None,
        AGGREGATION=loss.aggregation,
        BLOCK=_BLOCK,
        num_warps=WARPS,
    )
    metrics, loss_value, factor = out[:-2], out[-2], out[-1]
    return Evaluated(
        # Outputs of an operator must not share memory.
        loss_value.clone(),
        metrics,
        Coefficients(by_logprob, by_entropy),
        factor.clone(),
    )


def compile_cases() -> list[CompileCase]:
    """The launch variants, see `perl_kernels.resources`: the barest and the fullest."""

    def loss(objective: PolicyLoss, has_ref: bool) -> dict[str, Any]:
        return {
            **axes(objective, has_ref),
            "RATIO": objective.ratio,
            "CORRECTION": objective.correction or "",
            "HAS_ENTROPY": objective.entropy_coef != 0,
        }

    plain = loss(PolicyLoss(), False)
    absent = dict.fromkeys(("entropy_ptr", "ref_ptr", "by_entropy_ptr"))
    shared = PolicyLoss(
        surrogate="gmpo", kl="k3", kl_coef=0.1, entropy_coef=0.1, correction="sequence_mask"
    )
    bare = {**compile_constants(full=False), **plain, **absent}
    full = {**compile_constants(full=True), **loss(shared, True)}
    finish: dict[str, Any] = {
        "HAS_NORMALIZER": False,
        "BLOCK": _BLOCK,
        "AGGREGATION": "token-mean",
        "normalizer_ptr": None,
    }
    return [
        compile_case(name, launched, COMPILE_TYPES, constants, num_warps=WARPS, max_registers=most)
        for name, launched, constants, most in (
            ("clip, token mean", completion_kernel, bare, MAX_REGISTERS),
            ("rewards, weights, gmpo, k3, entropy", completion_kernel, full, MAX_REGISTERS),
            ("token mean", finish_kernel, finish, None),
        )
    ]
