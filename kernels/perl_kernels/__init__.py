"""Losses of the GRPO family on packed tokens, from log-probs, logits, or hidden states."""

from .advantage import GroupedRewards, group_advantages
from .losses import grpo_loss, linear_grpo_loss, linear_token_logprobs, policy_loss, token_logprobs
from .objective import PolicyLoss
from .selection import top_entropy_weights
from .values import GroupAdvantages, LossOutput, TokenLogprobs

__version__ = "0.1.0"

__all__ = [
    "GroupAdvantages",
    "GroupedRewards",
    "LossOutput",
    "PolicyLoss",
    "TokenLogprobs",
    "__version__",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
    "top_entropy_weights",
]
