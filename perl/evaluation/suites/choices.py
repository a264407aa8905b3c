"""Multiple choice: which option a text chooses, and whether the options are the images themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perl.permutation.permute import LETTERS

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_IMAGE = re.compile(
    rf"(?:the\s+)?(?:({'|'.join(_ORDINALS)})\s+(?:image|picture|photo)|(?:image|picture)\s*([0-9]{{1,2}}))\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s*[(\[]?([A-Z])[)\].:]\s*")


def without_label(option: str) -> str:
    """An option's text without a leading letter: `"(A) the first image"` gives `"the first image"`."""
    return _LABEL.sub("", option, count=1).strip() if _LABEL.match(option) else option.strip()


def labelled(options: Sequence[str]) -> str:
    """One line `(A) text` for each option."""
    return "\n".join(f"({letter}) {o}" for letter, o in zip(LETTERS, options, strict=False))


def image_kind(question: str, options: Sequence[str], count: int) -> tuple[str, bool]:
    """`kind` and `should_change` of a question over `count` images.

    The images may move where every option names one of them, in their sequence, those are the last of all, and
    the question (without its options) mentions none of them: then the right letter follows its image. Everything else keeps
    its order.

    Example: `image_kind("Which is real?", ["the first image", "the second image"], 2) == ("all", True)`.
    """
    named = [_slot(without_label(option)) for option in options]
    first = count - len(options)
    if len(options) < 2 or first < 0 or named != list(range(first, count)):
        return "none", False
    if any(slot >= first for slot in _mentioned(question)):
        return "none", False
    return ("all" if first == 0 else f"last:{len(options)}"), True


def option_letter(text: str, count: int, options: Sequence[str] = ()) -> str | None:
    """The letter that a text chooses among `count` options; None if it chooses none or several.

    In this order: a letter alone; the last "answer is X" or "Answer: X"; the only `(X)` of the last of several
    paragraphs; a letter that opens the text (`B. because`); the only `(X)` of the whole; the only option whose text occurs.
    """
    one = f"[{LETTERS[:count]}]"
    text = text.strip()
    if alone := re.fullmatch(rf"[\W_]*({one}|{one.lower()})[\W_]*", text):
        return alone[1].upper()
    cue = rf"(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?[\s*]*[(\[{{]?\s*({one})(?![A-Za-z'])"
    if cued := re.findall(cue, text):
        return cued[-1]
    bracketed = [set(re.findall(rf"\(({one})\)", part)) for part in (text.split("\n\n")[-1], text)]
    if "\n\n" in text and len(bracketed[0]) == 1:
        return bracketed[0].pop()
    if opening := re.match(rf"[(\[]?({one})[)\].:](?:\s|$)(?!\s*(?:or|and)\b)", text):
        return opening[1]
    if len(bracketed[1]) == 1:
        return bracketed[1].pop()
    return _by_text(text, [without_label(option) for option in options])


def _by_text(text: str, options: Sequence[str]) -> str | None:
    low = text.casefold()
    for fits in (
        lambda option: option.casefold() == low.rstrip("."),
        lambda option: re.search(rf"(?<!\w){re.escape(option.casefold())}(?!\w)", low),
    ):
        found = [i for i, option in enumerate(options) if option and fits(option)]
        if len(found) == 1:
            return LETTERS[found[0]]
    return None


def _slot(option: str) -> int | None:
    match = _IMAGE.fullmatch(option.rstrip(".").strip())
    return _number(match) if match else None


def _mentioned(text: str) -> list[int]:
    return [_number(match) for match in _IMAGE.finditer(text)]


def _number(match: re.Match[str]) -> int:
    return _ORDINALS.index(match[1].lower()) if match[1] else int(match[2]) - 1
