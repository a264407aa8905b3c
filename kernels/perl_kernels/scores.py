"""How logits become the scores that the softmax is taken of, and what is kept of each row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


class RowStats(NamedTuple):
    """Per row, [n] each: `logprobs` of the target, `entropy` in nats, `shift`: the largest score,
    `log_sum`: log sum exp(score - shift). A row with a score that is not finite, or a target
    outside the columns, has log-prob NaN."""

    logprobs: Tensor
    entropy: Tensor
    shift: Tensor
    log_sum: Tensor

    def rows(self, part: slice | Tensor) -> RowStats:
        return RowStats(*(tensor[part] for tensor in self))

    def store(self, whole: RowStats, part: slice) -> None:
        for mine, theirs in zip(self, whole, strict=True):
            theirs[part] = mine
