"""What goes into the backends, what comes out of them, and what the public functions return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
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

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]


# ---- what the public functions return


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


class GroupAdvantages(NamedTuple):
    """`advantages [B]`; `mean [P]` and `std [P]` of each group's rewards, over those that are not
    NaN (0 where there is none, std also where there is one); `active [P]` bool: whether the
    rewards of the group differ, so that its advantages are not all 0."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    active: Tensor


# ---- what the backends take


class Rewards(NamedTuple):
    """`rewards [B]` or [B, R], `sizes [P]` int64 and `weights [R]` fp64 or None, on one device, and
    how they become advantages: see `group_advantages`."""

    rewards: Tensor
    sizes: Tensor
    weights: Tensor | None
    scale: Scale = "group"
    baseline: Baseline = "mean"
    unbiased: bool = True
    eps: float = 1e-6
    combine: Combine = "sum_then_normalize"


class LossInputs(NamedTuple):
    """Everything of a loss call but the log-probs, as the caller gave it (any dtype, any strides);
    see `policy_loss`.

    Either `advantages` or `rewards` is there; `per_token` says that there is an advantage for each
    token, which its length cannot where N = B. `count` is a normalizer known on the host,
    `normalizer` one that is not.
    """

    cu_seqlens: Tensor
    advantages: Tensor | None = None
    rewards: Rewards | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    rollout: Tensor | None = None
    weights: Tensor | None = None
    normalizer: Tensor | None = None
    count: float | None = None
    per_token: bool = False

    def rows(self, part: slice) -> LossInputs:
        """With the log-probs cut to the rows `part`: what a row, or an `evaluate` of some whole
        completions, needs beside `Prepared`."""
        cut = {
            name: None if tensor is None else tensor[part]
            for name, tensor in (("old", self.old), ("ref", self.ref), ("rollout", self.rollout))
        }
        return self._replace(**cut)


class Prepared(NamedTuple):
    """What a token's term needs beside log-probs.

    `advantages [N]`: masked, of normalised rewards, NaN where a weight cannot be used.
    `scale [N]`: factor of the token's term in the loss, the division by the denominator included;
    0 exactly where the token does not count, NaN where the denominator cannot be told.
    `valid []` bool: whether `cu_seqlens` and `normalizer` can be used.
    """

    advantages: Tensor
    scale: Tensor
    valid: Tensor

    def rows(self, part: slice) -> Prepared:
        return Prepared(self.advantages[part], self.scale[part], self.valid)


class Scoring(NamedTuple):
    """score = softcap * tanh((logit + bias) / softcap) / temperature, and what is asked of it.

    `targets [n]`; `bias [V]` or None; `temperature`: a float or [n]; `softcap`: a float or None.
    """

    targets: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None

    def rows(self, part: slice | Tensor) -> Scoring:
        tau = self.temperature
        tau = tau[part] if isinstance(tau, Tensor) else tau
        return self._replace(targets=self.targets[part], temperature=tau)


# ---- what the backends return


class RowStats(NamedTuple):
    """Per row, [n] each: `logprobs` of the target, `entropy` in nats, `shift`: the largest score,
    `log_sum`: log sum exp(score - shift).

    A score of -inf is a probability of 0 and legal. A row with a NaN, +inf or no score above -inf,
    or with a target outside the columns, has log-prob NaN; but for the target, entropy NaN too.
    """

    logprobs: Tensor
    entropy: Tensor
    shift: Tensor
    log_sum: Tensor

    def rows(self, part: slice | Tensor) -> RowStats:
        return RowStats(*(tensor[part] for tensor in self))

    @classmethod
    def joined(cls, parts: Sequence[RowStats]) -> RowStats:
        """Of the rows of all `parts`, at least one."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Coefficients(NamedTuple):
    """Derivatives of the loss by `logprobs [N]` and by `entropy [N]` (None: all 0)."""

    logprobs: Tensor
    entropy: Tensor | None

    def rows(self, part: slice | Tensor) -> Coefficients:
        return Coefficients(
            self.logprobs[part], None if self.entropy is None else self.entropy[part]
        )

    def times(self, factor: Tensor) -> Coefficients:
        by_entropy = None if self.entropy is None else self.entropy * factor
        return Coefficients(self.logprobs * factor, by_entropy)

    def idle(self) -> Tensor:
        """Rows that no gradient flows to, [N] bool."""
        idle = self.logprobs == 0
        return idle if self.entropy is None else idle & (self.entropy == 0)


class Evaluated(NamedTuple):
    """`value []`: the loss. `metrics [12]`: in the order of `METRICS`. `coefficients`: its
    derivatives."""

    value: Tensor
    metrics: Tensor
    coefficients: Coefficients


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
