"""Losses of the GRPO family on packed tokens, from log-probs, logits, or hidden states."""

from .objective import PolicyLoss

__version__ = "0.1.0"

__all__ = ["PolicyLoss", "__version__"]
