"""`policy_loss`: the loss of log-probs that are already there."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops
from .advantage import GroupedRewards
from .arguments import loss_inputs
from .dispatch import Backend, select_backend
from .inputs import compute_dtype
from .objective import PolicyLoss
from .outputs import LossOutput, loss_output


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """The loss `loss` of N scored tokens in B completions.

    Args:
        logprobs: [N] log-prob of each token under the policy.
        advantages: [B], [N] (taken as [B] where B = N), or `GroupedRewards` of the B completions.
        cu_seqlens: [B + 1] int32 or int64, monotone from 0 to N; completions may be empty. On the CPU or
            where the log-probs are; on the CPU its values are checked without a synchronisation.
        loss: what is optimised; the formulas are in `PolicyLoss`.
        old_logprobs: [N] under the policy that the ratio refers to; left out, the policy itself, so
            that every ratio is 1.
        ref_logprobs: [N] under the reference model; needed by a KL term. Without a KL term, the k3
            estimate is reported in the metrics.
        rollout_logprobs: [N] as the rollout engine gave them; needed by `loss.correction`.
        entropy: [N]; needed by an entropy bonus.
        weights: [N] factor of each token's term, at least 0. Tokens of weight 0 take no part in
            anything: sequence ratios are over the other tokens. Their other values may be anything,
            but for targets, which must be in range.
        normalizer: denominator in place of the call's own count (the sum of the weights, or the
            number of sequences): the whole step's, if the step is split over several calls. Above
            0 and finite, a float or a 0-dim tensor.
        backend: see `perl_kernels.dispatch`.

    Returns:
        `LossOutput`, computed in fp32 (fp64 for fp64 log-probs). The loss is differentiable with
        respect to `logprobs` and `entropy`, and everything else is taken as a constant; it is 0 without tokens, and NaN where an input is NaN
        or infinite, or the values of a tensor that may not be looked at (on a GPU, or under
        torch.compile) are refused ones (see `invalid_rows`).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    checks.check_floating("logprobs", logprobs, 1, "[N]")
    if entropy is not None:
        checks.check_logprobs("entropy", entropy, logprobs.shape[0])
        checks.check_same_device(logprobs, entropy=entropy)
    inputs = loss_inputs(
        logprobs,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        weights=weights,
        normalizer=normalizer,
        has_entropy=entropy is not None,
    )
    chosen = select_backend(backend, logprobs)
    value, metrics, *_ = ops.policy_loss(
        logprobs, entropy, *ops.loss_arguments(loss, inputs), chosen
    )
    dtype = compute_dtype(logprobs)
    seen = torch.full_like(logprobs, torch.nan) if entropy is None else entropy
    return loss_output(value, metrics, logprobs.detach().to(dtype), seen.detach().to(dtype))
