"""The arguments every loss function has in common, checked and brought to one form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .advantage import GroupedRewards
from .aggregation import row_scale
from .coefficient import Rows
from .head import rows_of
from .objective import PolicyLoss
from .segments import Segments


class LossInputs(NamedTuple):
    """Everything of a loss call but the log-probs; tensors are [N], without gradient, in the
    dtype of the computation, and 0 where `mask` is False. `valid []` bool: whether `cu_seqlens` and
    `normalizer` have values that can be used; rows whose own weight has none have advantage NaN."""

    segments: Segments
    valid: Tensor
    mask: Tensor
    weights: Tensor
    scale: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None

    def rows(self, logprobs: Tensor, entropy: Tensor | None, start: int = 0) -> Rows:
        """The rows from `start` on that belong to `logprobs [n]` and `entropy [n]`."""
        part = slice(start, start + logprobs.shape[0])
        mask = self.mask[part]
        return Rows(
            mask,
            torch.where(mask, logprobs, 0.0),
            self.advantages[part],
            rows_of(self.old, part),
            rows_of(self.ref, part),
            rows_of(self.rollout, part),
            None if entropy is None else torch.where(mask, entropy, 0.0),
        )


def loss_inputs(
    like: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
    has_entropy: bool = True,
) -> LossInputs:
    """Check the common arguments against `like [N, ...]`, the tensor that is scored."""
    n_tokens = like.shape[0]
    checks.check_objective(loss, ref_logprobs, rollout_logprobs, has_entropy)
    bounds = checks.check_cu_seqlens(cu_seqlens, n_tokens)
    checks.check_advantages(advantages, bounds.numel() - 1, n_tokens)
    checks.check_normalizer(normalizer)
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    for name, tensor in optional.items():
        if tensor is not None:
            checks.check_logprobs(name, tensor, n_tokens)
    if weights is not None:
        checks.check_weights(weights, n_tokens)
    if isinstance(advantages, GroupedRewards):
        advantages = advantages.advantages().advantages
    checks.check_same_device(
        like, cu_seqlens=bounds, advantages=advantages, weights=weights, **optional
    )
    if isinstance(normalizer, Tensor):
        # A 0-dim tensor on the host is as good as a number.
        if normalizer.device.type != "cpu":
            checks.check_same_device(like, normalizer=normalizer)
        normalizer = normalizer.detach()

    dtype = compute_dtype(like)
    segments = Segments.from_cu_seqlens(bounds, n_tokens)
    if weights is None:
        weights = torch.ones(n_tokens, dtype=dtype, device=like.device)
    weights = weights.detach().to(dtype)
    mask = weights != 0
    valid = segments.valid
    if isinstance(normalizer, Tensor):
        valid = valid & (normalizer > 0) & normalizer.isfinite()
    if advantages.shape[0] == segments.count:
        advantages = segments.spread(advantages)
    # The advantage is a factor of every policy term, so that the row and the loss become NaN.
    advantages = torch.where((weights >= 0) & weights.isfinite(), advantages, torch.nan)

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.detach().to(dtype), 0.0)

    return LossInputs(
        segments,
        valid,
        mask,
        weights,
        row_scale(loss, weights, segments, normalizer, valid),
        masked(advantages),
        *(None if tensor is None else masked(tensor) for tensor in optional.values()),
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
