"""The form of an answer, read off how it is written: a letter, a number, a list or an interval, or a text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from perl.permutation import ORDINALS, AnswerForm
from perl.rewards.reading.notation import LONGEST, number_in, tidy, without_unit

_NESTED = 2
_NOUN = re.compile(
    r"(?:the )?(?:image|picture|photo|figure|panel|option|choice)s?(?:[ #:-]{1,3}(?=\(?(?:[a-z]|[0-9]+)\)?\Z)|(?=[0-9]+\Z))",
    re.IGNORECASE | re.ASCII,
)
_ORDINAL = re.compile(
    rf"(?:the )?(?:({'|'.join(ORDINALS)})|([0-9]{{1,2}})(?:st|nd|rd|th)) (?:image|picture|photo|figure|panel)",
    re.IGNORECASE | re.ASCII,
)
GLUED = re.compile(r"[A-Z]{2,26}")
_LETTER = re.compile(r"\(?([A-Za-z])[):]?")
_LABEL = re.compile(
    r"(?:(?:option|choice) )?(?:\(?(?-i:([A-Z]))(?:[).:]+ | [-–—] (?=[a-z]{2}))|\((?-i:([A-Z]))\) ?)(?!(?:or|and|nor|is)\b)(\S.*)",
    re.DOTALL | re.IGNORECASE | re.ASCII,
)
_COUNTED = re.compile(r"[-+]?[0-9][0-9.,/ ]* ([a-z]{2}[a-z ]*)", re.IGNORECASE | re.ASCII)
"""Words behind a number that are no known unit, as in `5 apples`."""
_OPEN, _CLOSE = "([{", ")]}"
_BREAKS = re.compile(r"[(\[{)\]},;&<>→∪]| and\b ?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and its form. `text` is as it was written."""

    form: Literal["letter", "number", "list", "text"]
    text: str
    letter: str = ""
    label: str = ""
    """What stands behind a letter, as in `B. a dog`."""
    number: Fraction = Fraction(0)
    is_decimal: bool = False
    is_ordinal: bool = False
    """An image by its place, as "the second image"."""
    unit: str = ""
    items: tuple[Answer, ...] = field(default=())
    kind: Literal["", "set", "sequence", "interval"] = ""
    """What the notation of a list says that it is."""
    mark: str = ""
    """The brackets of a set and of a pair of numbers, which may be an interval or a point; `<` or `>` of a ranking; `∪` of a
    union."""


def read(answer: str, form: AnswerForm | None = None, nested: int = _NESTED) -> Answer:
    """The form of an answer; one that is known to be a list is split at every comma and sign."""
    text = tidy(answer)
    as_text = Answer("text", _unwrapped(answer.strip()).replace("∞", r"\infty "))
    if len(text) > LONGEST or "\\begin" in text:
        return as_text
    known = form is not None and nested == _NESTED
    if known and GLUED.fullmatch(text):
        text = ",".join(text)
    number = None if known else _number(text, answer)
    return (
        number or (nested and _list(text, answer, form, nested)) or _single(text, answer) or as_text
    )


def _single(text: str, answer: str) -> Answer | None:
    text = _unwrapped(text)
    if place := _ORDINAL.fullmatch(text):
        count = int(place[2]) if place[2] else ORDINALS.index(place[1].lower()) + 1
        return Answer("number", answer, number=Fraction(count), is_ordinal=True)
    named = _NOUN.match(text)
    text = text[named.end() :] if named else text
    if letter := _LETTER.fullmatch(text):
        return Answer("letter", answer, letter=letter[1].lower())
    if number := _number(text, answer):
        return number
    if label := _LABEL.fullmatch(text):
        return Answer("letter", answer, letter=(label[1] or label[2]).lower(), label=label[3])
    rest, unit = without_unit(text)
    if counted := _COUNTED.fullmatch(text):
        return Answer("text", answer, unit=counted[1].casefold())
    return Answer("text", rest, unit=unit) if unit or named else None


def _number(text: str, answer: str) -> Answer | None:
    found = number_in(text)
    return found and Answer("number", answer, number=found[0], is_decimal=found[1], unit=found[2])


def _list(text: str, answer: str, form: AnswerForm | None, nested: int) -> Answer | None:
    brackets = text[0] + text[-1] if _encloses(text) else ""
    inner = text[1:-1] if brackets else text
    parts, signs = _parts(inner, form is not None)
    if len(parts) < 2:
        if not brackets and parts and parts[0] != text and not signs:
            return read(parts[0], form, nested)
        return (
            _list(parts[0], answer, form, nested - 1) if parts and nested > 1 and brackets else None
        )
    found = tuple(read(part, None, nested - 1) for part in parts)
    kinds = {item.form for item in found}
    mark, kind = "", ""
    if signs & set("<>→"):
        if form is None and not (kinds in ({"number"}, {"letter"}) and len(signs) == 1):
            return None  # A relation, as x > 3.
        mark, kind = "".join(signs & set("<>")), "sequence"
    elif "∪" in signs:
        mark, kind = "∪", "set"
    elif brackets == "{}":
        mark, kind = brackets, "set"
    elif brackets in ("(]", "[)"):
        mark, kind = brackets, "interval"
    elif brackets and any(_is_quantity(item) for item in found):
        mark, kind = brackets if len(found) == 2 else "", "sequence"
    return Answer("list", answer, items=found, kind=kind, mark=mark)  # type: ignore[arg-type]


def _is_quantity(item: Answer) -> bool:
    """Whether an item of brackets makes them a point, a vector or an interval, as letters and words do not."""
    return (
        item.form == "number"
        or bool(re.search(r"[0-9\\∞]", item.text))
        or (item.text.strip().islower() and item.form == "letter")
    )


def _parts(text: str, ranked: bool) -> tuple[list[str], set[str]]:
    """What stands between the separators that are in no brackets, and those but commas."""
    parts, signs, depth, start = [], set(), 0, 0
    for match in _BREAKS.finditer(text):
        sign = match[0]
        if sign in _OPEN:
            depth += 1
        elif sign in _CLOSE:
            depth = max(0, depth - 1)
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
            signs |= {sign} & set("<>→∪")
    parts = [part.strip() for part in (*parts, text[start:])]
    return [part for part in parts if part], signs


def _unwrapped(text: str) -> str:
    """Without brackets around it, and without a period that ends what stands in them."""
    while len(text) > 2 and text[0] + text[-1] in ("()", "[]", "{}") and _encloses(text):
        text = text[1:-1].strip().rstrip(".").strip()
    return text


def _encloses(text: str) -> bool:
    """Whether the bracket that a text begins with is closed by its last character."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return False
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return place == len(text) - 1
    return False
