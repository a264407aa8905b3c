"""Which tokens a loss is taken over, as weights."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .objective import check_number


def top_entropy_weights(
    entropy: Tensor, fraction: float, *, weights: Tensor | None = None
) -> Tensor:
    """1 for the `fraction` of tokens with the highest entropy, 0 for the others, as `weights` of a
    loss: the high-entropy minority of Wang et al., arXiv 2506.01939.

    The other tokens leave the loss altogether, KL term and denominator included. TRL's
    `top_entropy_quantile` chooses the same tokens, but divides by the number of all of them (give
    the loss that `normalizer`) and keeps the KL term of all.

    Args:
        entropy: [N], in nats, of the tokens of the whole batch: the threshold is one for all.
        fraction: share of the tokens that stay, in (0, 1]. Ties at the threshold all stay, and NaN.
        weights: [N], multiplied in; tokens of weight 0 neither stay nor count for the threshold.

    Returns:
        [N] weights in the dtype of `weights`, else fp32, without gradient. Nothing waits for the
        device.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    checks.check_floating("entropy", entropy, 1, "[N]")
    check_number("fraction", fraction, "a number")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, must be above 0 and at most 1")
    if weights is None:
        weights = torch.ones_like(entropy, dtype=torch.float32)
    checks.check_weights(weights, entropy.shape[0])
    weights = weights.detach()
    counted = weights != 0
    # torch.quantile takes at most 16 million values; sorting takes any number.
    entropy = entropy.detach()
    known = torch.where(counted & ~entropy.isnan(), entropy, -torch.inf)
    ranked = known.sort(descending=True).values
    # 0.07 * 100 is a little more than 7.
    kept = (counted.sum().double() * fraction - 1e-6).ceil().to(torch.int64)
    threshold = ranked.gather(0, (kept - 1).clamp(min=0)[None]) if ranked.numel() else ranked
    # A NaN stays too: leaving it out would hide it.
    stays = counted & ~(entropy < threshold)
    return weights * stays.to(weights.dtype)
