"""From per-token terms to a scalar: the factor of each token, and the metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficient import Rows, Terms
from .objective import PolicyLoss
from .segments import Segments


def row_scale(
    loss: PolicyLoss,
    weights: Tensor,
    segments: Segments,
    normalizer: float | Tensor | None,
    valid: Tensor,
) -> Tensor:
    """Factor of each token's term, [N], such that the loss is sum(scale * term).

    `normalizer` replaces the count in the denominator: sum(weights) for `token-mean`, otherwise
    the number of sequences. All NaN where `valid []` is False.
    """
    match loss.aggregation:
        case "token-mean":
            count = weights.sum()
        case "seq-mean-token-mean":
            per_sequence = segments.sum(weights)
            count = (per_sequence != 0).sum()
            weights = _divide(weights, segments.spread(per_sequence))
        case "seq-mean-token-sum":
            count = segments.count
        case "seq-mean-token-sum-norm":
            count = segments.count
            assert loss.max_completion_length is not None
            weights = weights / loss.max_completion_length
    scale = _divide(weights, count if normalizer is None else normalizer)
    return torch.where(valid, scale, torch.nan)


def _divide(weights: Tensor, by: float | Tensor) -> Tensor:
    # Only tokens without weight can meet a denominator of 0; 0 / 0 is 0 there, not NaN. A number
    # stays one: made a tensor on the GPU, it would be copied there, and the copy waited for.
    return torch.where(weights == 0, 0.0, weights / by)


def aggregate(scale: Tensor, mask: Tensor, terms: Tensor, valid: Tensor) -> Tensor:
    """The loss, []; NaN if anything in it is not finite, or `valid []` is False."""
    loss = (scale * torch.where(mask, terms, 0.0)).sum()
    # Added rather than selected, so that the gradients are not silenced.
    return loss + torch.where(valid & loss.isfinite(), 0.0, torch.nan)


@torch.no_grad()
def loss_metrics(rows: Rows, terms: Terms, valid: Tensor) -> dict[str, Tensor]:
    """Means over the unmasked tokens, as 0-dim tensors; see `LossOutput`. Where `valid []` is
    False, all rows are invalid ones, and at least one is counted."""
    mask, zero = rows.mask, rows.logprobs.new_zeros(())
    count = mask.sum()

    def mean(values: Tensor | None, default: float = 0.0) -> Tensor:
        if values is None:
            return zero + default
        total = torch.where(mask, values.to(zero.dtype), 0.0).sum()
        return torch.where(count > 0, total / count, default)

    rollout_gap = None
    if rows.rollout is not None:
        rollout_gap = rows.rollout - (rows.logprobs if rows.old is None else rows.old)
    ratio_max = torch.where(mask, terms.ratio, 0.0).amax() if mask.numel() else zero
    finite = terms.value.isfinite() & rows.logprobs.isfinite()
    return {
        "kl": mean(terms.kl),
        "entropy": mean(rows.entropy),
        "clip_fraction": mean(terms.clipped_low | terms.clipped_high),
        "clip_fraction_low": mean(terms.clipped_low),
        "clip_fraction_high": mean(terms.clipped_high),
        "dual_clip_fraction": mean(terms.dual_clipped),
        "ratio_mean": mean(terms.ratio, default=1.0),
        "ratio_max": torch.where(count > 0, ratio_max, 1.0),
        "rollout_kl": mean(rollout_gap),
        "correction_mean": mean(terms.correction, default=1.0),
        "tokens": count,
        "invalid_rows": torch.where(valid, (mask & ~finite).sum(), max(mask.numel(), 1)),
    }
