"""What reward functions return: numbers, dicts of named parts, lists of them, and what is none of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl.rewards.calls import Fault, failed
from perl.types import one_line

_SCORES = ("score", "overall")
"""What the number that counts is called in a dict: verl's name and EasyR1's."""


def number_in(value: Any) -> float | Fault:
    """NaN where the function says that there is no score."""
    if value is None:
        return math.nan
    if isinstance(value, Fault):
        return value
    if isinstance(value, BaseException):
        return failed(value)
    if (key := _score_key(value)) is not None:
        return number_in(value[key])
    number = _as_float(value)
    if math.isfinite(number):
        return number
    return Fault(
        f"returned {one_line(repr(value))} for",
        'return a finite number, a dict with a "score", or None if it cannot be scored',
    )


def named_parts(name: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """`name/part` -> float64 [R] of the numbers that dicts hold beside the score; NaN where one holds none."""
    dicts: list[dict[Any, Any]] = [
        {part: own for part, own in value.items() if part != _score_key(value)}
        if isinstance(value, Mapping)
        else {}
        for value in values
    ]
    found = {
        f"{name}/{part}": np.array([_as_float(own.get(part)) for own in dicts])
        for part in dict.fromkeys(part for own in dicts for part in own)
    }
    return {part: numbers for part, numbers in found.items() if not np.isnan(numbers).all()}


def listed(values: Any) -> list[Any] | None:
    """The values of a sequence, or of an array or tensor of one axis; None for anything else."""
    if isinstance(values, Sequence):
        return None if isinstance(values, (str, bytes, bytearray)) else list(values)
    return list(values) if getattr(values, "ndim", None) == 1 else None


def only_value(outcome: Any) -> Any:
    if isinstance(outcome, Fault):
        return outcome
    values = listed(outcome)
    if values is None or len(values) != 1:
        return Fault(f"returned {one_line(repr(outcome))} alone for", "return a list of one value")
    return values[0]


def _score_key(value: Any) -> str | None:
    """The name of the number that counts in a dict; None: there is none, or it is no dict."""
    if not isinstance(value, Mapping):
        return None
    return next((key for key in _SCORES if key in value), None)


def _as_float(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return math.nan if value is None or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
