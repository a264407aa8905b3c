"""Arguments that are Python numbers."""

from __future__ import annotations

from torch import Tensor


def check_number(name: str, got: object, wanted: str) -> float:
    """`got`, if it is an int or a float.

    Raises:
        TypeError: it is something else, a bool included; the message says `wanted`.
    """
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{name} is a {type(got).__name__}, must be {wanted}")
    return got


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """As operators take it: one per row, or else one for all rows."""
    if isinstance(temperature, Tensor):
        return temperature.detach(), 1.0
    return None, float(temperature)
