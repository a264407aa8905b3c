"""One token of each row, drawn on the device; nothing waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perl.config import RolloutConfig


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 takes the most likely token; see `RolloutConfig` for the rest."""

    n: int
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RolloutConfig, n: int) -> SamplingParams:
        """As rollouts are sampled."""
        longest = config.max_new_tokens
        return cls(n, config.temperature, longest, config.top_p, config.top_k, config.stop)


def sample(
    logits: Tensor, banned: Tensor, params: SamplingParams, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their log-probs [B] at the temperature, whatever top-p and top-k leave out.

    Args:
        logits: [B, V].
        banned: bool [V], tokens that are never drawn.
    """
    # In fp32 at least: the log-probs are compared with the trainer's, and bf16 has three digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(banned, -torch.inf)
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1)
    else:
        logprobs = (logits / params.temperature).log_softmax(-1)
        likely = _likeliest(logprobs, params.top_p, params.top_k).exp()
        # The first of exponential clocks of these rates to ring; torch.multinomial waits for the device.
        noise = torch.empty_like(likely).exponential_(generator=generator)
        token = (likely / noise).argmax(-1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


def _likeliest(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probs [B, V] with -inf for what top-k, and of its rest top-p, leave out, by transformers' own rules."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    none: Any = None  # What came before, which neither looks at.
    if top_k:
        logprobs = TopKLogitsWarper(top_k)(none, logprobs)
    return TopPLogitsWarper(top_p)(none, logprobs) if top_p < 1 else logprobs
