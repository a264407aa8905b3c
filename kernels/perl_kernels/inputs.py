"""The arguments every loss function has in common, checked and brought to one form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .advantage import GroupedRewards
from .aggregation import row_scale
from .coefficient import Rows
from .objective import PolicyLoss
from .segments import Segments


class LossInputs(NamedTuple):
    """Everything of a loss call but the log-probs; tensors are [N], without gradient, in the
    dtype of the computation, and 0 where `mask` is False."""

    segments: Segments
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

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[part]

        return Rows(
            mask,
            torch.where(mask, logprobs, 0.0),
            self.advantages[part],
            cut(self.old),
            cut(self.ref),
            cut(self.rollout),
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
            checks.check_length(name, tensor, n_tokens)
    if weights is not None:
        checks.check_weights(weights, n_tokens)
    if isinstance(advantages, GroupedRewards):
        advantages = advantages.advantages().advantages
    checks.check_same_device(
        like, cu_seqlens=bounds, advantages=advantages, weights=weights, **optional
    )

    dtype = compute_dtype(like)
    segments = Segments.from_cu_seqlens(bounds, n_tokens)
    if weights is None:
        weights = torch.ones(n_tokens, dtype=dtype, device=like.device)
    weights = weights.detach().to(dtype)
    mask = weights != 0
    if advantages.shape[0] == segments.count:
        advantages = segments.spread(advantages)

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.detach().to(dtype), 0.0)

    return LossInputs(
        segments,
        mask,
        weights,
        row_scale(loss, weights, segments, normalizer),
        masked(advantages),
        *(None if tensor is None else masked(tensor) for tensor in optional.values()),
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
