"""Arguments that are Python numbers."""

from __future__ import annotations


def check_number(name: str, got: object, wanted: str) -> float:
    """`got`, if it is an int or a float.

    Raises:
        TypeError: it is something else, a bool included; the message says `wanted`.
    """
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{name} is a {type(got).__name__}, must be {wanted}")
    return got
