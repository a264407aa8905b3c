"""Group-relative advantages in Triton: one launch, whatever the sizes of the groups.

Each program works out the statistics of its own group, in fp64, from the few rewards of that group;
so nothing is passed between programs. `rollout_advantage` is used by the losses too, which
normalise rewards in their own launch.
"""

# Triton, not Python, compiles the device functions, whose results a type checker cannot tell.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouping import GroupAdvantages, Grouping, Rewards
from .compile_case import CompileCase
from .launch import compile_case, kernel

BLOCK = 32
"""Rewards looked at at once; a group is rarely larger."""

_WARPS = 1
SCAN = 128
"""Group sizes looked at at once."""


@triton.jit
def _reward_of(rewards_ptr, weights_ptr, index, inside, n_rewards, column, TOTAL: tl.constexpr):
    """Rewards of some rollouts in fp64, NaN where there is none: the weighted sum of all, or that
    of `column`."""
    if TOTAL:
        total = tl.zeros_like(index).to(tl.float64)
        found = total > 0
        for k in range(0, n_rewards):
            reward = tl.load(rewards_ptr + index * n_rewards + k, mask=inside, other=0.0)
            reward = reward.to(tl.float64)
            known = reward == reward
            if weights_ptr is not None:
                reward = reward * tl.load(weights_ptr + k)
            total += tl.where(known, reward, 0.0)
            found = found | known
    else:
        total = tl.load(rewards_ptr + index * n_rewards + column, mask=inside, other=0.0)
        total = total.to(tl.float64)
        found = total == total
    return tl.where(inside & found, total, float("nan"))


@triton.jit
def _statistics(
    rewards_ptr,
    weights_ptr,
    start,
    stop,
    n_rewards,
    column,
    TOTAL: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number, mean and standard deviation of the rewards start..stop - 1 that are not NaN, and
    whether they differ."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    count = tl.zeros([BLOCK], dtype=tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    lowest = tl.full([BLOCK], float("inf"), dtype=tl.float64)
    for first in range(start, stop, BLOCK):
        index = first + lanes
        reward = _reward_of(rewards_ptr, weights_ptr, index, index < stop, n_rewards, column, TOTAL)
        known = reward == reward
        count += tl.where(known, 1.0, 0.0)
        total += tl.where(known, reward, 0.0)
        highest = tl.where(known & (reward > highest), reward, highest)
        lowest = tl.where(known & (reward < lowest), reward, lowest)
    n = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.where(n > 0, n, 1.0)
    # Equal rewards must give exactly 0: their rounded mean may differ from them, and dividing that
    # by a standard deviation as small would make a signal of it.
    active = (n > 1) & (tl.max(highest, axis=0) != tl.min(lowest, axis=0))
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(start, stop, BLOCK):
        index = first + lanes
        reward = _reward_of(rewards_ptr, weights_ptr, index, index < stop, n_rewards, column, TOTAL)
        centred = tl.where(reward == reward, tl.where(active, reward - mean, 0.0), 0.0)
        squares += centred * centred
    freedom = n
    if UNBIASED:
        freedom = n - 1.0
    std = tl.sqrt(tl.sum(squares, axis=0) / tl.where(freedom > 1.0, freedom, 1.0))
    return n, mean, std, active


@triton.jit
def _group_bounds(sizes_ptr, n_groups, n_rollouts, rollout, SCAN: tl.constexpr):
    """First rollout of the group of `rollout`, that of the next group, and whether the sizes are
    at least 0 and sum to `n_rollouts`."""
    start = rollout * 0
    stop = rollout * 0
    before = rollout * 0
    negative = 0
    for first in range(0, n_groups, SCAN):
        group = first + tl.arange(0, SCAN)
        size = tl.load(sizes_ptr + group, mask=group < n_groups, other=0).to(tl.int64)
        end = before + tl.cumsum(size, axis=0)
        here = (end > rollout) & (end - size <= rollout)
        start += tl.sum(tl.where(here, end - size, 0), axis=0)
        stop += tl.sum(tl.where(here, end, 0), axis=0)
        before += tl.sum(size, axis=0)
        negative += tl.sum((size < 0).to(tl.int32), axis=0)
    # Sizes that cannot be used must not lead out of the rewards.
    start = tl.minimum(tl.maximum(start, 0), n_rollouts)
    stop = tl.minimum(tl.maximum(stop, start), n_rollouts)
    return start, stop, (before == n_rollouts) & (negative == 0)


@triton.jit
def _normalised(
    reward,
    count,
    mean,
    std,
    active,
    eps,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(reward - baseline) / (std + eps); 0 for NaN and where the rewards do not differ."""
    advantage = tl.where(reward == reward, tl.where(active, reward - mean, 0.0), 0.0)
    if LEAVE_ONE_OUT:
        # r - mean of the others = n / (n - 1) * (r - mean of all)
        advantage = advantage * (count / tl.where(count > 1.0, count - 1.0, 1.0))
    if SCALED:
        # With eps = 0 a group of equal rewards would be 0 / 0.
        advantage = tl.where(advantage == 0, 0.0, advantage / (std + eps))
    return advantage


@triton.jit
def _column_advantage(
    rewards_ptr,
    weights_ptr,
    rollout,
    start,
    stop,
    n_rollouts,
    n_rewards,
    column,
    eps,
    TOTAL: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count, mean, std, active = _statistics(
        rewards_ptr, weights_ptr, start, stop, n_rewards, column, TOTAL, UNBIASED, BLOCK
    )
    if SCALE == "batch":
        _, _, std, _ = _statistics(
            rewards_ptr,
            weights_ptr,
            start * 0,
            start * 0 + n_rollouts,
            n_rewards,
            column,
            TOTAL,
            UNBIASED,
            BLOCK,
        )
    reward = _reward_of(
        rewards_ptr, weights_ptr, rollout, rollout < n_rollouts, n_rewards, column, TOTAL
    )
    return _normalised(reward, count, mean, std, active, eps, LEAVE_ONE_OUT, SCALE != "none")


@triton.jit
def rollout_advantage(
    rewards_ptr,
    sizes_ptr,
    weights_ptr,
    rollout,
    n_rollouts,
    n_groups,
    n_rewards,
    eps,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Advantage of one rollout (int64) in fp64; NaN where `sizes` cannot be used."""
    start, stop, valid = _group_bounds(sizes_ptr, n_groups, n_rollouts, rollout, SCAN)
    advantage = _column_advantage(
        rewards_ptr,
        weights_ptr,
        rollout,
        start,
        stop,
        n_rollouts,
        n_rewards,
        0,
        eps,
        True,
        SCALE,
        LEAVE_ONE_OUT,
        UNBIASED,
        BLOCK,
    )
    return tl.where(valid, advantage, float("nan"))


@kernel
def group_advantages_kernel(
    rewards_ptr,
    sizes_ptr,
    weights_ptr,
    advantages_ptr,
    mean_ptr,
    std_ptr,
    active_ptr,
    n_rollouts,
    n_groups,
    n_rewards,
    eps,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    SEPARATELY: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Programs 0..B - 1 write the advantage of a rollout, B..B + P - 1 the statistics of a group.
    With `SEPARATELY` the advantage is the weighted sum over the rewards of the advantage by each,
    NaN for a rollout without reward."""
    program = tl.program_id(0).to(tl.int64)
    if program < n_rollouts:
        start, stop, valid = _group_bounds(sizes_ptr, n_groups, n_rollouts, program, SCAN)
        if SEPARATELY:
            advantage = _reward_of(
                rewards_ptr, weights_ptr, program, program < n_rollouts, n_rewards, 0, True
            )
            advantage = tl.where(advantage == advantage, 0.0, advantage)
            for k in range(0, n_rewards):
                part = _column_advantage(
                    rewards_ptr,
                    weights_ptr,
                    program,
                    start,
                    stop,
                    n_rollouts,
                    n_rewards,
                    k,
                    eps,
                    False,
                    SCALE,
                    LEAVE_ONE_OUT,
                    UNBIASED,
                    BLOCK,
                )
                if weights_ptr is not None:
                    part = part * tl.load(weights_ptr + k)
                advantage += part
        else:
            advantage = _column_advantage(
                rewards_ptr,
                weights_ptr,
                program,
                start,
                stop,
                n_rollouts,
                n_rewards,
                0,
                eps,
                True,
                SCALE,
                LEAVE_ONE_OUT,
                UNBIASED,
                BLOCK,
            )
        advantage = tl.where(valid, advantage, float("nan"))
        tl.store(advantages_ptr + program, advantage.to(advantages_ptr.dtype.element_ty))
    else:
        mine = program - n_rollouts
        start = mine * 0
        for first in range(0, mine, SCAN):
            group = first + tl.arange(0, SCAN)
            size = tl.load(sizes_ptr + group, mask=group < mine, other=0).to(tl.int64)
            start += tl.sum(size, axis=0)
        stop = start + tl.load(sizes_ptr + mine).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), n_rollouts)
        stop = tl.minimum(tl.maximum(stop, start), n_rollouts)
        _, _, valid = _group_bounds(sizes_ptr, n_groups, n_rollouts, start, SCAN)
        _, mean, std, active = _statistics(
            rewards_ptr, weights_ptr, start, stop, n_rewards, 0, True, UNBIASED, BLOCK
        )
        mean = tl.where(valid, mean, float("nan"))
        std = tl.where(valid, std, float("nan"))
        tl.store(mean_ptr + mine, mean.to(mean_ptr.dtype.element_ty))
        tl.store(std_ptr + mine, std.to(std_ptr.dtype.element_ty))
        tl.store(active_ptr + mine, (active & valid).to(tl.int8))


@kernel
def normalise_batch_kernel(
    values_ptr, out_ptr, n_values, eps, UNBIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """(value - mean) / (std + eps) over all values that are not NaN; 0 for those that are."""
    rollout = tl.program_id(0).to(tl.int64)
    advantage = _column_advantage(
        values_ptr,
        None,
        rollout,
        rollout * 0,
        rollout * 0 + n_values,
        n_values,
        1,
        0,
        eps,
        False,
        "group",
        False,
        UNBIASED,
        BLOCK,
    )
    tl.store(out_ptr + rollout, advantage.to(out_ptr.dtype.element_ty))


def group_advantages(grouped: Rewards) -> GroupAdvantages:
    """As `torch_backend.group_advantages`; two launches for `normalize_then_sum`, whose sum is
    normalised over the batch, one otherwise."""
    rewards, sizes, weights, grouping = grouped
    rewards = rewards.contiguous()
    n_rollouts, n_groups = rewards.shape[0], sizes.shape[0]
    separately = grouping.combine == "normalize_then_sum"

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=rewards.device)

    advantages = empty(n_rollouts, torch.float64 if separately else torch.float32)
    mean, std = empty(n_groups, torch.float32), empty(n_groups, torch.float32)
    active = empty(n_groups, torch.bool)
    if n_rollouts + n_groups:
        group_advantages_kernel[(n_rollouts + n_groups,)](
            rewards_ptr=rewards,
            sizes_ptr=sizes.contiguous(),
            weights_ptr=weights,
            advantages_ptr=advantages,
            mean_ptr=mean,
            std_ptr=std,
            active_ptr=active.view(torch.int8),
            n_rollouts=n_rollouts,
            n_groups=n_groups,
            n_rewards=rewards.shape[1] if rewards.ndim == 2 else 1,
            SEPARATELY=separately,
            **grouping_arguments(grouping),
            num_warps=_WARPS,
        )
    if separately:
        raw, advantages = advantages, empty(n_rollouts, torch.float32)
        if n_rollouts:
            normalise_batch_kernel[(n_rollouts,)](
                raw,
                advantages,
                n_rollouts,
                grouping.eps,
                UNBIASED=grouping.unbiased,
                BLOCK=BLOCK,
                num_warps=_WARPS,
            )
        # A sum of sizes that is not B has made them NaN, which is no missing reward.
        advantages = torch.where(mean.isnan().any(), torch.nan, advantages)
    return GroupAdvantages(advantages, mean, std, active)


def grouping_arguments(grouping: Grouping) -> dict[str, Any]:
    """Those arguments of the kernels that say how rewards become advantages."""
    return {
        "eps": grouping.eps,
        "SCALE": grouping.scale,
        "LEAVE_ONE_OUT": grouping.baseline == "leave_one_out",
        "UNBIASED": grouping.unbiased,
        "BLOCK": BLOCK,
        "SCAN": SCAN,
    }


def compile_cases() -> list[CompileCase]:
    """The launch variants, see `perl_kernels.resources`."""
    types = {
        "sizes_ptr": "*i64",
        "weights_ptr": "*fp64",
        "values_ptr": "*fp64",
        "active_ptr": "*i8",
    }
    one = grouping_arguments(Grouping())
    several = grouping_arguments(Grouping(scale="batch", baseline="leave_one_out"))
    for arguments in (one, several):
        del arguments["eps"]
    cases = []
    for name, launched, constants in (
        ("one reward", group_advantages_kernel, {**one, "weights_ptr": None, "SEPARATELY": False}),
        ("several rewards", group_advantages_kernel, {**several, "SEPARATELY": True}),
        ("", normalise_batch_kernel, {"UNBIASED": True, "BLOCK": BLOCK}),
    ):
        cases.append(compile_case(name or "batch", launched, types, constants, num_warps=_WARPS))
    return cases
