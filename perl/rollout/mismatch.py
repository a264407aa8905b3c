"""How far what samples is from what is trained, in log-probs of the tokens that were sampled."""

from __future__ import annotations

import torch

from perl.model.head import PolicyLoss
from perl.types import PackedBatch

MISMATCH = 0.1
"""A `rollout/mismatch_mean` above this is warned of. Rounding in bfloat16 gives some hundredths at most; weights or pictures
that are not the trainer's give several tenths and more (docs/rollouts.md)."""


class Mismatch:
    """How far the engine that sampled is from the policy as it was before a step's first update, in log-probs of its tokens.

    Tokens of earlier policies have no such policy here to be compared with, and are left out.

    Args:
        loss: whose correction has the bounds; without one they are those of `token_truncate`.
    """

    def __init__(self, loss: PolicyLoss, device: torch.device) -> None:
        self.loss = loss
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, policy: torch.Tensor) -> None:
        """Take in a micro-batch; `policy` [N] are the policy's log-probs of its targets before the first update."""
        if batch.sampled_logprobs is None or not batch.num_scored:
            return
        gaps = batch.sampled_logprobs.to(policy.device).double() - policy.double()
        weights = (-self._shared(gaps, batch)).exp()
        outside = (weights < self.loss.correction_low) | (weights > self.loss.correction_high)
        compared = torch.ones_like(outside)
        if batch.off_policy is not None:
            compared = ~batch.off_policy.to(policy.device)
        values = torch.stack([gaps, gaps.abs(), outside.double(), torch.ones_like(gaps)])
        values = torch.where(compared, values, 0.0)
        self._sums += values.sum(1)
        self._largest = torch.maximum(self._largest, values[1].max())

    def _shared(self, gaps: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What each token's weight is of: its own gap, or the sum over its completion."""
        if not (self.loss.correction or "").startswith("sequence"):
            return gaps
        lengths = batch.completion_cu_seqlens.diff()
        of = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(gaps.device)
        return gaps.new_zeros(len(lengths)).index_add(0, of, gaps)[of]

    def numbers(self) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
        """Of this process, sum and count of each mean over tokens, and maxima; none where nothing compares.

        `rollout_kl`, the k1 estimate of KL(engine || policy): the mean of log engine - log policy over what the engine sampled;
        `rollout/mismatch_mean` and, a maximum, `rollout/mismatch_max` of its absolute value; `rollout/outside`, the share of
        tokens whose importance weight is outside the bounds.
        """
        gap, apart, outside, count = self._sums.tolist()
        if not count:
            return {}, {}
        means = {
            "rollout_kl": (gap, int(count)),
            "rollout/mismatch_mean": (apart, int(count)),
            "rollout/outside": (outside, int(count)),
        }
        return means, {"rollout/mismatch_max": self._largest.item()}
