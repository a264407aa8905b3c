"""What one reward function gives, through the Scorer as in a run."""

from __future__ import annotations

from typing import Any

from perl.rewards.scorer import Scorer


def score(spec: str, text: str | list[str], **columns: Any) -> Any:
    """What one function gives for a completion, or for several with the same columns."""
    texts = [text] if isinstance(text, str) else text
    every = {key: [value] * len(texts) for key, value in columns.items()}
    values = Scorer((spec,), (1.0,)).score(["q"] * len(texts), texts, every)[0].tolist()
    return values[0] if isinstance(text, str) else values
