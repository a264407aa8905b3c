"""Reads the final answer out of a completion, compares it with the gold one, and scores the form.

The two built-in reward functions, `accuracy` and `format_reward`, follow TRL's convention:
`f(prompts, completions, **columns) -> list of float or None`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_BOXED = re.compile(r"\\boxed\s*\{")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:/[0-9]+)?")
_NOUN = re.compile(r"^(?:image|option)(?: (?=(?:[a-z]|[0-9]+)$)|(?=[0-9]+$))")
_LONGEST_NUMBER = 64


def accuracy(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """1 where the last boxed answer is the gold one (see `same_answer`), else 0; None without gold."""
    return [
        None if gold is None else float(same_answer(extract_answer(text), gold))
        for text, gold in zip(completions, answer, strict=True)
    ]


def format_reward(
    prompts: Sequence[Any], completions: Sequence[str], **columns: Any
) -> list[float]:
    r"""1 where the whole text matches `<think>.*</think>.*\\boxed\{.*\}.*`, else 0."""
    return [float(_well_formed(text)) for text in completions]


def extract_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None without one or if it never closes.

    Example: `extract_answer(r"... \boxed{ \frac{1}{2} }") == r"\frac{1}{2}"`.
    """
    last = None
    for last in _BOXED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    depth = 1
    i = last.end()
    while i < len(text):
        if text[i] == "\\":
            i += 1  # An escaped brace is a character, not a bracket.
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[last.end() : i].strip()
        i += 1
    return None


def same_answer(given: str | None, gold: str) -> bool:
    r"""Whether two answers are equal as numbers or after normalising.

    Case, spaces, `$`, `\text{}`, a trailing period, brackets around a name and the words "image"
    and "option" before it make no difference: `(b).` equals `B`, `Image 2` equals `2`, `0.50`
    equals `1/2`; lists are compared in sequence.
    """
    return given is not None and normalise(given) == normalise(extract_answer(gold) or gold)


def normalise(answer: str) -> str:
    """An answer in the form in which `same_answer` compares it."""
    text = _WRAPPED.sub(r"\1", answer).replace("$", "").replace("\u2212", "-")
    text = _unwrap(_FRACTION.sub(r"\1/\2", text))
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return ",".join(_normalise_item(item) for item in re.split(r"[,;]", text))


def _well_formed(text: str) -> bool:
    # Searching for the leftmost marks is equivalent to the expression, and linear where
    # backtracking over a looping model's thousand "</think>" is cubic.
    if not text.startswith("<think>"):
        return False
    position = len("<think>")
    for mark in ("</think>", "\\boxed{", "}"):
        found = text.find(mark, position)
        if found < 0:
            return False
        position = found + len(mark)
    return True


def _normalise_item(item: str) -> str:
    text = _NOUN.sub("", " ".join(_unwrap(item).split()).casefold())
    text = _unwrap(text)
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return text
    top, _, bottom = text.partition("/")
    return text if bottom and int(bottom) == 0 else str(Fraction(top) / int(bottom or 1))


def _unwrap(text: str) -> str:
    """Without a trailing period and one pair of brackets around the whole."""
    text = text.strip().rstrip(".").strip()
    if (
        len(text) > 2
        and text[0] + text[-1] in ("()", "[]")
        and not re.search(r"[()\[\]]", text[1:-1])
    ):
        return text[1:-1].strip()
    return text
