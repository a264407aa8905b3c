"""The options of a multiple-choice question, and which images each of them speaks of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from perl.permutation.references import LETTERS, NOUN, Mention
from perl.types import IMAGE_SLOT

Meaning = tuple["str | tuple[int, ...]", ...]
"""What an option says: its words in lower case, and for each list of images their sorted slots."""

_MARK = re.compile(
    r"(?:(?P<line>^[ \t>*_#-]{0,8})|(?<=\s))(?:(?:option|choice)[ \t]{1,4})?(?P<open>[(\[]?)"
    r"(?P<letter>[A-Za-z])(?:(?P<close>[).:\]]{1,3})[*_]{0,2}\s{0,8}|(?P<dash>[ \t]{1,4}(?:[|–—-][ \t]{1,4})?))(?=\S)",
    re.IGNORECASE | re.MULTILINE | re.ASCII,
)
_LONGEST = 500  # Characters of a last option without a line's end.
_WORD = re.compile(r"[^\W_]")
_JOINING = re.compile(r"\b(?:and|or)\b", re.IGNORECASE | re.ASCII)
_TOKEN = re.compile(r"[^\W_]+|[<>=≠→]")
_EMPTY_WORD = re.compile(rf"(?:the|number|no|{NOUN})\Z", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """One option: `text[start:end]` is what it says, without its letter."""

    letter: str
    start: int
    end: int
    text: str


def find_options(text: str) -> list[list[Line]]:
    """All runs of options in a text, each A, B, ... in one style, and each option with words of its own."""
    runs: list[list[re.Match[str]]] = []
    last: dict[tuple[str, ...], list[re.Match[str]]] = {}
    for mark in _MARK.finditer(text):
        style = _style(mark)
        if style is None:
            continue
        letter, run = mark["letter"].upper(), last.get(style)
        if letter == "A":
            last[style] = [mark]
            runs.append(last[style])
        elif run and len(run) < len(LETTERS) and letter == LETTERS[len(run)]:
            run.append(mark)
    found = [_lines(text, run) for run in runs if len(run) > 1]
    return [lines for lines in found if all(_says(line.text) for line in lines)]


def longest(runs: Sequence[list[Line]]) -> list[Line]:
    """The longest run, of equal ones the last; empty if there is none."""
    return max(reversed(runs), key=len, default=[])


def option_lines(text: str) -> dict[str, str]:
    """The options of a multiple-choice question, by letter; empty if there are no two of them.

    Options run `A.`, `B)`, `(C)`, ... unbroken from A, on lines of their own or in one line. The
    longest run counts, options in words before options that are images.
    """
    runs = find_options(text)
    return {line.letter: line.text for line in longest(in_words(runs) or runs)}


def in_words(runs: Sequence[list[Line]]) -> list[list[Line]]:
    """The runs of which no option holds an image."""
    return [run for run in runs if not any(IMAGE_SLOT in line.text for line in run)]


def meaning(text: str, found: Sequence[Mention]) -> Meaning:
    """What a text says, whatever names it gives the images. Lists of images ("1 and 2") have no sequence."""
    out: list[str | tuple[int, ...]] = []
    position = 0
    for (start, end), group in groupby(found, key=lambda m: (m.start, m.end)):
        words, slots = _words(text[position:start]), {m.slot for m in group}
        if out and not isinstance(out[-1], str) and words in ([], ["and"]):
            slots |= set(out[-1])
            out.pop()
        else:
            out += words
        out.append(tuple(sorted(slots)))
        position = end
    return (*out, *_words(text[position:]))


def moved(said: Meaning, slots: Sequence[int]) -> Meaning:
    """The same about the same images, each of slot s now in `slots[s]`."""
    return tuple(x if isinstance(x, str) else tuple(sorted(slots[s] for s in x)) for x in said)


def images_in(said: Meaning) -> set[int]:
    """The slots that are spoken of."""
    return {slot for x in said if not isinstance(x, str) for slot in x}


def described(said: Meaning) -> str:
    """A meaning in words; equal ones give equal words."""
    return " ".join(
        x if isinstance(x, str) else f"image {' and '.join(str(s + 1) for s in x)}" for x in said
    )


def letter_of(said: Meaning, options: Mapping[str, Meaning]) -> str | None:
    """The one option that says this; None if there is none, or more than one."""
    alike = [letter for letter, other in options.items() if other == said]
    return alike[0] if len(alike) == 1 else None


def _style(mark: re.Match[str]) -> tuple[str, ...] | None:
    """How a mark is written; None if it is a letter of the text."""
    letter, close = mark["letter"], mark["close"]
    at_line = mark["line"] is not None
    if close is None and not (at_line and letter.isupper() and not mark["open"]):
        return None
    if letter.islower() and not at_line and ")" not in (close or "") and not mark["open"]:
        return None
    kind = (close or "").rstrip(":") or close or f"line{mark['dash'].strip()}"
    return ("upper" if letter.isupper() else "lower", mark["open"], kind)


def _lines(text: str, run: Sequence[re.Match[str]]) -> list[Line]:
    ends = [mark.start() for mark in run[1:]] + [len(text)]
    out = []
    for mark, end in zip(run, ends, strict=True):
        if mark is run[-1]:
            newline = text.find("\n", mark.end(), mark.end() + _LONGEST)
            end = newline if newline >= 0 else mark.end() + _LONGEST
        said = text[mark.end() : end]
        lead = len(said) - len(said.lstrip())
        start = mark.end() + lead
        said = said.strip().rstrip(",; ")
        out.append(Line(mark["letter"].upper(), start, start + len(said), said))
    return out


def _says(text: str) -> bool:
    return bool(_WORD.search(_JOINING.sub(" ", text)))


def _words(text: str) -> list[str]:
    return [w for w in _TOKEN.findall(text.casefold()) if not _EMPTY_WORD.match(w)]
