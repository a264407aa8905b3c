"""The gold answer of a row: off its column or the response that the data give, by letter where it has options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from perl.data.questions.options import LABELLED, Listing, Options, plain
from perl.permutation import CARDINALS, AnswerForm, only_options
from perl.rewards.reading import canonical, equal, gold_text, letters_in
from perl.types import UserError, one_line

_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]*")
_INDEX = re.compile(r"[0-9]{1,2}")
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+")
_IMAGES = re.compile(r"\b(?:images?|pictures?|photos?|figures?|frames?|panels?)\b", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*(?:[,;]|\band\b)\s*")
_PLAIN = re.compile(
    r"(?P<letter>[a-z])|(?P<word>[^\W\d_]{2,})|(?P<number>-?[0-9]+(?:/[0-9]+)?)|"
    r"(?P<list>(?:[a-z]|[0-9]+)(?:,(?:[a-z]|[0-9]+))+)"
)
"""Answers, normalised, of which two are equal or not whatever reward compares them."""


def gold_by_options(raw: Any, listing: Listing, first: int | None, where: str) -> str:
    """What names the gold in a question, which the data may give by letter, text or index, or each of a list of them.

    Args:
        raw: as the data hold it.
        first: the index of the first option; None: it is not known.

    Raises:
        UserError: it is no option, or it cannot be told which.
    """
    text, number = _gold(raw)
    if not text:
        return ""
    options = listing.options
    first = 1 if listing.names == options.numbers else first
    found = _readings(options, text, number, first)
    if len(found) == 1:
        return listing.names[found.pop()]
    said = f"{where}: the answer '{one_line(text, 60)}'"
    if found:
        letters = " or ".join(options.labels[k] for k in sorted(found))
        raise UserError(
            f"{said} may be {letters} in {options}: by its letter, by its text, or counted from 0 or from 1; write the letter"
        )
    each = [_readings(options, part, False, first) for part in _SEPARATOR.split(text)]
    if len(each) > 1 and all(len(one) == 1 for one in each):
        return ", ".join(listing.names[one.pop()] for one in each)
    # In a sentence: "The answer is B".
    letters = letters_in(text, whole=True) or ""
    if letters and set(letters) <= set(options.labels) and not LABELLED.fullmatch(text):
        return ", ".join(listing.names[options.labels.index(letter)] for letter in letters)
    raise UserError(f"{said} is none in {options}; correct it, or leave the row out")


def gold_by_text(gold: str, text: str, said: str) -> str:
    """The gold, and where it names images as just one of the options does that the text lists by letter, that letter.

    `said` is what the row's own response gives: one that says what the gold does shows that this is to be answered.
    """
    if not _IMAGES.search(gold) or (said and equal(said, gold, "set")):
        return gold
    found = [letter for letter, words in only_options(text).items() if equal(words, gold, "set")]
    return found[0] if len(found) == 1 else gold


def first_index(golds: Iterable[tuple[Options, Any]]) -> int | None:
    """What the first option counts as in a data set, by options and golds of some rows: 0 where a gold is 0, 1 where one is
    the number of its options; None: nothing tells."""
    for options, raw in golds:
        text, number = _gold(raw)
        if not _INDEX.fullmatch(text):
            return None
        by_index = _indices(options, text, number)
        if len(by_index) == 1 and not _named(options, text):
            return next(iter(by_index))
    return None


def check_response(
    response: str, gold: str, form: AnswerForm | None, listing: Listing | None, where: str
) -> None:
    """Raise UserError if a response answers otherwise than the gold: with another letter, word, number or option, or another
    list of letters or numbers, in tags, in a box or alone. Longer texts, spans and boxes are not compared; lists are sets
    unless `form` says more."""
    form = form or "set"
    said = own = gold_text(response)
    if listing and len(found := _named(listing.options, own)) == 1:
        own = listing.names[found.pop()]
    if not gold or equal(own, gold, form):
        return
    one, other = (_PLAIN.fullmatch(canonical(text, form)) for text in (own, gold))
    if one and other and one.lastgroup == other.lastgroup and one[0] != other[0]:
        raise UserError(
            f"{where}: its response answers '{one_line(said, 60)}', and its answer is '{one_line(gold, 60)}'; correct one of "
            "them, or leave the row out"
        )


def _named(options: Options, gold: str) -> set[int]:
    """The options, from 0, that a gold names by letter, key or text."""
    texts, labels = options.texts, options.labels
    found = set[int]()
    for same in (str, plain, _value):
        found = found or {k for k, text in enumerate(texts) if same(text) == same(gold)}
    if gold in options.keys:
        found.add(options.keys.index(gold))
    letter, both = _LETTER.fullmatch(gold), LABELLED.fullmatch(gold)
    if letter and letter[1].upper() in labels:
        found.add(labels.index(letter[1].upper()))
    if not found and both and both[1].upper() in labels:
        k = labels.index(both[1].upper())
        found = {k} if plain(both[2]) == plain(texts[k]) else found
    return found


def _indices(options: Options, gold: str, number: bool, first: int | None = None) -> dict[int, int]:
    """The options that a gold may be as an index, by what the first would then count as: 0 or 1.

    `number`: the data hold the gold as a number. A text among options that are numbers is a value and no index, unless the
    data are known, by `first`, to hold indices.
    """
    if not _INDEX.fullmatch(gold) or gold in options.keys:
        return {}
    values = all(isinstance(_value(text), float) for text in options.texts)
    valued = first is None and (options.numeric or not number)
    if valued and (values or _named(options, gold)):
        return {}
    count = len(options.texts)
    return {first: int(gold) - first for first in (0, 1) if 0 <= int(gold) - first < count}


def _readings(options: Options, gold: str, number: bool, first: int | None) -> set[int]:
    """The options that a gold may be; `first` is what the first counts as, None: 0 or 1."""
    by_index = _indices(options, gold, number, first)
    found = {k for base, k in by_index.items() if first in (None, base)}
    if by_index:
        said = re.compile(rf"(?<![\w.]){gold}(?![\w.])")
        found |= {k for k, text in enumerate(options.texts) if said.search(text)}
    return found | _named(options, gold)


def _gold(raw: Any) -> tuple[str, bool]:
    """The gold in a column as a text, and whether it is a number there."""
    value = raw.get("ground_truth") if isinstance(raw, Mapping) else raw
    return gold_text(value), isinstance(value, int | float) and not isinstance(value, bool)


def _value(text: str) -> float | str:
    """A number, in digits or as a word, else the text."""
    if text.casefold() in CARDINALS:
        return CARDINALS.index(text.casefold()) + 1.0
    return float(text) if _NUMBER.fullmatch(text) else text
