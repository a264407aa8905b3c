"""What a group's rewards say about each of its rollouts, and how much the group counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from perl.config import AdvantageConfig
from perl_kernels import group_advantages


def advantages_of(
    rewards: Sequence[np.ndarray],
    orders: Sequence[np.ndarray] | None = None,
    config: AdvantageConfig | None = None,
) -> list[np.ndarray]:
    """Advantages of groups: each reward minus a mean, over a standard deviation.

    Over the whole group there is one baseline and one scale per example, over all its orders together (PeRL, Eq. 4-5).
    Over its order a rollout is compared with those that saw the same prompt. `order+group` adds both z-scores, as
    R1-ShareVL (arXiv 2505.16673) does over variants of a question. NaN rewards get 0.

    Args:
        rewards: one float64 [R_i] per group.
        orders: for each group int64 [R_i], which of its orders each rollout saw, ascending; only `group` does without.
        config: what is compared and how it is scaled; left out, the paper's.

    Returns:
        one float32 [R_i] per group.
    """
    config = config or AdvantageConfig()
    if not rewards:
        return []
    flat = torch.from_numpy(np.concatenate(rewards)).float()
    sizes = [len(r) for r in rewards]
    total = torch.zeros_like(flat)
    if config.over != "order":
        total += _normalised(flat, sizes, config)
    if config.over != "group":
        if orders is None:
            raise ValueError(f"advantages over {config.over} need the orders of the rollouts")
        per_order = [int(n) for o in orders for n in np.unique(o, return_counts=True)[1]]
        total += _normalised(flat, per_order, config)
    return [part.numpy() for part in total.split(sizes)]


def _normalised(
    rewards: torch.Tensor, sizes: Sequence[int], config: AdvantageConfig
) -> torch.Tensor:
    return group_advantages(
        rewards, torch.tensor(sizes), scale=config.scale, baseline=config.baseline
    ).advantages


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
    if kind == "log":
        return max(0.0, -math.log(0.02 + m))
    raise ValueError(f"kind must be none, exp, power or log, got '{kind}'")


def group_mean(values: np.ndarray) -> float:
    """The mean of a group's scores [R] over those that are not NaN; NaN if there are none."""
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else math.nan
