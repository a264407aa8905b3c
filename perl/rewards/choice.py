"""Multiple choice: the letter that a completion settles on, however it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from perl.rewards.answers import extract_answer, score_each, tagged

_LEADING = re.compile(r"[(\[]?\s?([A-Za-z])\s?(?:[)\].:,]|$)")
_BARE = re.compile(r"[(\[]?\s?([A-Za-z])\s?[)\]]?\.?")
_NAMED = re.compile(
    r"\b(?i:option|choice|answer)(?i:\s+is)?\s{0,3}:?\s{0,3}[(\[*]{0,3}([A-Z])(?![A-Za-z'])"
)
_BRACKETED = re.compile(r"[(\[]\s?([A-Z])\s?[)\]]")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])(?!(?<=[AI]) (?!and\b|or\b)[a-z])")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]\.){1,4}[A-Za-z]\b\.?")
"""As in `e.g. B`, whose e is no choice."""
_NAMED_LOWER = re.compile(
    r"(?:option|choice|answer)(?:\s+is)?\s{0,3}:?\s{0,3}\(?([a-z])\)?\.?", re.I
)


def choice(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    unordered: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the chosen letter is the gold one, else 0; None without gold, or where it is no letter.

    SEED-Bench-R1, arXiv 2503.24376. The letter is looked for in the last `<answer>` block, else in
    the last boxed answer, as in `B`, `(b)`, `B. a dog`, `option B`, or else the first capital that
    stands alone; without a block or box only `option B`, `answer: B`, `(B)` or a bare letter count.
    With `unordered` all letters count, as a set: `C and A` equals `A, C`.
    """
    golds = [None if gold is None else _gold(gold, unordered) for gold in answer]
    return score_each(
        lambda text, gold: float(chosen_letter(text, unordered) == gold), completions, golds
    )


def chosen_letter(text: str, unordered: bool = False) -> str | None:
    """The letter that a completion chooses as `choice` reads it, with `unordered` a list of them; None if none."""
    for marked in (tagged(text), extract_answer(text)):
        if marked is not None:
            return _letters(marked) if unordered else _letter(marked)
    rest = _ABBREVIATION.sub(" ", text.rpartition("</think>")[2]).strip()
    if match := _BARE.fullmatch(rest):
        return match[1].upper()
    if unordered:
        return None
    found = _NAMED.findall(rest) or _BRACKETED.findall(rest)
    return found[-1] if found else None


def _gold(gold: str, unordered: bool) -> str | None:
    text = tagged(gold) or extract_answer(gold) or gold
    return (_letters(text) if unordered else _letter(text)) or None


def _letter(text: str) -> str | None:
    text = _ABBREVIATION.sub(" ", text).strip()
    if match := _LEADING.match(text) or _NAMED_LOWER.fullmatch(text):
        return match[1].upper()
    for pattern in (_NAMED, _BRACKETED, _ALONE):
        if match := pattern.search(text):
            return match[1]
    return None


def _letters(text: str) -> str | None:
    """Every letter named, sorted; `AC` and `A, c` alike name two."""
    text = _ABBREVIATION.sub(" ", text).strip()
    if re.fullmatch(r"[A-Z]{1,26}", text):
        found = list(text)
    else:
        found = _ALONE.findall(text) or re.findall(r"(?<![A-Za-z'])([a-z])(?![A-Za-z'])", text)
    return "".join(sorted({letter.upper() for letter in found})) or None
