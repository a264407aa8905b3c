"""What goes into a backend and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grouping import Rewards


class LossInputs(NamedTuple):
    """Everything of a loss call but the log-probs, as the caller gave it; see `policy_loss`.

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
        """With the per-token tensors of a token-level loss cut to the rows `part`."""
        cut = {
            name: None if tensor is None else tensor[part]
            for name, tensor in (("old", self.old), ("ref", self.ref), ("rollout", self.rollout))
        }
        return self._replace(**cut)

    def completions(self, first: int, last: int, part: slice) -> LossInputs:
        """Of the completions first..last - 1, whose tokens are the rows `part`, without the
        aggregation's count; `advantages` must be there."""
        advantages = self.advantages
        assert advantages is not None
        return self.rows(part)._replace(
            cu_seqlens=self.cu_seqlens[first : last + 1] - part.start,
            advantages=advantages[part] if self.per_token else advantages[first:last],
            weights=None if self.weights is None else self.weights[part],
            normalizer=None,
            count=1.0,
        )


class Prepared(NamedTuple):
    """What the row coefficient needs beside the row's own log-probs: `advantages [N]`, after
    masking, normalisation of rewards and folding; `scale [N]`, the factor of each token's term
    before the division by the denominator, 0 exactly where the token does not count."""

    advantages: Tensor
    scale: Tensor


class Coefficients(NamedTuple):
    """Derivatives of the undivided loss by `logprobs [N]` and by `entropy [N]` (None: all 0)."""

    logprobs: Tensor
    entropy: Tensor | None

    def rows(self, part: slice | Tensor) -> Coefficients:
        return Coefficients(
            self.logprobs[part], None if self.entropy is None else self.entropy[part]
        )

    def idle(self) -> Tensor:
        """Rows that no gradient flows to, [N] bool."""
        idle = self.logprobs == 0
        return idle if self.entropy is None else idle & (self.entropy == 0)


class Evaluated(NamedTuple):
    """`value []`: the loss. `metrics [12]`: in the order of `outputs.METRICS`. `coefficients`: of
    the loss before the division by its denominator, as small gradients would vanish in fp16.
    `factor []`: 1 / denominator; NaN if `cu_seqlens` or `normalizer` cannot be used."""

    value: Tensor
    metrics: Tensor
    coefficients: Coefficients
    factor: Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
