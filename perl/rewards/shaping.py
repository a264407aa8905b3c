"""How an answer is written, whatever it says: its length and its repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perl.types import UserError

_UNITS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
}


def length_penalty(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    longest: int,
    buffer: int,
    unit: str = "tokens",
    **columns: Any,
) -> list[float]:
    """0 up to a length of `longest - buffer`, falling linearly to -1 at `longest`, -1 beyond.

    The soft overlong punishment of DAPO, arXiv 2503.14476, equation 13. `unit` is tokens (of the
    column `completion_length`), words or characters.
    """
    if not 0 < buffer <= longest:
        raise UserError(
            f"reward length_penalty: buffer = {buffer} must be above 0 and at most longest = {longest}"
        )
    if unit in _UNITS:
        lengths = [_UNITS[unit](text) for text in completions]
    elif unit != "tokens":
        raise UserError(
            f"reward length_penalty: unit = '{unit}'; choose tokens, {', '.join(_UNITS)}"
        )
    elif "completion_length" in columns:
        lengths = columns["completion_length"]
    else:
        raise UserError(
            "reward length_penalty: there is no column completion_length; set unit to words or characters"
        )
    return [-min(1.0, max(0.0, (length - (longest - buffer)) / buffer)) for length in lengths]


def repetition(
    prompts: Sequence[Any], completions: Sequence[str], *, n: int = 3, **columns: Any
) -> list[float]:
    """The share of a completion's word n-grams that occurred in it before, 0 to 1.

    As in Perception-R1, arXiv 2506.07218, and "Demystifying Long Chain-of-Thought Reasoning",
    arXiv 2502.03373: give it a negative weight. Fewer than `n` words repeat nothing.
    """
    if n < 1:
        raise UserError(f"reward repetition: n = {n} must be 1 or more")
    shares = []
    for text in completions:
        words = text.casefold().split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return shares
