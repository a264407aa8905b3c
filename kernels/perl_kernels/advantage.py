"""Group-relative advantages: rewards of all rollouts of a question, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .dispatch import values_visible
from .scalars import check_number
from .segments import Segments

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]


class GroupAdvantages(NamedTuple):
    """`advantages [B]`; `mean [P]` and `std [P]` of each group's rewards, over those that are not
    NaN (0 where there is none, std also where there is one); `active [P]` bool: whether the
    rewards of the group differ, so that its advantages are not all 0."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    active: Tensor


class _Statistics(NamedTuple):
    centred: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    active: Tensor


def group_advantages(
    rewards: Tensor,
    group_sizes: Tensor | Sequence[int],
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    unbiased: bool = True,
    eps: float = 1e-6,
    reward_weights: Tensor | Sequence[float] | None = None,
    combine: Combine = "sum_then_normalize",
) -> GroupAdvantages:
    """Advantage of each rollout against the others of its group.

    A = (r - baseline) / (std + eps), as in GRPO (DeepSeekMath; TRL has eps 1e-4, verl 1e-6).
    Equal rewards give exactly 0. A NaN reward is left out of its group and gets advantage 0.

    Args:
        rewards: [B], groups one after the other; or [B, R] for R rewards of each rollout, where a
            NaN leaves out that one reward, and the rollout if all of its rewards are NaN.
        group_sizes: [P] integers that sum to B; groups may have any size, also 0 or 1.
        scale: `group` divides by the standard deviation of the group, `batch` by that of all
            rewards, `none` does not divide (Dr. GRPO). A group of one has advantage 0.
        baseline: `mean` of the group, or `leave_one_out`: mean of the others (RLOO).
        unbiased: standard deviation with n - 1 (TRL, verl) instead of n.
        eps: added to the standard deviation.
        reward_weights: [R], factors of the R rewards; 1 each if left out.
        combine: `sum_then_normalize`: the weighted sum is the reward. `normalize_then_sum`: each
            reward is normalised in its group, the weighted sum then over the batch (GDPO, TRL);
            `mean`, `std` and `active` are then those of the weighted sum of the raw rewards.

    Returns:
        fp32 (fp64 for fp64 rewards); computed in fp64, without gradient. All NaN (`active` False)
        if `group_sizes` is a GPU tensor with a negative entry, or one that does not sum to B.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    rewards, sizes, weights = _checked(
        rewards, group_sizes, scale, baseline, eps, reward_weights, combine
    )
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    table = rewards.detach().to(torch.float64)
    table = table if table.ndim == 2 else table[:, None]
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    groups, _, valid = Segments.from_cu_seqlens(bounds, table.shape[0])
    total = torch.where(table.isnan().all(1), torch.nan, (table * weights).nansum(1))
    statistics = _statistics(total, groups, sizes.numel(), unbiased)
    if combine == "normalize_then_sum":
        advantages = total.new_zeros(total.shape)
        for reward, weight in zip(table.unbind(1), weights.unbind(), strict=True):
            part = _statistics(reward, groups, sizes.numel(), unbiased)
            advantages += weight * _normalised(part, groups, reward, scale, baseline, unbiased, eps)
        spread = _statistics(
            torch.where(total.isnan(), torch.nan, advantages), torch.zeros_like(groups), 1, unbiased
        )
        advantages = _divide(spread.centred, spread.std + eps)
    else:
        advantages = _normalised(statistics, groups, total, scale, baseline, unbiased, eps)
    advantages, mean, std = (
        torch.where(valid, values, torch.nan).to(dtype)
        for values in (advantages, statistics.mean, statistics.std)
    )
    return GroupAdvantages(advantages, mean, std, statistics.active & valid)


@dataclass(frozen=True, eq=False)
class GroupedRewards:
    """Rewards in place of `advantages`: the loss normalises them itself.

    The fields are the arguments of `group_advantages`; `rewards` has one row per completion.
    """

    rewards: Tensor
    group_sizes: Tensor | Sequence[int]
    _: KW_ONLY
    scale: Scale = "group"
    baseline: Baseline = "mean"
    unbiased: bool = True
    eps: float = 1e-6
    reward_weights: Tensor | Sequence[float] | None = None
    combine: Combine = "sum_then_normalize"

    def advantages(self) -> GroupAdvantages:
        """`group_advantages` of these fields."""
        return group_advantages(
            self.rewards,
            self.group_sizes,
            scale=self.scale,
            baseline=self.baseline,
            unbiased=self.unbiased,
            eps=self.eps,
            reward_weights=self.reward_weights,
            combine=self.combine,
        )


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
    statistics: _Statistics,
    groups: Tensor,
    rewards: Tensor,
    scale: Scale,
    baseline: Baseline,
    unbiased: bool,
    eps: float,
) -> Tensor:
    centred = statistics.centred
    if baseline == "leave_one_out":
        count = statistics.count[groups]
        # r - mean of the others = n / (n - 1) * (r - mean of all)
        centred = centred * count / (count - 1).clamp(min=1)
    if scale == "none":
        return centred
    if scale == "group":
        return _divide(centred, statistics.std[groups] + eps)
    batch = _statistics(rewards, torch.zeros_like(groups), 1, unbiased)
    return _divide(centred, batch.std + eps)


def _divide(centred: Tensor, by: Tensor) -> Tensor:
    # With eps = 0 a group of equal rewards would be 0 / 0.
    return torch.where(centred == 0, 0.0, centred / by)


def _checked(
    rewards: Tensor,
    group_sizes: Tensor | Sequence[int],
    scale: str,
    baseline: str,
    eps: float,
    reward_weights: Tensor | Sequence[float] | None,
    combine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, got, kind in (
        ("scale", scale, Scale),
        ("baseline", baseline, Baseline),
        ("combine", combine, Combine),
    ):
        if got not in get_args(kind):
            raise ValueError(f"{name} is {got!r}, must be one of {', '.join(get_args(kind))}")
    check_number("eps", eps, "a number")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, must be at least 0")
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards is a {type(rewards).__name__}, must be a tensor")
    if rewards.ndim not in (1, 2) or rewards.is_complex():
        raise ValueError(f"rewards has shape {list(rewards.shape)}, must be real and [B] or [B, R]")
    sizes = torch.as_tensor(group_sizes)
    if sizes.numel() == 0:
        sizes = sizes.to(torch.int64)
    if sizes.ndim != 1 or sizes.is_floating_point():
        raise ValueError(
            f"group_sizes has shape {list(sizes.shape)} and dtype {sizes.dtype}, must be [P] "
            "integers"
        )
    if sizes.numel() == 0 and len(rewards):
        raise ValueError(f"group_sizes is empty, but there are {len(rewards)} rewards")
    visible = values_visible(sizes) or not (
        isinstance(group_sizes, Tensor) or torch.compiler.is_compiling()
    )
    if visible and (sizes.sum() != len(rewards) or (sizes < 0).any()):
        raise ValueError(
            f"group_sizes must be at least 0 and sum to the {len(rewards)} rewards, "
            f"but sums to {int(sizes.sum())}"
        )
    n_rewards = rewards.shape[1] if rewards.ndim == 2 else 1
    if reward_weights is None:
        weights = torch.ones(n_rewards, dtype=torch.float64, device=rewards.device)
    else:
        weights = _move(torch.as_tensor(reward_weights, dtype=torch.float64), rewards.device)
    if list(weights.shape) != [n_rewards]:
        raise ValueError(f"reward_weights has shape {list(weights.shape)}, must be [{n_rewards}]")
    return rewards, _move(sizes.to(torch.int64), rewards.device), weights


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
