"""What one reward function gives, through the Scorer as in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perl.rewards.scorer import Scorer


def totals(
    function: str | Callable[..., Any], texts: list[str], timeout: float = 60.0, **columns: Any
) -> tuple[Scorer, list[float]]:
    """The Scorer of one function, and what it gives for completions with these columns."""
    scorer = Scorer((function,), (1.0,), timeout)
    return scorer, scorer.score(["q"] * len(texts), texts, columns)[0].tolist()


def score(spec: str, text: str | list[str], **columns: Any) -> Any:
    """What one function gives for a completion, or for several with the same values of the columns."""
    texts = [text] if isinstance(text, str) else text
    values = totals(spec, texts, **{key: [value] * len(texts) for key, value in columns.items()})[1]
    return values[0] if isinstance(text, str) else values
