"""Options of a multiple-choice question that stand in columns of their own, written under the question."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from perl.data.pictures import SUFFIXES
from perl.data.questions.chats import Messages
from perl.data.questions.literals import read_literal
from perl.permutation import LETTERS, option_lines
from perl.rewards.reading import gold_text
from perl.types import IMAGE_SLOT, UserError, one_line

OPTIONS = ("options", "choices")
_COLUMNS = tuple(LETTERS[:10])
"""Columns that hold one option each, as MMBench's `A`, `B`, `C`, `D`."""
LABELLED = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]+\s*(\S.*)", re.DOTALL)
_NOUNS = "image|picture|photo|figure|panel|option"
_CLOSE = r"\s?(?:[).:\]]{1,3}|\s[-–—|])\s?"
_BETWEEN = r"[\s,;/|'\"`.*•()\[\]–—-]{0,9}"
_JOINED = rf"(?!\w){_BETWEEN}(?:\b(?:or|and)\b{_BETWEEN})?(?<!\w)"


@dataclass(frozen=True)
class Options:
    """The options of a row: option k has the letter `labels[k]` and says `texts[k]`."""

    columns: tuple[str, ...]
    """Those that hold them."""
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """What the data call them."""
    numeric: bool = False
    """Whether the data hold numbers and no texts, so that a number as the gold may be one of them."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(str(k) for k in range(1, len(self.texts) + 1))

    @property
    def lines(self) -> list[str]:
        return [f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True)]

    def __str__(self) -> str:
        return f"{', '.join(self.columns)} ({one_line(', '.join(self.lines), 120)})"


def read_options(row: Mapping[str, Any], where: str) -> Options | None:
    """The options in the column `options` or `choices`, or in `A`, `B`, ... of a row with our names; None without any.

    A list, an object of letter -> text, `{"label": [...], "text": [...]}`, or a text that holds one of these or
    lists them by letter.

    Raises:
        UserError: they are none of these, two are equal, or there are more than letters.
    """
    columns = tuple(key for key in OPTIONS if not _is_empty(row.get(key)))[:1]
    if columns:
        value = _parsed(row[columns[0]], f"{where}: the column {columns[0]}")
    else:
        value = {key: row[key] for key in _COLUMNS if not _is_empty(row.get(key))}
        columns = tuple(value)
        if not {"A", "B"} <= value.keys() or not all(map(_is_text, value.values())):
            return None
    named = ", ".join(columns)
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            value = dict(zip(labels, texts, strict=True))
        value = {str(key).strip(): held for key, held in value.items() if not _is_empty(held)}
    if not isinstance(value, Mapping | list | tuple):
        raise UserError(
            f"{where}: the column {named} holds {one_line(value, 80)}; write a list of options, or give a column of "
            "something else another name"
        )
    held = list(value.values() if isinstance(value, Mapping) else value)
    if wrong := [said for said in held if not _is_text(said)]:
        raise UserError(
            f"{where}: the column {named} has the option '{one_line(wrong[0], 60)}'; write a text, and {IMAGE_SLOT} for "
            "an image"
        )
    if not held:
        return None
    texts = [gold_text(said) if isinstance(said, float) else str(said).strip() for said in held]
    keys = tuple(value) if isinstance(value, Mapping) else ()
    own = [match for text in texts if (match := LABELLED.fullmatch(text))]
    if {match[1].upper() for match in own} == {*LETTERS[: len(texts)]} and len(own) == len(texts):
        keys, texts = tuple(match[1] for match in own), [match[2] for match in own]
    labels = tuple(key.upper() for key in keys)
    if not labels or not all(len(label) == 1 and label in LETTERS for label in labels):
        labels = tuple(LETTERS[: len(texts)])
    if len(labels) < len(texts):
        raise UserError(
            f"{where}: the column {named} has {len(texts)} options and there are {len(LETTERS)} letters; leave the row out"
        )
    numeric = all(isinstance(said, int | float) and not isinstance(said, bool) for said in held)
    options = Options(columns, labels, tuple(texts), keys, numeric)
    said = [" ".join(text.split()) for text in texts if IMAGE_SLOT not in text]
    twice = [one for each in (labels, said) for one in each if each.count(one) > 1]
    if twice:
        raise UserError(
            f"{where}: '{one_line(twice[0], 60)}' comes twice in {options}; correct it, or leave the row out"
        )
    return options


@dataclass(frozen=True)
class Listing:
    """A question that shows its options by `names`: letters, numbers, or their own texts."""

    options: Options
    names: tuple[str, ...]
    messages: Messages


def listed(messages: Messages, options: Options, images: int, where: str) -> Listing:
    """The question with its options: one line each (`A. a cat`) at the end of the last turn, unless the text lists them
    already, has an image with each letter that the options say, or shows all images where they are the options.

    Raises:
        UserError: the text gives them other letters.
    """
    text = " ".join("\n".join(message.content for message in messages).split())
    said = [re.escape(" ".join(option.split())) for option in options.texts]
    pictured = {*options.texts} == {IMAGE_SLOT}
    if options.texts == options.labels or (pictured and text.count(IMAGE_SLOT) == images):
        return Listing(options, options.labels, messages)
    if all(map(_carries, options.labels, options.texts, [text] * len(said))):
        return Listing(options, options.labels, messages)
    for names in (options.labels, options.numbers):
        if _are_named(text, names, said):
            return Listing(options, names, messages)
    joined = rf"(?<!\w){_JOINED.join(said)}(?!\w)"
    if len(said) > 1 and not pictured and re.search(joined, text, re.IGNORECASE):
        return Listing(options, options.texts, messages)
    others = {plain(line) for line in option_lines(text).values()}
    if others == {plain(option) for option in options.texts}:
        raise UserError(
            f"{where}: the question has other letters for its options than {options}; correct one of them"
        )
    *before, last = messages
    asked = "\n".join((last.content.rstrip(), *options.lines))
    return Listing(options, options.labels, (*before, replace(last, content=asked)))


def _carries(label: str, option: str, text: str) -> bool:
    """Whether a text has an image with this letter, and the option says no more than that: `image B`."""
    named = re.fullmatch(rf"(?:{_NOUNS})?\W*{label}\W*", option, re.IGNORECASE)
    return bool(named and re.search(rf"(?<!\w){label}[).:\]\s]*{IMAGE_SLOT}", text))


def _are_named(text: str, names: Sequence[str], said: Sequence[str]) -> bool:
    """Whether a text has each name before what it names."""
    patterns = (
        rf"(?<!\w)[(\[]?{name}{_CLOSE}{option}(?!\w)"
        for name, option in zip(names, said, strict=True)
    )
    return all(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def plain(text: str) -> str:
    """A text without what makes no other option of it."""
    return " ".join(text.split()).rstrip(".").casefold()


def _is_empty(value: Any) -> bool:
    return value is None or value != value or value in ("", [], {}, ())


def _is_text(value: Any) -> bool:
    """Whether it can be an option as it is."""
    if isinstance(value, str):
        return bool(value.strip()) and PurePath(value).suffix.lower() not in SUFFIXES
    return isinstance(value, int | float)


def _parsed(value: Any, what: str) -> Any:
    """An object, a list, or options by letter that a text holds; else the value as it is."""
    if not isinstance(value, str):
        return value
    lines = option_lines(value)
    if lines or not value.lstrip().startswith(("[", "{", "array(")):
        return lines or value
    try:
        return read_literal(value)
    except ValueError as error:
        raise UserError(f"{what} holds no list that can be read ({error}); correct it") from error
