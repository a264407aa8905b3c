"""Rewards of groups of rollouts, as the operators take them, and what is found out about them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

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


class Grouping(NamedTuple):
    """How rewards become advantages; see `group_advantages`."""

    scale: Scale = "group"
    baseline: Baseline = "mean"
    unbiased: bool = True
    eps: float = 1e-6
    combine: Combine = "sum_then_normalize"


class Rewards(NamedTuple):
    """`rewards [B]` or [B, R], `sizes [P]` int64 and `weights [R]` fp64 or None, on one device."""

    rewards: Tensor
    sizes: Tensor
    weights: Tensor | None
    grouping: Grouping
