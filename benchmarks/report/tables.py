"""Tables of GitHub's Markdown, and figures as they stand in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"


def table(
    header: Sequence[str], lines: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> str:
    """Columns of one width; figures stand to the right.

    Args:
        words: the columns of words, which stand to the left.
    """
    columns = list(zip(header, *lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    left = [i in words for i in range(len(header))]
    rule = ["-" * n if left[i] else "-" * (n - 1) + ":" for i, n in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            text.ljust(n) if left[i] else text.rjust(n)
            for i, (text, n) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (header, rule, *lines)
    )


def plain(text: object) -> str:
    """Somebody's text as one line that is neither a column nor a tag."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def figure(value: float | None, digits: int = 3) -> str:
    """Rounded to so many significant digits, never with an exponent."""
    if value is None:
        return NONE
    if not value:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else figure(1e3 * seconds)


def mebibytes(count: int | None) -> str:
    if count is None:
        return NONE
    mib = count / 2**20
    return f"{mib:,.0f}" if mib >= 10 else figure(mib, 2)


def percent(share: float | None) -> str:
    return NONE if share is None else figure(100 * share, 2)


def times(ratio: float | None) -> str:
    """`1.3x`: two digits say all that a ratio of times does; `<0.01x` for less."""
    if ratio is None:
        return NONE
    return ("<0.01" if 0 < ratio < 0.01 else figure(ratio, 2)) + "x"


def scientific(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.0e}" if value else "0"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
