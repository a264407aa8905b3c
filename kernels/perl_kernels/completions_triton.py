"""Completions and groups in Triton: the same as `completions_torch.py`, in three launches a loss
instead of more than a hundred operations.

`group_advantages` is one launch of one program. `prepare` is one launch with a program for each
completion, after one for their sums of weights if an aggregation needs them. `evaluate` is one launch with a
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
_GROUPS, _ROLLOUTS = tl.constexpr(16), tl.constexpr(16)  # groups at once, and rollouts of each
_FLAT = tl.constexpr(256)  # rollouts at once where groups do not matter
_WARPS = 8
_REGISTERS = 128  # of a thread; left to itself, the assembler spills a few to fit in more blocks


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel that is not compiled anew for other counts."""
    counts = [name for name in inspect.signature(function).parameters if name.startswith("n_")]
    return triton.jit(do_not_specialize=counts)(function)


def _readable(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as kernels read it: without gaps, a byte for each bool, and copied where it starts
    such that kernels would be compiled anew for its address."""
    if tensor is None:
        return None
    if tensor.data_ptr() % 16 or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
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


_N_SUMS = len(_Sums._fields)
_ROW = 16  # floats that each program leaves its sums in


# ---- completions


@triton.jit
def _bounds(cu_seqlens, valid, n_completions, n_tokens):
    """First token of this program and the first behind: of its completion, or, where `cu_seqlens`
    cannot be used, of its share of all tokens, so that each is written."""
    program = tl.program_id(0).to(tl.int64)
    inside = program < n_completions
    start = tl.load(cu_seqlens + program, mask=inside, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + program + 1, mask=inside, other=0).to(tl.int64)
    share = tl.cdiv(n_tokens, tl.num_programs(0)).to(tl.int64)
    start = tl.where(valid, start, program * share)
    return start, tl.where(valid, stop, tl.minimum(start + share, n_tokens))


@triton.jit
def _total(cu_seqlens, totals, completion, inside):
    """Sum of the weights of completions, fp64: their length if there are none."""
    if totals is None:
        start = tl.load(cu_seqlens + completion, mask=inside, other=0)
        total = tl.load(cu_seqlens + completion + 1, mask=inside, other=0) - start
    else:
        total = tl.load(totals + completion, mask=inside, other=0.0)
    return total.to(tl.float64)


@triton.jit
def _valid(cu_seqlens, n_completions, n_tokens, BLOCK: tl.constexpr):
    """Whether `cu_seqlens` runs from 0 to N without a step back."""
    back = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, n_completions, BLOCK):
        index = first + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens + index, mask=index < n_completions, other=0)
        stop = tl.load(cu_seqlens + index + 1, mask=index < n_completions, other=0)
        back += (stop < start).to(tl.int32)
    ends = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + n_completions) == n_tokens)
    return ends & (tl.sum(back, axis=0) == 0)


@_kernel
def weight_kernel(
    cu_seqlens,
    weights,
    totals,
    n_completions,
    n_tokens,
    TOKENS: tl.constexpr = _TOKENS,
    BLOCK: tl.constexpr = _COMPLETIONS,
):
    """`totals [B]`: sum of the weights of each completion."""
    valid = _valid(cu_seqlens, n_completions, n_tokens, BLOCK)
    start, stop = _bounds(cu_seqlens, valid, n_completions, n_tokens)
    total = tl.zeros([TOKENS], dtype=tl.float64)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        weight = tl.load(weights + token, mask=token < stop, other=0)
        total += weight.to(tl.float32).to(tl.float64)
    tl.store(totals + tl.program_id(0), tl.sum(total, axis=0))


@_kernel
def prepare_kernel(
    cu_seqlens,
    advantages,
    weights,
    totals,
    normalizer,
    count,
    out,
    n_completions,
    n_tokens,
    max_completion_length,
    AGGREGATION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr = _TOKENS,
    BLOCK: tl.constexpr = _COMPLETIONS,
):
    """`Prepared`."""
    program = tl.program_id(0).to(tl.int64)
    valid = _valid(cu_seqlens, n_completions, n_tokens, BLOCK)
    start, stop = _bounds(cu_seqlens, valid, n_completions, n_tokens)
    if normalizer is not None or count is not None:
        denominator = count
        if normalizer is not None:
            denominator = tl.load(normalizer).to(tl.float64)
        valid = valid & (denominator > 0) & (denominator < float("inf"))
    elif AGGREGATION == "token-mean" or AGGREGATION == "seq-mean-token-mean":
        found = tl.zeros([BLOCK], dtype=tl.float64)
        for first in range(0, n_completions, BLOCK):
            index = first + tl.arange(0, BLOCK)
            total = _total(cu_seqlens, totals, index, index < n_completions)
            found += total if AGGREGATION == "token-mean" else tl.where(total != 0, 1.0, 0.0)
        denominator = tl.sum(found, axis=0)
    else:
        denominator = n_completions.to(tl.float64)
    if AGGREGATION == "seq-mean-token-mean":
        denominator *= _total(cu_seqlens, totals, program, program < n_completions)
    elif AGGREGATION == "seq-mean-token-sum-norm":
        denominator *= max_completion_length
    share = tl.where(valid, 1.0 / denominator, float("nan"))
    # An infinite weight must not take the others out.
    share = tl.where(share == 0, float("nan"), share).to(tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < stop
        weight = tl.where(inside, 1.0, 0.0)
        if weights is not None:
            weight = tl.load(weights + token, mask=inside, other=0).to(tl.float32)
        index = token if PER_TOKEN else token * 0 + program
        there = inside if PER_TOKEN else inside & (program < n_completions)
        advantage = tl.load(advantages + index, mask=there, other=0).to(tl.float32)
        # The advantage is a factor of every policy term, so that the row and the loss become NaN.
        usable = (weight >= 0) & (weight < float("inf"))
        advantage = tl.where(weight == 0, 0.0, tl.where(usable, advantage, float("nan")))
        tl.store(out.advantages + token, advantage, mask=inside)
        # Where nothing counts, the denominator may be 0.
        scale = tl.where(weight == 0, 0.0, weight * share)
        tl.store(out.scale + token, scale, mask=inside)
    if program == 0:
        tl.store(out.valid, valid)


def prepare(loss: PolicyLoss, inputs: LossInputs, n_tokens: int, dtype: torch.dtype) -> Prepared:
    """What a token's term needs beside log-probs; see `Prepared`."""
    n_completions = inputs.cu_seqlens.shape[0] - 1
    advantages = inputs.advantages
    if advantages is None:
        assert inputs.rewards is not None
        advantages = group_advantages(inputs.rewards).advantages
    grid, totals = (max(n_completions, 1),), None
    cu_seqlens, weights = _readable(inputs.cu_seqlens), _readable(inputs.weights)
    scale = torch.empty(n_tokens, dtype=dtype, device=inputs.cu_seqlens.device)
    if weights is not None and loss.aggregation in ("token-mean", "seq-mean-token-mean"):
        totals = scale.new_empty(grid, dtype=torch.float64)
        weight_kernel[grid](cu_seqlens, weights, totals, n_completions, n_tokens, num_warps=_WARPS)
    out = Prepared(scale.new_empty(n_tokens), scale, scale.new_empty((), dtype=torch.bool))
    prepare_kernel[grid](
        cu_seqlens,
        _readable(advantages),
        weights,
        totals,
        _readable(inputs.normalizer),
        inputs.count,
        out,
        n_completions,
        n_tokens,
        float(loss.max_completion_length or 0.0),
        AGGREGATION=loss.aggregation,
        PER_TOKEN=inputs.per_token,
        num_warps=_WARPS,
    )
    return out


class _Pointers(NamedTuple):
    """To what is known of each token, or None."""

    scale: Any
    advantages: Any
    logprobs: Any
    entropy: Any
    old: Any
    ref: Any
    rollout: Any


class _Token(NamedTuple):
    """What is read of each token, 0 where it does not count. `gap`: old - rollout."""

    counts: Any
    scale: Any
    advantage: Any
    logprob: Any
    entropy: Any
    old: Any
    ref: Any
    gap: Any


@triton.jit
def _optional(pointer, token, counts, otherwise):
    if pointer is not None:
        otherwise = tl.load(pointer + token, mask=counts, other=0.0).to(tl.float32)
    return otherwise


@triton.jit
def _token(given, token, inside):
    scale = tl.load(given.scale + token, mask=inside, other=0.0)
    counts = scale != 0
    advantage = tl.load(given.advantages + token, mask=counts, other=0.0)
    logprob = tl.load(given.logprobs + token, mask=counts, other=0.0).to(tl.float32)
    old = _optional(given.old, token, counts, logprob)
    gap = 0.0
    if given.rollout is not None:
        gap = old - _optional(given.rollout, token, counts, 0.0)
    return _Token(
        counts,
        scale,
        advantage,
        logprob,
        _optional(given.entropy, token, counts, 0.0),
        old,
        _optional(given.ref, token, counts, logprob),
        gap,
    )


@_kernel
def loss_kernel(
    given,
    cu_seqlens,
    valid,
    out,
    sums_out,
    n_completions,
    n_tokens,
    numbers,
    AXES: tl.constexpr,
    COUPLED: tl.constexpr,
    TOKENS: tl.constexpr = _TOKENS,
    SUMS: tl.constexpr = _N_SUMS,
    ROW: tl.constexpr = _ROW,
):
    """Coefficients of the tokens of one completion, and their sums; with `COUPLED` a completion's
    tokens depend on each other."""
    by_sequence: tl.constexpr = (
        AXES.correction == "sequence_truncate" or AXES.correction == "sequence_mask"
    )
    by_ratio: tl.constexpr = AXES.ratio == "sequence" or AXES.surrogate == "gmpo"
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
        start, stop = _bounds(cu_seqlens, tl.load(valid) != 0, n_completions, n_tokens)
        counted = tl.zeros([TOKENS], dtype=tl.float64)
        ratios = tl.zeros([TOKENS], dtype=tl.float64)
        gains = tl.zeros([TOKENS], dtype=tl.float64)
        gaps = tl.zeros([TOKENS], dtype=tl.float64)
        for first in range(start, stop, TOKENS):
            token = first + lanes
            here = _token(given, token, token < stop)
            log_ratio = here.logprob - here.old
            if AXES.surrogate == "vespo":
                log_ratio = bounded(log_ratio)
                if AXES.correction != "" and not by_sequence:
                    weight = correction_weight(AXES, numbers, here.gap)
                    log_ratio += tl.where(here.counts, vespo_log(tl.log(weight)), 0.0)
            elif AXES.surrogate == "gmpo":
                log_ratio, _, _ = pessimistic(numbers, log_ratio, here.advantage)
            counted += tl.where(here.counts, 1.0, 0.0)
            ratios += log_ratio
            gains += here.advantage
            gaps += here.gap
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
        here = _token(given, token, token < stop)
        log_ratio = here.logprob - here.old
        advantage = here.advantage
        sequence = zeros + 1.0
        low = here.counts
        high = here.counts
        if AXES.surrogate == "vespo":
            sequence = vespo_weight(numbers, advantage, shared)
        elif AXES.surrogate == "gmpo":
            _, low, high = pessimistic(numbers, log_ratio, advantage)
            sequence = tl.exp(bounded(shared))
            advantage = zeros + mean_advantage
        elif AXES.ratio != "token":
            log_ratio = shared
        if AXES.correction != "" and not by_sequence:
            correction = correction_weight(AXES, numbers, here.gap)
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
            tl.store(out.entropy + token, by_entropy, mask=token < stop)
        by_logprob = here.scale * term.by_logprob
        if AXES.surrogate == "gmpo":
            _, slope = ratio_and_slope(shared)
            share = tl.where(slope == 0, 0.0, here.scale * term.by_ratio)
            moved += tl.where(here.counts, share, 0.0)
            by_logprob += here.scale * term.kl_by_ratio
        elif by_ratio:
            moved += tl.where(here.counts, here.scale * (term.by_ratio + term.kl_by_ratio), 0.0)
        else:
            by_logprob += here.scale * (term.by_ratio + term.kl_by_ratio)
        tl.store(out.logprobs + token, tl.where(here.counts, by_logprob, 0.0), mask=token < stop)
        finite = (tl.abs(value) < float("inf")) & (tl.abs(here.logprob) < float("inf"))
        # NaN comes in and stays: nothing is above it.
        higher = here.counts & ((term.ratio > sums.ratio_max) | (term.ratio != term.ratio))
        sums = _Sums(
            sums.kl + tl.where(here.counts, term.kl, 0.0) if AXES.has_ref else sums.kl,
            sums.entropy + here.entropy,
            sums.clipped + tl.where(here.counts & (low | high), 1.0, 0.0),
            sums.low + tl.where(here.counts & low, 1.0, 0.0),
            sums.high + tl.where(here.counts & high, 1.0, 0.0),
            sums.dual + tl.where(here.counts & term.dual, 1.0, 0.0),
            sums.ratio + tl.where(here.counts, term.ratio, 0.0),
            tl.where(higher, term.ratio, sums.ratio_max),
            sums.gap - here.gap,
            sums.correction + tl.where(here.counts, correction, 0.0),
            sums.count + tl.where(here.counts, 1.0, 0.0),
            sums.invalid + tl.where(here.counts & ~finite, 1.0, 0.0),
            sums.loss + tl.where(here.counts, here.scale * value, 0.0),
        )

    # Third: every token moves the ratio that all of them share.
    if by_ratio:
        share = zeros + (tl.sum(moved, axis=0) / n).to(tl.float32)
        tl.debug_barrier()
        for first in range(start, stop, TOKENS):
            token = first + lanes
            here = _token(given, token, token < stop)
            mine = share
            if AXES.surrogate == "gmpo":
                _, low, high = pessimistic(numbers, here.logprob - here.old, here.advantage)
                mine = tl.where(low | high, 0.0, mine)
            by_logprob = tl.load(out.logprobs + token, mask=here.counts, other=0.0)
            tl.store(out.logprobs + token, by_logprob + mine, mask=here.counts)

    for i in tl.static_range(SUMS):
        tl.store(sums_out + program * ROW + i, tl.sum(sums[i], axis=0))
    # The sum carries NaN, which a maximum may drop.
    largest = tl.max(sums.ratio_max, axis=0) + tl.sum(sums.ratio_max, axis=0) * 0.0
    tl.store(sums_out + program * ROW + 7, largest)


@_kernel
def finish_kernel(
    sums,
    valid,
    metrics,
    value,
    n_programs,
    n_tokens,
    SUMS: tl.constexpr = _N_SUMS,
    ROW: tl.constexpr = _ROW,
    BLOCK: tl.constexpr = _COMPLETIONS,
):
    """Metrics and loss from the sums that each program has left."""
    row = tl.arange(0, ROW)
    found = tl.zeros([BLOCK, ROW], dtype=tl.float32)
    for first in range(0, n_programs, BLOCK):
        program = first + tl.arange(0, BLOCK)[:, None]
        inside = (program < n_programs) & (row < SUMS)[None, :]
        one = tl.load(sums + program * ROW + row[None, :], mask=inside, other=0.0)
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
    invalid = tl.where(tl.load(valid) != 0, invalid, tl.maximum(n_tokens, 1).to(tl.float32))
    tl.store(metrics + row, tl.where(row == 11, invalid, mean), mask=row < 12)
    loss = tl.sum(tl.where(row == 12, total, 0.0), axis=0)
    right = (invalid == 0) & (tl.abs(loss) < float("inf"))
    tl.store(value, tl.where(right, loss, float("nan")))


def evaluate(
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> Evaluated:
    """The loss of all tokens, its metrics, and its derivatives by log-probs and entropies."""
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    n_tokens = logprobs.shape[0]
    by_sequence = axes.correction.startswith("sequence")
    coupled = axes.ratio != "token" or axes.surrogate in ("vespo", "gmpo") or by_sequence
    n_completions = inputs.cu_seqlens.shape[0] - 1
    n_programs = max(n_completions, 1) if coupled else triton.cdiv(n_tokens, _TOKENS)
    value = torch.empty((), dtype=torch.float32, device=logprobs.device)
    metrics, sums = value.new_empty(len(METRICS)), value.new_empty(n_programs, _ROW)
    by_entropy = value.new_empty(n_tokens) if axes.has_entropy else None
    out = Coefficients(value.new_empty(n_tokens), by_entropy)
    given = (prepared.scale, prepared.advantages, logprobs, entropy)
    near = (inputs.old, inputs.ref, inputs.rollout)
    if n_programs:
        loss_kernel[(n_programs,)](
            _Pointers(*map(_readable, (*given, *near))),
            _readable(inputs.cu_seqlens),
            prepared.valid,
            out,
            sums,
            n_completions,
            n_tokens,
            numbers,
            AXES=axes,
            COUPLED=coupled,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
        )
    finish_kernel[(1,)](
        sums, prepared.valid, metrics, value, n_programs, n_tokens, num_warps=_WARPS
    )
    return Evaluated(value, metrics, out)


# ---- groups


class _Table(NamedTuple):
    """Pointers or None: `rewards [B, R]`, `weights [R]`, `sizes [P]`, `summed [B]`: advantages by
    each reward, added up. `n_rewards`: R."""

    rewards: Any
    weights: Any
    sizes: Any
    summed: Any
    n_rewards: Any


@triton.jit
def _rewards(table, rollout, inside, column, OF: tl.constexpr):
    """Of some rollouts in fp64, 0 where there is none, and whether there is: the reward in a
    `column`, the weighted `total` of all, or the advantages `summed`."""
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
        if OF == "summed":
            value = tl.load(table.summed + rollout, mask=inside, other=0.0)
    return tl.where(known, value, 0.0), known


@triton.jit
def _statistics(
    table, start, stop, column, OF: tl.constexpr, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Number, mean and standard deviation of the rewards of the rollouts start..stop - 1 of each
    group, and whether they differ."""
    lanes = tl.arange(0, BLOCK)[None, :]
    longest = tl.max(stop - start, axis=0)
    zeros = (start[:, None] + lanes).to(tl.float64) * 0.0
    count = zeros
    total = zeros
    squares = zeros
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
    for first in range(0, longest, BLOCK):
        rollout = start[:, None] + first + lanes
        value, known = _rewards(table, rollout, rollout < stop[:, None], column, OF)
        centred = tl.where(known & active[:, None], value - mean[:, None], 0.0)
        squares += centred * centred
    freedom = n
    if HOW.unbiased:
        freedom = n - 1.0
    std = tl.sqrt(tl.sum(squares, axis=1) / tl.maximum(freedom, 1.0))
    return n, mean, std, active


@triton.jit
def _normalise(table, out, n_rollouts, n_groups, column, eps, OF: tl.constexpr, HOW: tl.constexpr):
    """By the total: statistics of the groups, and advantages unless they are those `summed`. By a
    column: advantages, weighted and added to `summed`. Of `summed`: advantages in the whole
    batch."""
    before = tl.zeros([1], dtype=tl.int64)
    whole = before + n_rollouts
    batch_std = before.to(tl.float64)
    if HOW.scale == "batch" and OF != "summed":
        _, _, batch_std, _ = _statistics(table, before, whole, column, OF, HOW, _GROUPS * _ROLLOUTS)
    for first in range(0, n_groups, _GROUPS):
        group = first + tl.arange(0, _GROUPS)
        inside = group < n_groups
        if OF == "summed":
            size = tl.where(inside, n_rollouts, 0).to(tl.int64)
        else:
            size = tl.load(table.sizes + group, mask=inside, other=0)
        stop = before + tl.cumsum(size, axis=0)
        start = stop - size
        before += tl.sum(size, axis=0)
        n, mean, std, active = _statistics(table, start, stop, column, OF, HOW, _ROLLOUTS)
        if OF == "total":
            tl.store(out.mean + group, mean, mask=inside)
            tl.store(out.std + group, std, mask=inside)
            tl.store(out.active + group, active, mask=inside)
        if OF != "total" or HOW.combine == "sum_then_normalize":
            if HOW.scale == "batch" and OF != "summed":
                std = batch_std
            for offset in range(0, tl.max(size, axis=0), _ROLLOUTS):
                rollout = start[:, None] + offset + tl.arange(0, _ROLLOUTS)[None, :]
                there = rollout < stop[:, None]
                value, known = _rewards(table, rollout, there, column, OF)
                advantage = tl.where(known & active[:, None], value - mean[:, None], 0.0)
                if HOW.baseline == "leave_one_out" and OF != "summed":
                    # r - mean of the others = n / (n - 1) * (r - mean of all)
                    advantage *= (n / tl.maximum(n - 1.0, 1.0))[:, None]
                if HOW.scale != "none" or OF == "summed":
                    # With eps = 0 a group of equal rewards would be 0 / 0.
                    divided = advantage / (std + eps)[:, None]
                    advantage = tl.where(advantage == 0, 0.0, divided)
                if OF == "column":
                    if table.weights is not None:
                        advantage *= tl.load(table.weights + column).to(tl.float64)
                    more = there & (column > 0)
                    advantage += tl.load(table.summed + rollout, mask=more, other=0.0)
                    tl.store(table.summed + rollout, advantage, mask=there)
                else:
                    tl.store(out.advantages + rollout, advantage, mask=there)


@_kernel
def group_kernel(
    rewards, weights, sizes, summed, out, n_rewards, n_rollouts, n_groups, eps, HOW: tl.constexpr
):
    """`GroupAdvantages`. A group may have more rollouts than are looked at at once."""
    table = _Table(rewards, weights, sizes, summed, n_rewards)
    lanes = tl.arange(0, _FLAT)
    total = tl.zeros([_FLAT], dtype=tl.int64)
    lowest = tl.zeros([_FLAT], dtype=tl.int64)
    for first in range(0, n_groups, _FLAT):
        size = tl.load(table.sizes + first + lanes, mask=first + lanes < n_groups, other=0)
        total += size
        lowest = tl.minimum(lowest, size)
    if (tl.sum(total, axis=0) == n_rollouts) & (tl.min(lowest, axis=0) == 0):
        _normalise(table, out, n_rollouts, n_groups, 0, eps, "total", HOW)
        if HOW.combine == "normalize_then_sum":
            for column in range(0, n_rewards):
                _normalise(table, out, n_rollouts, n_groups, column, eps, "column", HOW)
                tl.debug_barrier()
            _normalise(table, out, n_rollouts, 1, 0, eps, "summed", HOW)
    else:
        nan = tl.zeros([_FLAT], dtype=tl.float32) + float("nan")
        for first in range(0, n_rollouts, _FLAT):
            tl.store(out.advantages + first + lanes, nan, mask=first + lanes < n_rollouts)
        for first in range(0, n_groups, _FLAT):
            inside = first + lanes < n_groups
            tl.store(out.mean + first + lanes, nan, mask=inside)
            tl.store(out.std + first + lanes, nan, mask=inside)
            tl.store(out.active + first + lanes, lanes < 0, mask=inside)


def group_advantages(rewards: Rewards) -> GroupAdvantages:
    """See `perl_kernels.group_advantages`."""
    table = rewards.rewards
    n_rollouts, n_groups = table.shape[0], rewards.sizes.shape[0]

    advantages = torch.empty(n_rollouts, dtype=compute_dtype(table), device=table.device)
    out = GroupAdvantages(
        advantages,
        advantages.new_empty(n_groups),
        advantages.new_empty(n_groups),
        advantages.new_empty(n_groups, dtype=torch.bool),
    )
    separately = rewards.combine == "normalize_then_sum"
    group_kernel[(1,)](
        _readable(table),
        _readable(rewards.weights),
        _readable(rewards.sizes),
        advantages.new_empty(n_rollouts, dtype=torch.float64) if separately else None,
        out,
        table.shape[1] if table.ndim == 2 else 1,
        n_rollouts,
        n_groups,
        rewards.eps,
        HOW=rewards._replace(rewards=None, sizes=None, weights=None, eps=0.0),
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
    )
    return out
