"""Completions and groups in Triton: the same as `completions_torch.py`, in three launches a loss
instead of more than a hundred operations.

`group_advantages` is one launch of one program. `prepare` is one launch with a program for each
completion, after one for their sums of weights if there are weights. `evaluate` is one launch with a
program for each completion, or for each block of tokens where tokens do not depend on each other,
and one that adds up what the programs found: nothing is added in an order that may change.
"""

# Triton, not Python, compiles the device functions, whose results a type checker cannot tell.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient import Token
from .coefficient_triton import (
    bounded,
    correction_weight,
    pessimistic,
    ratio_and_slope,
    token_term,
    vespo_log,
    vespo_weight,
)
from .objective import PolicyLoss, coefficient_arguments
from .values import (
    METRICS,
    Coefficients,
    Evaluated,
    GroupAdvantages,
    LossInputs,
    Prepared,
    Rewards,
    compute_dtype,
)

_TOKENS = 1024  # of a completion, at once
_COMPLETIONS = 256  # of the batch, at once
_GROUPS, _ROLLOUTS = 16, 16  # groups at once, and rollouts of each
_WARPS = 8


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel that is not compiled anew for other counts, nor for tensors that start elsewhere."""
    names = list(inspect.signature(function).parameters)
    return triton.jit(
        do_not_specialize=[name for name in names if name.startswith("n_")],
        do_not_specialize_on_alignment=[name for name in names if name.endswith("_ptr")],
    )(function)


def _readable(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as kernels read it: without gaps, a byte for each bool."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


class _Sums(NamedTuple):
    """Over tokens, in the order of `METRICS`, then the loss."""

    kl: Any
    entropy: Any
    clipped: Any
    low: Any
    high: Any
    dual: Any
    ratio: Any
    ratio_max: Any
    gap: Any
    correction: Any
    count: Any
    invalid: Any
    loss: Any


_N_SUMS = tl.constexpr(len(_Sums._fields))
_ROW = tl.constexpr(16)  # floats that each program leaves its sums in


# ---- completions


@triton.jit
def _bounds(cu_seqlens_ptr, valid, n_completions, n_tokens):
    """First token of this program and the first behind: of its completion, or, where `cu_seqlens`
    cannot be used, of its share of all tokens, so that each is written."""
    program = tl.program_id(0).to(tl.int64)
    inside = program < n_completions
    start = tl.load(cu_seqlens_ptr + program, mask=inside, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + program + 1, mask=inside, other=0).to(tl.int64)
    share = tl.cdiv(n_tokens, tl.num_programs(0)).to(tl.int64)
    start = tl.where(valid, start, program * share)
    stop = tl.where(valid, stop, tl.minimum(start + share, n_tokens))
    return start, stop


@triton.jit
def _valid(cu_seqlens_ptr, n_completions, n_tokens, BLOCK: tl.constexpr):
    """Whether `cu_seqlens` runs from 0 to N without a step back, and how many completions have
    tokens."""
    back = tl.zeros([BLOCK], dtype=tl.int32)
    filled = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, n_completions, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < n_completions
        start = tl.load(cu_seqlens_ptr + index, mask=inside, other=0)
        stop = tl.load(cu_seqlens_ptr + index + 1, mask=inside, other=0)
        back += (stop < start).to(tl.int32)
        filled += (stop > start).to(tl.int32)
    begin = tl.load(cu_seqlens_ptr)
    end = tl.load(cu_seqlens_ptr + n_completions)
    valid = (begin == 0) & (end == n_tokens) & (tl.sum(back, axis=0) == 0)
    return valid, tl.sum(filled, axis=0)


@_kernel
def weight_kernel(
    cu_seqlens_ptr,
    weights_ptr,
    totals_ptr,
    n_completions,
    n_tokens,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`totals [B]`: sum of the weights of each completion."""
    valid, _ = _valid(cu_seqlens_ptr, n_completions, n_tokens, BLOCK)
    start, stop = _bounds(cu_seqlens_ptr, valid, n_completions, n_tokens)
    total = tl.zeros([TOKENS], dtype=tl.float64)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        total += tl.load(weights_ptr + token, mask=token < stop, other=0).to(tl.float64)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(total, axis=0))


@_kernel
def prepare_kernel(
    cu_seqlens_ptr,
    advantages_ptr,
    weights_ptr,
    totals_ptr,
    normalizer_ptr,
    out_advantages_ptr,
    out_scale_ptr,
    out_valid_ptr,
    n_completions,
    n_tokens,
    count,
    max_completion_length,
    AGGREGATION: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Prepared`."""
    program = tl.program_id(0).to(tl.int64)
    valid, filled = _valid(cu_seqlens_ptr, n_completions, n_tokens, BLOCK)
    start, stop = _bounds(cu_seqlens_ptr, valid, n_completions, n_tokens)
    if normalizer_ptr is not None:
        denominator = tl.load(normalizer_ptr).to(tl.float64)
        valid = valid & (denominator > 0) & (denominator < float("inf"))
    elif HAS_COUNT:
        denominator = count
    elif AGGREGATION == "token-mean" or AGGREGATION == "seq-mean-token-mean":
        if weights_ptr is None:
            denominator = (n_tokens if AGGREGATION == "token-mean" else filled).to(tl.float64)
        else:
            found = tl.zeros([BLOCK], dtype=tl.float64)
            for first in range(0, n_completions, BLOCK):
                index = first + tl.arange(0, BLOCK)
                total = tl.load(totals_ptr + index, mask=index < n_completions, other=0.0)
                found += total if AGGREGATION == "token-mean" else tl.where(total != 0, 1.0, 0.0)
            denominator = tl.sum(found, axis=0)
    else:
        denominator = n_completions.to(tl.float64)
    if AGGREGATION == "seq-mean-token-mean":
        if weights_ptr is None:
            denominator *= (stop - start).to(tl.float64)
        else:
            denominator *= tl.load(totals_ptr + program)
    elif AGGREGATION == "seq-mean-token-sum-norm":
        denominator *= max_completion_length
    share = tl.where(valid, 1.0 / denominator, float("nan"))
    # An infinite weight must not take the others out.
    share = tl.where(share == 0, float("nan"), share).to(tl.float32)

    value = 0.0
    if not PER_TOKEN:
        value = tl.load(advantages_ptr + program, mask=program < n_completions, other=0)
        value = value.to(tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < stop
        weight = tl.where(inside, 1.0, 0.0)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + token, mask=inside, other=0).to(tl.float32)
        advantage = value + weight * 0.0
        if PER_TOKEN:
            advantage = tl.load(advantages_ptr + token, mask=inside, other=0).to(tl.float32)
        # The advantage is a factor of every policy term, so that the row and the loss become NaN.
        usable = (weight >= 0) & (weight < float("inf"))
        advantage = tl.where(weight == 0, 0.0, tl.where(usable, advantage, float("nan")))
        # Where nothing counts, the denominator may be 0.
        scale = tl.where(weight == 0, 0.0, weight * share)
        tl.store(out_advantages_ptr + token, advantage, mask=inside)
        tl.store(out_scale_ptr + token, scale, mask=inside)
    if program == 0:
        tl.store(out_valid_ptr, valid)


def prepare(loss: PolicyLoss, inputs: LossInputs, n_tokens: int, dtype: torch.dtype) -> Prepared:
    """What a token's term needs beside log-probs; see `Prepared`."""
    device = inputs.cu_seqlens.device
    cu_seqlens, weights = inputs.cu_seqlens.contiguous(), _readable(inputs.weights)
    advantages, normalizer, count = inputs.advantages, inputs.normalizer, inputs.count
    if advantages is None:
        assert inputs.rewards is not None
        advantages = group_advantages(inputs.rewards).advantages
    if normalizer is not None and normalizer.device != device:
        # On the host; reading it waits for nothing.
        normalizer, count = None, float(normalizer)
    n_completions = cu_seqlens.shape[0] - 1
    grid = (max(n_completions, 1),)
    spans: dict[str, Any] = {
        "cu_seqlens_ptr": cu_seqlens,
        "weights_ptr": weights,
        "totals_ptr": None,
        "n_completions": n_completions,
        "n_tokens": n_tokens,
        "TOKENS": _TOKENS,
        "BLOCK": _COMPLETIONS,
        "num_warps": _WARPS,
    }
    by_weight = loss.aggregation in ("token-mean", "seq-mean-token-mean")
    if weights is not None and by_weight:
        spans["totals_ptr"] = torch.empty(grid, dtype=torch.float64, device=device)
        weight_kernel[grid](**spans)
    out = torch.empty(2, n_tokens, dtype=torch.float32, device=device).unbind()
    valid = torch.empty((), dtype=torch.bool, device=device)
    prepare_kernel[grid](
        advantages_ptr=_readable(advantages),
        normalizer_ptr=normalizer,
        out_advantages_ptr=out[0],
        out_scale_ptr=out[1],
        out_valid_ptr=valid,
        count=float(count or 0.0),
        max_completion_length=float(loss.max_completion_length or 0.0),
        AGGREGATION=loss.aggregation,
        HAS_COUNT=count is not None,
        PER_TOKEN=inputs.per_token,
        **spans,
    )
    return Prepared(*out, valid)


class _Tokens(NamedTuple):
    """What is read of each token; pointers or None, or what stands there."""

    scale: Any
    advantage: Any
    logprob: Any
    entropy: Any
    old: Any
    ref: Any
    rollout: Any


@triton.jit
def _optional(pointer, token, counts, otherwise):
    if pointer is not None:
        otherwise = tl.load(pointer + token, mask=counts, other=0.0).to(tl.float32)
    return otherwise


@triton.jit
def _load(pointers, token, inside):
    """What is read of some tokens, 0 where they do not count, and whether they do."""
    scale = tl.load(pointers.scale + token, mask=inside, other=0.0)
    counts = scale != 0
    logprob = _optional(pointers.logprob, token, counts, scale)
    old = _optional(pointers.old, token, counts, logprob)
    loaded = _Tokens(
        scale,
        _optional(pointers.advantage, token, counts, scale),
        logprob,
        _optional(pointers.entropy, token, counts, scale * 0.0),
        old,
        _optional(pointers.ref, token, counts, logprob),
        _optional(pointers.rollout, token, counts, old),
    )
    return loaded, counts


@_kernel
def loss_kernel(
    cu_seqlens_ptr,
    valid_ptr,
    scale_ptr,
    advantages_ptr,
    logprobs_ptr,
    entropy_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    by_logprob_ptr,
    by_entropy_ptr,
    sums_ptr,
    n_completions,
    n_tokens,
    numbers,
    AXES: tl.constexpr,
    COUPLED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Coefficients of the tokens of one completion, and their sums; with `COUPLED` a completion's
    tokens depend on each other."""
    by_sequence: tl.constexpr = (
        AXES.correction == "sequence_truncate" or AXES.correction == "sequence_mask"
    )
    by_ratio: tl.constexpr = AXES.ratio == "sequence" or AXES.surrogate == "gmpo"
    pointers = _Tokens(
        scale_ptr, advantages_ptr, logprobs_ptr, entropy_ptr, old_ptr, ref_ptr, rollout_ptr
    )
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TOKENS)
    zeros = tl.zeros([TOKENS], dtype=tl.float32)
    start = program * TOKENS
    stop = tl.minimum(start + TOKENS, n_tokens)

    # First: what the tokens share.
    n = 1.0
    shared = 0.0
    mean_advantage = 0.0
    correction = zeros + 1.0
    if COUPLED:
        start, stop = _bounds(cu_seqlens_ptr, tl.load(valid_ptr) != 0, n_completions, n_tokens)
        counted = tl.zeros([TOKENS], dtype=tl.float64)
        ratios = tl.zeros([TOKENS], dtype=tl.float64)
        gains = tl.zeros([TOKENS], dtype=tl.float64)
        gaps = tl.zeros([TOKENS], dtype=tl.float64)
        for first in range(start, stop, TOKENS):
            here, counts = _load(pointers, first + lanes, first + lanes < stop)
            log_ratio = here.logprob - here.old
            if AXES.surrogate == "vespo":
                log_ratio = bounded(log_ratio)
                if AXES.correction != "" and not by_sequence:
                    weight = correction_weight(AXES, numbers, here.old - here.rollout)
                    log_ratio += tl.where(counts, vespo_log(tl.log(weight)), 0.0)
            elif AXES.surrogate == "gmpo":
                log_ratio, _, _ = pessimistic(numbers, log_ratio, here.advantage)
            counted += tl.where(counts, 1.0, 0.0)
            ratios += log_ratio
            gains += here.advantage
            gaps += here.old - here.rollout
        n = tl.maximum(tl.sum(counted, axis=0), 1.0)
        shared = tl.sum(ratios, axis=0)
        mean_advantage = (tl.sum(gains, axis=0) / n).to(tl.float32)
        if by_sequence:
            correction = correction_weight(
                AXES, numbers, zeros + tl.sum(gaps, axis=0).to(tl.float32)
            )
        if AXES.surrogate == "vespo":
            shared = zeros + shared.to(tl.float32)
            if by_sequence:
                shared += vespo_log(tl.log(correction))
            shared = vespo_log(shared)
        else:
            shared = zeros + (shared / n).to(tl.float32)

    # Second: the terms.
    moved = tl.zeros([TOKENS], dtype=tl.float64)
    sums = _Sums(
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    )
    for first in range(start, stop, TOKENS):
        token = first + lanes
        here, counts = _load(pointers, token, token < stop)
        log_ratio = here.logprob - here.old
        advantage = here.advantage
        sequence = zeros + 1.0
        low = counts
        high = counts
        if AXES.surrogate == "vespo":
            sequence = vespo_weight(numbers, advantage, shared)
        elif AXES.surrogate == "gmpo":
            _, low, high = pessimistic(numbers, log_ratio, advantage)
            sequence = tl.exp(bounded(shared))
            advantage = zeros + mean_advantage
        elif AXES.ratio != "token":
            log_ratio = shared
        if AXES.correction != "" and not by_sequence:
            correction = correction_weight(AXES, numbers, here.old - here.rollout)
        term = token_term(
            AXES,
            numbers,
            Token(log_ratio, here.logprob, here.old, here.ref, advantage, correction, sequence),
        )
        if AXES.surrogate != "gmpo":
            low = term.low
            high = term.high
        value = term.value
        if AXES.has_entropy:
            value -= numbers.entropy_coef * here.entropy
            by_entropy = -numbers.entropy_coef * here.scale
            tl.store(by_entropy_ptr + token, by_entropy, mask=token < stop)
        by_logprob = here.scale * term.by_logprob
        if AXES.surrogate == "gmpo":
            _, slope = ratio_and_slope(shared)
            share = tl.where(slope == 0, 0.0, here.scale * term.by_ratio)
            moved += tl.where(counts, share, 0.0)
            by_logprob += here.scale * term.kl_by_ratio
        elif by_ratio:
            moved += tl.where(counts, here.scale * (term.by_ratio + term.kl_by_ratio), 0.0)
        else:
            by_logprob += here.scale * (term.by_ratio + term.kl_by_ratio)
        tl.store(by_logprob_ptr + token, tl.where(counts, by_logprob, 0.0), mask=token < stop)
        finite = (tl.abs(value) < float("inf")) & (tl.abs(here.logprob) < float("inf"))
        # NaN comes in and stays: nothing is above it.
        higher = counts & ((term.ratio > sums.ratio_max) | (term.ratio != term.ratio))
        sums = _Sums(
            sums.kl + tl.where(counts, term.kl, 0.0) if AXES.has_ref else sums.kl,
            sums.entropy + here.entropy,
            sums.clipped + tl.where(counts & (low | high), 1.0, 0.0),
            sums.low + tl.where(counts & low, 1.0, 0.0),
            sums.high + tl.where(counts & high, 1.0, 0.0),
            sums.dual + tl.where(counts & term.dual, 1.0, 0.0),
            sums.ratio + tl.where(counts, term.ratio, 0.0),
            tl.where(higher, term.ratio, sums.ratio_max),
            sums.gap + (here.rollout - here.old),
            sums.correction + tl.where(counts, correction, 0.0),
            sums.count + tl.where(counts, 1.0, 0.0),
            sums.invalid + tl.where(counts & ~finite, 1.0, 0.0),
            sums.loss + tl.where(counts, here.scale * value, 0.0),
        )

    # Third: every token moves the ratio that all of them share.
    if by_ratio:
        share = zeros + (tl.sum(moved, axis=0) / n).to(tl.float32)
        tl.debug_barrier()
        for first in range(start, stop, TOKENS):
            token = first + lanes
            here, counts = _load(pointers, token, token < stop)
            mine = share
            if AXES.surrogate == "gmpo":
                _, low, high = pessimistic(numbers, here.logprob - here.old, here.advantage)
                mine = tl.where(low | high, 0.0, mine)
            by_logprob = tl.load(by_logprob_ptr + token, mask=counts, other=0.0)
            tl.store(by_logprob_ptr + token, by_logprob + mine, mask=counts)

    for i in tl.static_range(_N_SUMS):
        tl.store(sums_ptr + program * _ROW + i, tl.sum(sums[i], axis=0))
    # The sum carries NaN, which a maximum may drop.
    largest = tl.max(sums.ratio_max, axis=0) + tl.sum(sums.ratio_max, axis=0) * 0.0
    tl.store(sums_ptr + program * _ROW + 7, largest)


@_kernel
def finish_kernel(
    sums_ptr, valid_ptr, metrics_ptr, value_ptr, n_programs, n_tokens, BLOCK: tl.constexpr
):
    """Metrics and loss from the sums that each program has left."""
    row = tl.arange(0, _ROW)
    found = tl.zeros([BLOCK, _ROW], dtype=tl.float32)
    for first in range(0, n_programs, BLOCK):
        program = first + tl.arange(0, BLOCK)[:, None]
        inside = (program < n_programs) & (row < _N_SUMS)[None, :]
        one = tl.load(sums_ptr + program * _ROW + row[None, :], mask=inside, other=0.0)
        higher = (one > found) | (one != one)
        found = tl.where((row == 7)[None, :], tl.where(higher, one, found), found + one)
    total = tl.sum(found, axis=0)
    total = tl.where(row == 7, tl.max(found, axis=0) + total * 0.0, total)
    count = tl.sum(tl.where(row == 10, total, 0.0), axis=0)
    mean = tl.where((row < 10) & (row != 7), total / tl.maximum(count, 1.0), total)
    # Without tokens, ratios and weights are 1.
    none = tl.where((row == 6) | (row == 7) | (row == 9), 1.0, mean)
    mean = tl.where(count > 0, mean, none)
    invalid = tl.sum(tl.where(row == 11, total, 0.0), axis=0)
    invalid = tl.where(tl.load(valid_ptr) != 0, invalid, tl.maximum(n_tokens, 1).to(tl.float32))
    tl.store(metrics_ptr + row, tl.where(row == 11, invalid, mean), mask=row < 12)
    loss = tl.sum(tl.where(row == 12, total, 0.0), axis=0)
    right = (invalid == 0) & (tl.abs(loss) < float("inf"))
    tl.store(value_ptr, tl.where(right, loss, float("nan")))


def evaluate(
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> Evaluated:
    """The loss of all tokens, its metrics, and its derivatives by log-probs and entropies."""
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    device, n_tokens = logprobs.device, logprobs.shape[0]
    by_sequence = axes.correction.startswith("sequence")
    coupled = axes.ratio != "token" or axes.surrogate in ("vespo", "gmpo") or by_sequence
    n_completions = inputs.cu_seqlens.shape[0] - 1
    n_programs = max(n_completions, 1) if coupled else triton.cdiv(n_tokens, _TOKENS)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    by_logprob, by_entropy = empty(n_tokens), empty(n_tokens) if axes.has_entropy else None
    sums, metrics, value = empty(n_programs, _ROW.value), empty(len(METRICS)), empty()
    if n_programs:
        loss_kernel[(n_programs,)](
            cu_seqlens_ptr=inputs.cu_seqlens.contiguous(),
            valid_ptr=prepared.valid,
            scale_ptr=prepared.scale,
            advantages_ptr=prepared.advantages,
            logprobs_ptr=_readable(logprobs),
            entropy_ptr=_readable(entropy),
            old_ptr=_readable(inputs.old),
            ref_ptr=_readable(inputs.ref),
            rollout_ptr=_readable(inputs.rollout),
            by_logprob_ptr=by_logprob,
            by_entropy_ptr=by_entropy,
            sums_ptr=sums,
            n_completions=n_completions,
            n_tokens=n_tokens,
            numbers=numbers,
            AXES=axes,
            COUPLED=coupled,
            TOKENS=_TOKENS,
            num_warps=_WARPS,
        )
    finish_kernel[(1,)](
        sums_ptr=sums,
        valid_ptr=prepared.valid,
        metrics_ptr=metrics,
        value_ptr=value,
        n_programs=n_programs,
        n_tokens=n_tokens,
        BLOCK=_COMPLETIONS,
        num_warps=_WARPS,
    )
    return Evaluated(value, metrics, Coefficients(by_logprob, by_entropy))


# ---- groups


class _How(NamedTuple):
    scale: str
    baseline: str
    unbiased: bool
    combine: str


class _Table(NamedTuple):
    """Pointers: `rewards [B, R]`, `weights [R]` or None, `sizes [P]`, `advantages [B]`, and of each
    group `mean`, `std`, `active`."""

    rewards: Any
    weights: Any
    sizes: Any
    advantages: Any
    mean: Any
    std: Any
    active: Any
    n_rewards: Any


@triton.jit
def _rewards(table, rollout, inside, column, OF: tl.constexpr):
    """Of some rollouts in fp64, 0 where there is none, and whether there is: the reward in a
    `column`, the weighted `total` of all, or the `advantage` so far."""
    if OF == "column":
        value = tl.load(table.rewards + rollout * table.n_rewards + column, mask=inside, other=0)
        value = value.to(tl.float64)
        known = inside & (value == value)
    else:
        value = rollout.to(tl.float64) * 0.0
        known = rollout < 0
        for k in range(0, table.n_rewards):
            one = tl.load(table.rewards + rollout * table.n_rewards + k, mask=inside, other=0)
            one = one.to(tl.float64)
            here = inside & (one == one)
            if table.weights is not None:
                one *= tl.load(table.weights + k).to(tl.float64)
            value += tl.where(here, one, 0.0)
            known = known | here
        if OF == "advantage":
            value = tl.load(table.advantages + rollout, mask=inside, other=0.0)
    return tl.where(known, value, 0.0), known


@triton.jit
def _statistics(
    table, start, stop, column, OF: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """Number, mean and standard deviation of the rewards of the rollouts start..stop - 1 of each
    group, and whether they differ."""
    lanes = tl.arange(0, BLOCK)[None, :]
    longest = tl.max(stop - start, axis=0)
    zeros = (start[:, None] + lanes).to(tl.float64) * 0.0
    count = zeros
    total = zeros
    highest = zeros + float("-inf")
    lowest = zeros + float("inf")
    for first in range(0, longest, BLOCK):
        rollout = start[:, None] + first + lanes
        value, known = _rewards(table, rollout, rollout < stop[:, None], column, OF)
        count += tl.where(known, 1.0, 0.0)
        total += value
        highest = tl.where(known & (value > highest), value, highest)
        lowest = tl.where(known & (value < lowest), value, lowest)
    n = tl.sum(count, axis=1)
    mean = tl.sum(total, axis=1) / tl.maximum(n, 1.0)
    # Equal rewards must give exactly 0: their rounded mean may differ from them, and dividing that
    # by a standard deviation as small would make a signal of it.
    differ = (tl.max(highest, axis=1) != tl.min(lowest, axis=1)) | (mean != mean)
    active = (n > 1) & differ
    squares = zeros
    for first in range(0, longest, BLOCK):
        rollout = start[:, None] + first + lanes
        value, known = _rewards(table, rollout, rollout < stop[:, None], column, OF)
        centred = tl.where(known & active[:, None], value - mean[:, None], 0.0)
        squares += centred * centred
    freedom = n
    if UNBIASED:
        freedom = n - 1.0
    std = tl.sqrt(tl.sum(squares, axis=1) / tl.maximum(freedom, 1.0))
    return n, mean, std, active


@triton.jit
def _divided(centred, by):
    # With eps = 0 a group of equal rewards would be 0 / 0.
    return tl.where(centred == 0, 0.0, centred / by)


@triton.jit
def _normalise(
    table,
    n_rollouts,
    n_groups,
    column,
    eps,
    OF: tl.constexpr,
    HOW: tl.constexpr,
    GROUPS: tl.constexpr,
    ROLLOUTS: tl.constexpr,
):
    """Advantages by the total, with the statistics of its groups, or those by a column, weighted
    and added to what is there."""
    before = tl.zeros([1], dtype=tl.int64)
    batch_std = tl.zeros([1], dtype=tl.float64)
    if HOW.scale == "batch":
        _, _, batch_std, _ = _statistics(
            table, before, before + n_rollouts, column, OF, HOW.unbiased, GROUPS * ROLLOUTS
        )
    for first in range(0, n_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        size = tl.load(table.sizes + group, mask=group < n_groups, other=0)
        stop = before + tl.cumsum(size, axis=0)
        start = stop - size
        before += tl.sum(size, axis=0)
        n, mean, std, active = _statistics(table, start, stop, column, OF, HOW.unbiased, ROLLOUTS)
        if OF == "total":
            tl.store(table.mean + group, mean, mask=group < n_groups)
            tl.store(table.std + group, std, mask=group < n_groups)
            tl.store(table.active + group, active, mask=group < n_groups)
        if OF == "column" or HOW.combine == "sum_then_normalize":
            if HOW.scale == "batch":
                std = batch_std
            for offset in range(0, tl.max(size, axis=0), ROLLOUTS):
                rollout = start[:, None] + offset + tl.arange(0, ROLLOUTS)[None, :]
                inside = rollout < stop[:, None]
                value, known = _rewards(table, rollout, inside, column, OF)
                advantage = tl.where(known & active[:, None], value - mean[:, None], 0.0)
                if HOW.baseline == "leave_one_out":
                    # r - mean of the others = n / (n - 1) * (r - mean of all)
                    advantage *= (n / tl.maximum(n - 1.0, 1.0))[:, None]
                if HOW.scale != "none":
                    advantage = _divided(advantage, (std + eps)[:, None])
                if OF == "column":
                    if table.weights is not None:
                        advantage *= tl.load(table.weights + column).to(tl.float64)
                    more = inside & (column > 0)
                    advantage += tl.load(table.advantages + rollout, mask=more, other=0.0)
                tl.store(table.advantages + rollout, advantage, mask=inside)


@_kernel
def group_kernel(
    rewards_ptr,
    weights_ptr,
    sizes_ptr,
    advantages_ptr,
    mean_ptr,
    std_ptr,
    active_ptr,
    summed_ptr,
    n_rollouts,
    n_groups,
    n_rewards,
    eps,
    HOW: tl.constexpr,
    GROUPS: tl.constexpr,
    ROLLOUTS: tl.constexpr,
):
    """`GroupAdvantages`. A group may have more rollouts than are looked at at once."""
    BLOCK: tl.constexpr = GROUPS * ROLLOUTS
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    lowest = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(0, n_groups, BLOCK):
        size = tl.load(sizes_ptr + first + lanes, mask=first + lanes < n_groups, other=0)
        total += size
        lowest = tl.minimum(lowest, size)
    if (tl.sum(total, axis=0) == n_rollouts) & (tl.min(lowest, axis=0) == 0):
        table = _Table(
            rewards_ptr,
            weights_ptr,
            sizes_ptr,
            advantages_ptr if summed_ptr is None else summed_ptr,
            mean_ptr,
            std_ptr,
            active_ptr,
            n_rewards,
        )
        _normalise(table, n_rollouts, n_groups, 0, eps, "total", HOW, GROUPS, ROLLOUTS)
        if summed_ptr is not None:
            for column in range(0, n_rewards):
                _normalise(
                    table, n_rollouts, n_groups, column, eps, "column", HOW, GROUPS, ROLLOUTS
                )
                tl.debug_barrier()
            zero = tl.zeros([1], dtype=tl.int64)
            _, mean, std, active = _statistics(
                table, zero, zero + n_rollouts, 0, "advantage", HOW.unbiased, BLOCK
            )
            for first in range(0, n_rollouts, BLOCK):
                rollout = (first + lanes)[None, :].to(tl.int64)
                inside = rollout < n_rollouts
                value, known = _rewards(table, rollout, inside, 0, "advantage")
                centred = tl.where(known & active[:, None], value - mean[:, None], 0.0)
                advantage = _divided(centred, (std + eps)[:, None])
                tl.store(advantages_ptr + rollout, advantage, mask=inside)
    else:
        nan = tl.zeros([BLOCK], dtype=tl.float32) + float("nan")
        for first in range(0, n_rollouts, BLOCK):
            tl.store(advantages_ptr + first + lanes, nan, mask=first + lanes < n_rollouts)
        for first in range(0, n_groups, BLOCK):
            tl.store(mean_ptr + first + lanes, nan, mask=first + lanes < n_groups)
            tl.store(std_ptr + first + lanes, nan, mask=first + lanes < n_groups)
            tl.store(active_ptr + first + lanes, lanes < 0, mask=first + lanes < n_groups)


def group_advantages(rewards: Rewards) -> GroupAdvantages:
    """See `perl_kernels.group_advantages`."""
    table = rewards.rewards
    dtype, device = compute_dtype(table), table.device
    n_rollouts, n_groups = table.shape[0], rewards.sizes.shape[0]
    advantages = torch.empty(n_rollouts, dtype=dtype, device=device)
    mean, std = torch.empty(2, n_groups, dtype=dtype, device=device).unbind()
    active = torch.empty(n_groups, dtype=torch.bool, device=device)
    summed = None
    if rewards.combine == "normalize_then_sum":
        summed = torch.empty(n_rollouts, dtype=torch.float64, device=device)
    group_kernel[(1,)](
        rewards_ptr=_readable(table),
        weights_ptr=_readable(rewards.weights),
        sizes_ptr=rewards.sizes.contiguous(),
        advantages_ptr=advantages,
        mean_ptr=mean,
        std_ptr=std,
        active_ptr=active,
        summed_ptr=summed,
        n_rollouts=n_rollouts,
        n_groups=n_groups,
        n_rewards=table.shape[1] if table.ndim == 2 else 1,
        eps=rewards.eps,
        HOW=_How(rewards.scale, rewards.baseline, rewards.unbiased, rewards.combine),
        GROUPS=_GROUPS,
        ROLLOUTS=_ROLLOUTS,
        num_warps=_WARPS,
        # One program: registers are there, and without this number a few spill.
        maxnreg=128,
    )
    return GroupAdvantages(advantages, mean, std, active)
