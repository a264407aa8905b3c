"""Group-relative advantages: rewards of all rollouts of a question, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import get_args

import torch
from torch import Tensor

from . import operators
from .dispatch import Backend, select_backend, tracing, values_visible
from .objective import check_number
from .values import Baseline, Combine, GroupAdvantages, Rewards, Scale


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
    backend: Backend = "auto",
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
        backend: see `perl_kernels.dispatch`.

    Returns:
        fp32 (fp64 for fp64 rewards); computed in fp64, without gradient. All NaN (`active` False)
        if `group_sizes` is a GPU tensor with a negative entry, or one that does not sum to B.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    grouped = GroupedRewards(
        rewards,
        group_sizes,
        scale=scale,
        baseline=baseline,
        unbiased=unbiased,
        eps=eps,
        reward_weights=reward_weights,
        combine=combine,
    ).checked()
    chosen = select_backend(backend, grouped.rewards)
    arguments = operators.advantages_arguments(grouped)
    return GroupAdvantages(*operators.group_advantages(*arguments, chosen))


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

    def checked(self) -> Rewards:
        """As the backends take them; see `group_advantages` for the errors."""
        for name, got, kind in (
            ("scale", self.scale, Scale),
            ("baseline", self.baseline, Baseline),
            ("combine", self.combine, Combine),
        ):
            if got not in get_args(kind):
                raise ValueError(f"{name} is {got!r}, must be one of {', '.join(get_args(kind))}")
        eps = float(check_number("eps", self.eps, "a number"))
        if not eps >= 0:
            raise ValueError(f"eps is {eps}, must be at least 0")
        tensors = _tensors(self.rewards, self.group_sizes, self.reward_weights)
        return Rewards(*tensors, self.scale, self.baseline, self.unbiased, eps, self.combine)


def _tensors(
    rewards: Tensor,
    group_sizes: Tensor | Sequence[int],
    reward_weights: Tensor | Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rewards, sizes and weights, checked and on one device."""
    if not isinstance(rewards, Tensor) or type(rewards).__name__ == "DTensor":
        raise TypeError(f"rewards is a {type(rewards).__name__}, must be a plain tensor")
    if rewards.ndim not in (1, 2) or rewards.is_complex():
        raise ValueError(f"rewards has shape {list(rewards.shape)}, must be real and [B] or [B, R]")
    given = isinstance(group_sizes, Tensor)
    sizes = group_sizes if given else torch.as_tensor(group_sizes, device="cpu")
    if sizes.numel() == 0:
        sizes = sizes.to(torch.int64)
    if sizes.ndim != 1 or sizes.is_floating_point():
        raise ValueError(
            f"group_sizes has shape {list(sizes.shape)} and dtype {sizes.dtype}, must be [P] "
            "integers, the number of rollouts of each group"
        )
    if sizes.numel() == 0 and len(rewards):
        raise ValueError(f"group_sizes is empty, but there are {len(rewards)} rewards")
    known = None if given else list(group_sizes)
    if known is None and values_visible(sizes):
        known = sizes.tolist()
    if known and (sum(known) != len(rewards) or min(known) < 0):
        low, total = min(known), sum(known)
        got = f"holds {low}" if low < 0 else f"sums to {total}"
        flatten = rewards.ndim == 2 and total == rewards.numel()
        raise ValueError(
            f"group_sizes must be at least 0 and sum to the {len(rewards)} rewards, but {got}"
            + ("; rewards [P, G] are to be given as rewards.flatten()" if flatten else "")
            + "; they are the number of rollouts of each group, not the group of each rollout"
        )
    n_rewards = rewards.shape[1] if rewards.ndim == 2 else 1
    weights = None
    if reward_weights is not None:
        if not isinstance(reward_weights, Tensor):
            reward_weights = operators.as_numbers(*reward_weights)
        weights = reward_weights.detach().to(torch.float64)
        if list(weights.shape) != [n_rewards]:
            raise ValueError(
                f"reward_weights has shape {list(weights.shape)}, must be [{n_rewards}]"
            )
        weights = _move(weights, rewards.device)
    return rewards.detach(), _move(sizes.to(torch.int64), rewards.device), weights


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tracing():
        # A copy, as the caller may fill a pinned buffer anew before this one is read.
        tensor = tensor.clone().pin_memory()
    return tensor.to(device, non_blocking=True)
