"""`reference.group_advantages`: one group after the other, as one would write it down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grouping import Baseline, Combine, GroupAdvantages, Scale


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
    """As `perl_kernels.group_advantages`."""
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    table = rewards.double() if rewards.ndim == 2 else rewards.double()[:, None]
    weights = torch.ones(table.shape[1]) if reward_weights is None else reward_weights
    weights = torch.as_tensor(weights, dtype=torch.float64, device=table.device)
    total = (table * weights).nansum(1)
    total[table.isnan().all(1)] = torch.nan
    sizes = [int(size) for size in group_sizes]

    def normalised(values: Tensor) -> Tensor:
        whole = _spread(values, unbiased)
        pieces = []
        for group in values.split(sizes):
            if not _differ(group):
                pieces.append(torch.zeros_like(group))
                continue
            known = ~group.isnan()
            count = int(known.sum())
            advantage = group - group[known].mean()
            if baseline == "leave_one_out":
                others = (group[known].sum() - group) / (count - 1)
                advantage = group - others
            if scale != "none":
                by = _spread(group, unbiased) if scale == "group" else whole
                advantage = advantage / (by + eps)
            pieces.append(advantage.nan_to_num(0.0))
        return torch.cat(pieces) if pieces else values

    advantages = normalised(total)
    if combine == "normalize_then_sum":
        summed = sum(w * normalised(column) for w, column in zip(weights, table.T, strict=True))
        assert isinstance(summed, Tensor)
        summed[total.isnan()] = torch.nan
        advantages = torch.zeros_like(summed)
        if _differ(summed):
            centred = summed - summed[~summed.isnan()].mean()
            advantages = (centred / (_spread(summed, unbiased) + eps)).nan_to_num(0.0)
    groups = [group[~group.isnan()] for group in total.split(sizes)]
    mean = [group.mean() if len(group) else total.new_zeros(()) for group in groups]
    std = [_spread(group, unbiased) for group in groups]
    active = torch.tensor([_differ(group) for group in groups], dtype=torch.bool)
    return GroupAdvantages(
        advantages.to(dtype),
        torch.stack(mean).to(dtype) if mean else total[:0].to(dtype),
        torch.stack(std).to(dtype) if std else total[:0].to(dtype),
        active.to(total.device),
    )


def _differ(values: Tensor) -> bool:
    known = values[~values.isnan()]
    return len(known) > 1 and bool((known != known[0]).any())


def _spread(values: Tensor, unbiased: bool) -> Tensor:
    """Standard deviation of the values that are not NaN; 0 if all are equal."""
    known = values[~values.isnan()]
    return known.std(unbiased=unbiased) if _differ(known) else values.new_zeros(())
