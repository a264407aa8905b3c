"""The arguments all loss functions have in common, checked."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .advantage import GroupedRewards
from .inputs import LossInputs
from .objective import PolicyLoss


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
    grouped = advantages.checked() if isinstance(advantages, GroupedRewards) else None
    checks.check_same_device(
        like,
        advantages=advantages if grouped is None else grouped.rewards,
        weights=weights,
        **optional,
    )
    if bounds.device.type != "cpu":
        checks.check_same_device(like, cu_seqlens=bounds)
    if isinstance(normalizer, Tensor) and normalizer.device.type != "cpu":
        checks.check_same_device(like, normalizer=normalizer)
    return LossInputs(
        bounds,
        advantages.detach() if isinstance(advantages, Tensor) else None,
        grouped,
        *(None if tensor is None else tensor.detach() for tensor in optional.values()),
        weights=None if weights is None else weights.detach(),
        normalizer=normalizer.detach() if isinstance(normalizer, Tensor) else None,
        count=None if isinstance(normalizer, Tensor) or normalizer is None else float(normalizer),
    )
