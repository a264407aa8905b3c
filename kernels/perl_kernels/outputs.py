"""What the functions of this package return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = (
    "kl",
    "entropy",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_max",
    "rollout_kl",
    "correction_mean",
    "tokens",
    "invalid_rows",
)


class TokenLogprobs(NamedTuple):
    """`logprobs [N]`: log-probability of each target. `entropy [N]`: entropy of each row's
    distribution, in nats. Both fp32 (fp64 for fp64 inputs) and differentiable."""

    logprobs: Tensor
    entropy: Tensor


class LossOutput(NamedTuple):
    """What a loss function returns.

    Attributes:
        loss: [], differentiable.
        logprobs: [N], without gradient.
        entropy: [N], without gradient; NaN from `policy_loss` if it was given no entropy.
        metrics: 0-dim tensors without gradient, means over the tokens whose weight is not 0:
            `kl`, `entropy`, `clip_fraction_low`, `clip_fraction_high`, `clip_fraction`,
            `dual_clip_fraction`, `ratio_mean`, `ratio_max`, `rollout_kl` (mean of rollout - old),
            `correction_mean`, and the counts `tokens` and `invalid_rows`. One whose input was not
            given is 0 (1 for a ratio or a weight). `invalid_rows` counts the tokens whose term is not
            finite or whose weight or temperature is out of range; all N of them, at least 1, if
            `cu_seqlens` or `normalizer` is. Where it is not 0, the loss is NaN.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def loss_output(loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor) -> LossOutput:
    """From `metrics [12]` in the order of `METRICS`."""
    return LossOutput(loss, logprobs, entropy, dict(zip(METRICS, metrics.unbind(), strict=True)))
