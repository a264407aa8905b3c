"""Which images an answer names, and the answer that names the same images somewhere else.

Which image a letter names: where the text labels its slots (`A <image> B <image>`, `(A) <image>`,
`A. <image>`) the labels decide. Where it lists options in words (`A. Image 2`), a letter stands for
its option, which may speak of one image, of several or of none; see `perl.permutation.choices`. Else
the letters count the options: all images, or for the kinds `first_fixed` and `last:K` those that may
move, the others being the question's own. A number, as in `2` or `Image 2`, names the slot that is
labelled with it (`Image 2: <image>`); without such labels numbers count all slots from 1, as
ordinals ("the second image") always do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from perl.permutation.doubts import unfollowed
from perl.permutation.labels import SlotLabels, slot_labels
from perl.permutation.options import Line, find_options, in_words, longest, option_lines
from perl.permutation.references import LETTERS, NOUN, Mention, bare_name, doubts, mentions, write
from perl.types import IMAGE_SLOT, Example, UserError

__all__ = [
    "LETTERS",
    "Lettering",
    "Slots",
    "lettering",
    "named_images",
    "no_image_named",
    "option_lines",
    "plainly_named",
    "rename",
    "short",
    "text_of",
]

Slots = tuple[int, ...]

_LONGEST_ANSWER = 400  # Any text may come out of a model; a longer one names no image.
_SEPARATOR = re.compile(r"\s{0,8}(?:,|;|->|→|>|<|&|\band\b)\s{0,8}", re.IGNORECASE | re.ASCII)
_NAME = re.compile(
    r"\s*[(\[]*\s*(?:(?:image|picture|option)(?:[\s#_-]+|(?=[0-9])))?([A-Za-z]|[0-9]{1,4})\s*[)\]]*\s*\.?\s*",
    re.IGNORECASE | re.ASCII,
)
LETTER_AND_TEXT = re.compile(
    r"\s*[(\[]?([A-Za-z])(?:[).:\]]+\s*|\s*,\s+|\s+[-–—]\s+)(\S.*?)\s*",
    re.DOTALL | re.ASCII,
)
_STRAY = re.compile(
    rf"(?<![\w'])([A-Z])(?![\w'])(?!\s[a-z])|[(\[]([A-Za-z])[)\]]|^\s*[0-9]+\s*[.):]|{NOUN}[\s#_-]{{0,4}}[0-9]",
    re.ASCII,
)


_NUMBERED = re.compile(
    r"(?:^|(?<=[\s>]))[(\[]?(1|2)[).\]]{1,2}[ \t]{1,8}(?=[^\s<])", re.MULTILINE | re.ASCII
)


@dataclass(frozen=True, slots=True)
class Lettering:
    """What letters and numbers stand for: letter k names the 0-based slot `slots[k]`, number k + 1
    the slot `numbers[k]`.

    `source`: `slots` carry the letters as labels, letters stand for `options` in words (`slots` then
    are those of the first options that name one image each), or letters `count` the images.
    `lines` are the options in words, `bare` the names in them that are nothing but a number or an
    ordinal (empty unless all are, of different images), `some_bare` says that there is one;
    `numbered` that the text lists options as `1.`, `2.`; `labels` is what labels the slots.
    """

    slots: Slots
    source: Literal["slots", "options", "count"]
    numbers: Slots
    lines: tuple[Line, ...]
    bare: tuple[Mention, ...]
    labels: SlotLabels
    count: int
    some_bare: bool
    numbered: bool

    @property
    def in_text(self) -> Slots:
        """What letters name in the text, where "image B" may stand."""
        return self.slots if self.source == "slots" else ()

    @property
    def letters(self) -> Slots | None:
        """What letters name in an answer; None where they stand for options."""
        return None if self.lines else self.slots

    def found(self, text: str) -> list[Mention]:
        """The mentions in the example's text, or in a part of it."""
        return mentions(text, self.count, self.in_text, self.numbers)

    def vague(self, text: str) -> list[str]:
        """Words in a part of the text that may name an image and cannot be followed."""
        unsure = doubts(text, self.count, self.in_text, self.numbers)
        return unsure + unfollowed(text, self.found(text))


def text_of(example: Example) -> str:
    """All messages of an example as one text."""
    return "\n".join(message.content for message in example.messages)


def lettering(example: Example, options: Slots) -> Lettering:
    """The meaning of letters and numbers in an example; see the module's description.

    `options` are the slots that letters count where the text says nothing.
    """
    text, count = text_of(example), len(example.images)
    labels = slot_labels(text)
    numbers = labels.numbers or tuple(range(count))
    runs = find_options(text)
    lines = tuple(longest(in_words(runs)))
    pictured = [run for run in runs if any(IMAGE_SLOT in line.text for line in run)]
    slots = labels.letters or _slots_in(longest(pictured), text)
    bare = [bare_name(line.text, count, numbers) for line in lines]
    numbered = {m[1] for m in _NUMBERED.finditer(text)} == {"1", "2"}
    some = any(m is not None for m in bare)
    names = Lettering(slots, "slots", numbers, lines, (), labels, count, some, numbered)
    if example.should_change and bare and len({m.slot for m in bare if m}) == len(bare):
        shifted = (
            replace(m, start=m.start + line.start, end=m.end + line.start)
            for m, line in zip(bare, lines, strict=True)
            if m
        )
        names = replace(names, bare=tuple(shifted))
    if slots:
        return names
    if lines:
        single: list[int] = []
        for line, one in zip(lines, bare, strict=True):
            said = {one.slot} if one and names.bare else {m.slot for m in names.found(line.text)}
            if len(said) != 1:
                break
            single += said
        return replace(names, slots=tuple(single), source="options")
    return replace(names, slots=options[: len(LETTERS)], source="count")


def _slots_in(lines: Sequence[Line], text: str) -> Slots:
    """The slots that options show, for as many of the first options as show one each."""
    slots: list[int] = []
    for line in lines:
        if line.text.count(IMAGE_SLOT) != 1:
            break
        slots.append(text.count(IMAGE_SLOT, 0, line.start))
    return tuple(slots)


def named_images(
    answer: str, count: int, letters: Sequence[int], numbers: Sequence[int] | None = None
) -> Slots | None:
    """The 0-based slots that an answer names, in the sequence written; None if it names none.

    `count` is the number of images, letter k names slot `letters[k]` and number k + 1 `numbers[k]`;
    left out, numbers count all slots. An answer that names one image by a letter and another one in
    words (`A. Image 2`) names none.
    """
    found = _names_in(answer, count, letters, range(count) if numbers is None else numbers)
    if not found:
        return None
    spelled = LETTER_AND_TEXT.fullmatch(answer) and found[0].style == "letter"
    twice = spelled and len({m.slot for m in found}) == 1
    return (found[0].slot,) if twice else tuple(m.slot for m in found)


def plainly_named(answer: str, names: Lettering) -> Slots:
    """The 0-based slots that an answer names whatever was asked; empty if it may mean something else.

    Those are letters that label slots, in a question without options in words, and images that are named
    with a noun (`Image 2`, `the second image`). A bare number may be a count, and a letter without
    labels an option.
    """
    letters = () if names.lines else names.slots
    slots = [m.slot for m in mentions(answer, names.count, letters, names.numbers)]
    if names.source == "slots" and not names.lines:
        slots += [
            m.slot
            for m in _names_in(answer, names.count, names.slots, names.numbers)
            if m.style == "letter"
        ]
    return tuple(slots)


def rename(
    answer: str,
    slots: Sequence[int],
    letters: Sequence[int],
    letters_move: bool = True,
    numbers: Sequence[int] | None = None,
) -> str | None:
    """The answer with every named slot s replaced by `slots[s]`, in the style it is written in.

    None if it names no image, or would have to name a slot by a letter or number that it has not
    got. With `letters_move=False` letters stay, because the text behind them follows its image.
    """
    numbers = range(len(slots)) if numbers is None else numbers
    found = _names_in(answer, len(slots), letters, numbers)
    if not found:
        return None
    lettered = [m for m in found if m.style == "letter"]
    if letters_move and any(slots[m.slot] not in letters for m in lettered):
        return None
    moving = found if letters_move else [m for m in found if m.style != "letter"]
    try:
        return write(answer, moving, slots, letters, numbers)
    except LookupError:
        return None


def _names_in(
    answer: str, count: int, letters: Sequence[int], numbers: Sequence[int]
) -> list[Mention]:
    """Every name of an image in an answer; none if one of them cannot be told for certain."""
    if len(answer) > _LONGEST_ANSWER:
        return []
    listed = _list(answer, count, letters, numbers)
    if listed:
        return listed
    if both := LETTER_AND_TEXT.fullmatch(answer):
        slot = _slot(both[1], letters, numbers)
        said = _names_in(both[2], count, letters, numbers)
        if slot is None or {m.slot for m in said} != {slot}:
            return []
        at = both.start(2)
        letter = Mention(*both.span(1), slot, "letter")
        return [letter, *(replace(m, start=m.start + at, end=m.end + at) for m in said)]
    found = mentions(answer, count, letters, numbers)
    rest = list(answer)
    for mention in found:
        rest[mention.start : mention.end] = "\0" * (mention.end - mention.start)
    unsure = doubts(answer, count, letters, numbers) or unfollowed(answer, found)
    return [] if unsure or _STRAY.search("".join(rest)) else found


def _list(answer: str, count: int, letters: Sequence[int], numbers: Sequence[int]) -> list[Mention]:
    """An answer that is nothing but names; empty if it is not."""
    found, position = [], 0
    ends = [match.span() for match in _SEPARATOR.finditer(answer)]
    for end, after in [*ends, (len(answer), len(answer))]:
        item = answer[position:end]
        if match := _NAME.fullmatch(item):
            slot = _slot(match[1], letters, numbers)
            style = "number" if match[1].isdigit() else "letter"
            one = None if slot is None else Mention(*match.span(1), slot, style)
        else:
            one = bare_name(item, count, numbers)
        if one is None or one.style == "word":
            return []
        found.append(replace(one, start=one.start + position, end=one.end + position))
        position = after
    return found


def _slot(name: str, letters: Sequence[int], numbers: Sequence[int]) -> int | None:
    if name.isdigit():
        return numbers[int(name) - 1] if 1 <= int(name) <= len(numbers) else None
    index = LETTERS.index(name.upper())
    return letters[index] if index < len(letters) else None


def no_image_named(example: Example, names: Lettering) -> UserError:
    """What is wrong with an answer that should follow its image and names none."""
    count, letters = len(example.images), names.lines or names.slots
    known = f"1 to {len(names.numbers)}"
    known = f"A to {LETTERS[len(letters) - 1]} or {known}" if letters else known
    return UserError(
        f"example '{example.id}': answer '{short(example.answer)}' names none of its "
        f"{count} images ({known}); "
        "correct it, or set should_change to false if the answer stays when images move"
    )


def short(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a text, for a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
