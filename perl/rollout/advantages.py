"""What a group's rewards say about each of its rollouts, and how much the group counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from perl.config import AdvantageConfig
from perl_kernels import group_advantages


def advantages_of(
    rewards: np.ndarray,
    group_sizes: Sequence[int],
    order_sizes: Sequence[int],
    config: AdvantageConfig,
) -> np.ndarray:
    """Advantages of groups: each reward minus a mean, over a standard deviation.

    Over the whole group there is one baseline and one scale per example, over all its orders together (PeRL, Eq. 4-5).
    Over its order a rollout is compared with those that saw the same prompt. `order+group` adds both z-scores, as
    R1-ShareVL (arXiv 2505.16673) does over variants of a question.

    Args:
        rewards: float64 [B], the rollouts of a group together, those of an order within it together.
        group_sizes: rollouts of each group; they add up to B.
        order_sizes: rollouts of each order of each group; they add up to B as well.
        config: what is compared and how it is scaled.

    Returns:
        float32 [B]; 0 where the reward is NaN.
    """
    flat = torch.from_numpy(rewards).float()
    total = torch.zeros_like(flat)
    for over, sizes in (("group", group_sizes), ("order", order_sizes)):
        if over in config.over and len(flat):
            total += group_advantages(
                flat, torch.tensor(sizes), scale=config.scale, baseline=config.baseline
            ).advantages
    return total.numpy()


def group_weight(mean: float, kind: str, power: float = 1.0) -> float:
    """The weight of a group whose rollouts scored `mean` (0 to 1) on average: hard ones count more.

    UniVG-R1, arXiv 2505.14231, with the mean IoU of a group m: `exp` exp(1 - m), `power`
    (1.05 - m)^power, `log` -log(0.02 + m), here at least 0; `none` is 1. A mean beyond 0 or 1
    counts as 0 or 1; one that is NaN says nothing, and the weight is 1.
    """
    if kind == "none" or math.isnan(mean):
        return 1.0
    m = min(1.0, max(0.0, mean))
    if kind == "exp":
        return math.exp(1 - m)
    if kind == "power":
        return (1.05 - m) ** power
    return max(0.0, -math.log(0.02 + m))


def group_mean(values: np.ndarray) -> float:
    """The mean of a group's scores [R] over those that are not NaN; NaN if there are none."""
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else math.nan
