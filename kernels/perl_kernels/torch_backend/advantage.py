"""Group-relative advantages in PyTorch, computed in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..grouping import GroupAdvantages, Grouping, Rewards
from .segments import Segments


class _Statistics(NamedTuple):
    centred: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    active: Tensor


def group_advantages(grouped: Rewards) -> GroupAdvantages:
    """See `perl_kernels.group_advantages`."""
    rewards, sizes, weights, grouping = grouped
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    table = rewards.to(torch.float64)
    table = table if table.ndim == 2 else table[:, None]
    if weights is None:
        weights = table.new_ones(table.shape[1])
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    groups, _, valid = Segments.from_cu_seqlens(bounds, table.shape[0])
    total = torch.where(table.isnan().all(1), torch.nan, (table * weights).nansum(1))
    statistics = _statistics(total, groups, sizes.numel(), grouping.unbiased)
    if grouping.combine == "normalize_then_sum":
        advantages = total.new_zeros(total.shape)
        for reward, weight in zip(table.unbind(1), weights.unbind(), strict=True):
            part = _statistics(reward, groups, sizes.numel(), grouping.unbiased)
            advantages += weight * _normalised(part, groups, reward, grouping)
        spread = _statistics(
            torch.where(total.isnan(), torch.nan, advantages),
            torch.zeros_like(groups),
            1,
            grouping.unbiased,
        )
        advantages = _divide(spread.centred, spread.std + grouping.eps)
    else:
        advantages = _normalised(statistics, groups, total, grouping)
    advantages, mean, std = (
        torch.where(valid, values, torch.nan).to(dtype)
        for values in (advantages, statistics.mean, statistics.std)
    )
    return GroupAdvantages(advantages, mean, std, statistics.active & valid)


def _statistics(rewards: Tensor, groups: Tensor, n_groups: int, unbiased: bool) -> _Statistics:
    scored = ~rewards.isnan()
    known = torch.where(scored, rewards, 0.0)
    zeros = rewards.new_zeros(n_groups)
    count = zeros.index_add(0, groups, scored.to(rewards.dtype))
    mean = zeros.index_add(0, groups, known) / count.clamp(min=1)
    # Equal rewards must give exactly 0: their rounded mean may differ from them, and dividing that
    # by a standard deviation as small would make a signal of it.
    highest = _extreme(rewards, scored, groups, n_groups, "amax", -torch.inf)
    lowest = _extreme(rewards, scored, groups, n_groups, "amin", torch.inf)
    active = (count > 1) & ~(highest == lowest)
    centred = torch.where(scored & active[groups], known - mean[groups], 0.0)
    squares = zeros.index_add(0, groups, centred.square())
    std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    return _Statistics(centred, count, mean, std, active)


def _extreme(
    rewards: Tensor, scored: Tensor, groups: Tensor, n_groups: int, kind: str, start: float
) -> Tensor:
    filled = torch.where(scored, rewards, start)
    return rewards.new_full((n_groups,), start).scatter_reduce(0, groups, filled, kind)


def _normalised(
    statistics: _Statistics, groups: Tensor, rewards: Tensor, grouping: Grouping
) -> Tensor:
    centred = statistics.centred
    if grouping.baseline == "leave_one_out":
        count = statistics.count[groups]
        # r - mean of the others = n / (n - 1) * (r - mean of all)
        centred = centred * count / (count - 1).clamp(min=1)
    if grouping.scale == "none":
        return centred
    if grouping.scale == "group":
        return _divide(centred, statistics.std[groups] + grouping.eps)
    batch = _statistics(rewards, torch.zeros_like(groups), 1, grouping.unbiased)
    return _divide(centred, batch.std + grouping.eps)


def _divide(centred: Tensor, by: Tensor) -> Tensor:
    # With eps = 0 a group of equal rewards would be 0 / 0.
    return torch.where(centred == 0, 0.0, centred / by)
