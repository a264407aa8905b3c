"""Words that speak of particular images in ways that no rewriting follows: "the first one", "image II"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perl.permutation.references import NOUN, ORDINAL, Mention

_TENS = r"(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)"
_BEHIND = (
    r"(?:and|or|but|nor|than|to|from|with|vs\.?|versus|is|are|was|were|has|have|had|does|do|shows?|"
    r"contains?|depicts?|of\s{1,8}(?:the|these|them|all))\b"
)
_PATTERNS = (
    rf"\b{ORDINAL}(?:\s{{1,8}}ones?\b|(?=/))",
    rf"\bthe\s{{1,8}}{ORDINAL}\b(?=\s{{0,8}}(?:[^\w\s'\"(\[<]|\Z)|\s{{1,8}}{_BEHIND})",
    rf"\b{_TENS}[\s-]{{1,8}}{ORDINAL}\s{{1,8}}{NOUN}(?!\w)",
    rf"\b(?:pen)?ultimate\s{{1,8}}{NOUN}(?!\w)|\b(?:last|next|second)\s{{1,8}}(?:but|to)\s{{1,8}}(?:one|last)\b",
    r"\b(?:first|last)\s{1,8}(?:few|several|couple|pair)\b|\b(?:former|latter)\b",
    rf"\b(?:left|left-?most|right-?most|left-hand|right-hand|middle|previous|preceding)\s{{1,8}}{NOUN}(?!\w)",
    rf"\b{NOUN}(?:\s{{1,8}}|-)(?-i:I{{2,3}}|IV|VI{{0,3}}|IX|[b-h])(?!\w)",
    rf"\b{NOUN}\s{{0,8}}(?:[(\[]\s{{0,4}}[0-9]{{1,2}}\s{{0,4}}[)\]]|\n\s{{0,8}}[0-9]{{1,2}}(?![\w.):]))",
)
_ALL = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE | re.ASCII)


def unfollowed(text: str, found: Sequence[Mention]) -> list[str]:
    """The words of a text that name an image, or may, beside the mentions that are found in it.

    Example: `unfollowed("Is the first one like the left picture?", ())`.
    """
    taken = bytearray(len(text))
    for mention in found:
        taken[mention.start : mention.end] = b"\1" * (mention.end - mention.start)
    return [
        " ".join(match[0].split())
        for match in _ALL.finditer(text)
        if not any(taken[match.start() : match.end()])
    ]
