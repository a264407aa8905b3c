"""Where the answer of a completion, and of a row of data, stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Reader = Callable[[str], str | None]
"""The answer that a completion gives; None: it gives none."""

GOLD_COLUMNS = ("answer", "solution", "ground_truth", "target", "label")
"""Columns that data hold their answers in, the most telling one first."""

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # An escaped brace is a character, not a bracket.
_CUE = re.compile(r"answer\s{0,4}(?:(?:is|should be)\b|[=:])\s{0,4}:?[*\s]{0,4}", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None without one or if it never closes.

    Example: `extract_answer(r"... \boxed{ \frac{1}{2} }") == r"\frac{1}{2}"`.
    """
    span = _box_span(text)
    return None if span is None else text[span].strip()


def tagged(text: str, tag: str = "answer") -> str | None:
    r"""What the last `<tag>...</tag>` holds, or a box in it; None without one or if it never closes.

    Example: `tagged(r"<answer> \boxed{B} </answer>") == "B"`.
    """
    span = _tag_span(text, tag)
    if span is None:
        return None
    boxed = extract_answer(text[span])
    return text[span].strip() if boxed is None else boxed


def marked(text: str) -> str | None:
    """What the last `<answer>` block holds, else the last box; None without either."""
    block = tagged(text)
    return extract_answer(text) if block is None else block


def final_answer(text: str) -> str:
    """The part of a completion that answers: the last `<answer>` block, else the last boxed answer,
    else what follows `</think>`, else the whole text."""
    answer = marked(text)
    return text.rpartition("</think>")[2].strip() if answer is None else answer


def stated_answer(text: str) -> str:
    """`final_answer`, and where there is no mark what the text says that its answer is, if it says so."""
    answer = final_answer(text)
    return said(answer) if marked(text) is None and _CUE.search(answer) else answer


def said(text: str) -> str:
    """What a text gives as its answer: what follows its last "answer is" or "Answer:", else its last line."""
    cued = [match.end() for match in _CUE.finditer(text)]
    answer = text[cued[-1] :].partition("\n")[0] if cued else text.strip().rpartition("\n")[2]
    answer = re.split(r"\.\s", answer.strip(" *") + " ")[0].strip(" *")
    return answer[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", answer) else answer


def gold_text(value: Any) -> str:
    """The answer in a column of the data: of a text that says more, what its last `<answer>` block or box holds, or what
    stands behind `</think>`, there behind an "answer is" that ends it; empty: there is none."""
    if isinstance(value, Mapping):  # verl's reward_model
        value = value.get("ground_truth")
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # A column of whole numbers with gaps is read as floats.
    text = "" if value is None or value != value else str(value).strip()
    whole, stated = final_answer(text), stated_answer(text)
    return stated if stated and whole.rstrip(" .*").endswith(stated) else whole


def with_answer(text: str, old: str, new: str) -> str:
    """A text that gives the answer `old`, giving `new` instead: in its last `<answer>` block and in its last box, or else as
    a whole. What stands around it stays; a text that gives it nowhere becomes `new`."""
    spans = [
        span for span in (_tag_span(text), _box_span(text)) if span and text[span].strip() == old
    ]
    if not spans:
        return text.replace(old, new) if text.strip() == old else new
    for span in sorted(spans, key=lambda span: -span.start):
        text = text[: span.start] + text[span].replace(old, new) + text[span.stop :]
    return text


def _tag_span(text: str, tag: str = "answer") -> slice | None:
    start = text.rfind(f"<{tag}>") + len(tag) + 2
    end = text.find(f"</{tag}>", start)
    return slice(start, end) if start > len(tag) + 1 and end >= 0 else None


def _box_span(text: str) -> slice | None:
    *_, last = None, *_BOXED.finditer(text)
    if last is None:
        return None
    depth = 1
    for mark in _BRACE.finditer(text, last.end()):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return slice(last.end(), mark.start())
    return None
