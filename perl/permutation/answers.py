"""Which images an answer names, and the answer that names the same images somewhere else.

Which image a letter names: where the text labels its slots (`A <image> B <image>`, `(A) <image>`,
`A. <image>`) the labels decide. Where it lists options in words (`A. Image 2`, `B. both`, `C. a dog`),
a letter stands for its option, which may speak of one image, of several or of none. Else the letters
count the options: all images, or for the kinds `first_fixed` and `last:K` those that may move, the
others being the question's own. A number, as in `2` or `Image 2`, names the slot that is labelled with
it (`Image 2: <image>`); without such labels numbers count all slots from 1, as ordinals ("the second
image") always do.

Where the text is rewritten, an option in words follows its images and its letter stays right. Where
the text stays, the right option is the one that says of the images' new slots what the old one said
of the old slots. If no option does, or two do, there is no right answer and the question is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from perl.permutation.layout import (
    Meaning,
    Option,
    SlotLabels,
    described,
    find_options,
    images_in,
    letter_of,
    meaning,
    moved,
    slot_labels,
)
from perl.permutation.references import (
    LETTERS,
    NOUN,
    Mention,
    Names,
    bare_name,
    mentions,
    read,
    unsupported_mentions,
    write,
)
from perl.types import IMAGE_SLOT, Example

Slots = tuple[int, ...]

_LONGEST_ANSWER = 400  # Any text may come out of a model; a longer one names no image.
_SEPARATOR = re.compile(r"\s{0,8}(?:,|;|->|→|>|<|&|\band\b)\s{0,8}", re.IGNORECASE | re.ASCII)
_NAME = re.compile(
    r"\s*[(\[]*\s*(?:(?:image|picture|option)(?:[\s#_-]+|(?=[0-9])))?([A-Za-z]|[0-9]{1,4})\s*[)\]]*\s*\.?\s*",
    re.IGNORECASE | re.ASCII,
)
_LETTER_AND_TEXT = re.compile(
    r"\s*[(\[]?([A-Za-z])(?:[).:\]]+\s*|\s*,\s+|\s+[-–—]\s+)(\S.*?)\s*",
    re.DOTALL | re.ASCII,
)
_STRAY = re.compile(
    rf"(?<![\w'])([A-Z])(?![\w'])(?!\s[a-z])|[(\[]([A-Za-z])[)\]]|^\s*[0-9]+\s*[.):]|{NOUN}[\s#_-]{{0,4}}[0-9]",
    re.ASCII,
)
_CHOICE = re.compile(
    r"(\s*[(\[]*\s*(?:(?:option|choice|image|picture)\s+)?)([A-Za-z])(\s*[)\]]*\s*\.?\s*)",
    re.IGNORECASE | re.ASCII,
)
_CHOICES = re.compile(r"(\s{0,8}(?:,|;|&|\band\b)\s{0,8})", re.IGNORECASE | re.ASCII)


class NoAnswer(Exception):
    """Why an answer cannot be written when the images move."""


@dataclass(frozen=True, slots=True)
class Lettering:
    """What letters and numbers stand for: letter k names the 0-based slot `slots[k]`, number k + 1
    the slot `numbers[k]`.

    `source`: `slots` carry the letters as labels, letters stand for `options` in words (`slots` then
    are those of the first options that name one image each), or letters `count` the images.
    `lines` are the options in words, `bare` the names in them that are nothing but a number or an
    ordinal (empty unless all are, of different images), `some_bare` says that there is one; `labels`
    is what labels the slots.
    """

    slots: Slots
    source: Literal["slots", "options", "count"]
    numbers: Slots
    lines: tuple[Option, ...]
    bare: tuple[Mention, ...]
    labels: SlotLabels
    count: int
    some_bare: bool

    @property
    def in_text(self) -> Names:
        """What is named in the text, where "image B" may stand only if B labels a slot."""
        return Names(self.count, self.slots if self.source == "slots" else (), self.numbers)

    @property
    def in_answers(self) -> Names:
        """What is named in an answer, whose letters may count images or stand for options."""
        return Names(self.count, self.slots, self.numbers)


def text_of(example: Example) -> str:
    """All messages of an example as one text."""
    return "\n".join(message.content for message in example.messages)


def lettering(example: Example, options: Slots) -> Lettering:
    """The meaning of letters and numbers in an example; see the module's description.

    `options` are the slots that letters count where the text says nothing.
    """
    return _lettering(text_of(example), len(example.images), example.should_change, options)


@functools.lru_cache(maxsize=16)  # An example is asked about several times in turn.
def _lettering(text: str, count: int, should_change: bool, options: Slots) -> Lettering:
    labels = slot_labels(text)
    numbers = labels.numbers or tuple(range(count))
    in_words, pictured = find_options(text)
    lines = tuple(in_words)
    slots = labels.letters or _slots_in(pictured, text)
    bare = [bare_name(line.text, Names(count, (), numbers)) for line in lines]
    named = [
        replace(one, start=one.start + line.start, end=one.end + line.start)
        for one, line in zip(bare, lines, strict=True)
        if one
    ]
    some_bare = bool(named)
    if not should_change or len({one.slot for one in named}) < len(lines):
        named = []
    names = Lettering(slots, "slots", numbers, lines, tuple(named), labels, count, some_bare)
    if slots:
        return names
    if not lines:
        return replace(names, slots=options[: len(LETTERS)], source="count")
    names = replace(names, source="options")
    single: list[int] = []
    for line, one in zip(lines, bare, strict=True):
        said = {one.slot} if one and named else {m.slot for m in mentions(line.text, names.in_text)}
        if len(said) != 1:
            break
        single += said
    return replace(names, slots=tuple(single))


def _slots_in(lines: Sequence[Option], text: str) -> Slots:
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
    found = _names_in(answer, Names(count, letters, range(count) if numbers is None else numbers))
    if not found:
        return None
    spelled = _LETTER_AND_TEXT.fullmatch(answer) and found[0].style == "letter"
    twice = spelled and len({m.slot for m in found}) == 1
    return (found[0].slot,) if twice else tuple(m.slot for m in found)


def plainly_named(answer: str, names: Lettering) -> Slots:
    """The 0-based slots that an answer names whatever was asked; empty if it may mean something else.

    Those are letters that label slots, in a question without options in words, and images that are named
    with a noun (`Image 2`, `the second image`). A bare number may be a count, and a letter without
    labels an option.
    """
    known = replace(names.in_answers, letters=() if names.lines else names.slots)
    slots = [m.slot for m in mentions(answer, known)]
    if names.source == "slots" and not names.lines:
        slots += [m.slot for m in _names_in(answer, known) if m.style == "letter"]
    return tuple(slots)


def rename(answer: str, slots: Sequence[int], names: Names) -> str | None:
    """The answer with every named slot s replaced by `slots[s]`, in the style it is written in.

    None if it names no image, or would have to name a slot by a letter or number that it has not
    got.
    """
    found = _names_in(answer, names)
    lettered = [m for m in found if m.style == "letter"]
    if not found or any(slots[m.slot] not in names.letters for m in lettered):
        return None
    try:
        return write(answer, found, slots, names)
    except LookupError:
        return None


def inverse(order: Sequence[int]) -> list[int]:
    """For each original image the slot where it is now."""
    return sorted(range(len(order)), key=lambda slot: order[slot])


def is_choice(names: Lettering, answer: str) -> bool:
    """Whether an answer gives letters of options in words, alone or with the text of one."""
    alone = _replace(names, answer, lambda letter: letter) is not None
    return alone or _letter_and_text(names, answer) is not None


def meanings(names: Lettering) -> dict[str, Meaning]:
    """What every option in words says, by letter."""
    return {line.letter: _says(names, line.text) for line in names.lines}


def follow(names: Lettering, answer: str, where: Sequence[int], rewritten: bool) -> str:
    """The right answer to a question with options in words when the image of each slot s has moved to
    slot `where[s]`.

    Raises:
        NoAnswer: there is none that is certain.
    """
    options = meanings(names)
    for line in () if rewritten else names.lines:
        found, ambiguous = read(line.text, names.in_text)
        if words := ambiguous + unsupported_mentions(line.text, found):
            raise NoAnswer(
                f"its options name images in words that cannot be followed ('{words[0]}')"
            )
    if not is_choice(names, answer):
        said = _says(names, answer)  # It may be an option's own words.
        if (
            not rewritten
            and letter_of(said, options)
            and not letter_of(moved(said, where), options)
        ):
            raise NoAnswer("no option says the same when images move")
        new = rename(answer, where, names.in_text)
        if new is None:
            raise NoAnswer("it names no image, or one that moves to a slot without a name")
        return new
    if names.source == "slots":
        raise NoAnswer("its letters label images as well as options in words")

    def moved_letter(letter: str) -> str:
        if rewritten:
            return letter
        said = options[letter]
        if not images_in(said):
            raise NoAnswer(f"option {letter} speaks of no image")
        new = letter_of(moved(said, where), options)
        if new is None or letter_of(said, options) is None:
            raise NoAnswer(f"no option, or more than one, says what {letter} says when images move")
        return new

    both = _letter_and_text(names, answer)
    if both is None:
        new = _replace(names, answer, moved_letter)
        assert new is not None
        return new
    letter, text = both[1].upper(), both[2]
    if _says(names, text) != options[letter]:
        raise NoAnswer("its letter and its text are not the same option")
    new = moved_letter(letter) if both[1].isupper() else moved_letter(letter).lower()
    said = rename(text, where, names.in_text)
    if said is None and images_in(options[letter]):
        raise NoAnswer("its text cannot be rewritten")
    between = answer[both.end(1) : both.start(2)]
    return f"{answer[: both.start(1)]}{new}{between}{said or text}{answer[both.end(2) :]}"


def back(names: Lettering, answer: str, order: Sequence[int], rewritten: bool) -> str | None:
    """An answer given in `order`, as the original option, or in words if none says the same there.

    Equal results mean that the same pictures were chosen; None if letter and text disagree or no
    image is named.
    """
    options = meanings(names)
    if both := _letter_and_text(names, answer):
        shown = options[both[1].upper()]
        if _says(names, both[2]) != (moved(shown, inverse(order)) if rewritten else shown):
            return None
        answer = both[1]

    def original(letter: str) -> str:
        if rewritten or not images_in(options[letter]):
            return letter
        said = moved(options[letter], order)
        same = letter if said == options[letter] else letter_of(said, options)
        return same or described(said)

    chosen = _replace(names, answer, original)
    return rename(answer, order, names.in_text) if chosen is None else chosen


def _says(names: Lettering, text: str) -> Meaning:
    """What an option or an answer says."""
    one = bare_name(text, names.in_text) if names.bare else None
    return meaning(text, [one] if one else mentions(text, names.in_text))


def _letter_and_text(names: Lettering, answer: str) -> re.Match[str] | None:
    """The letter of an option in words, and the text behind it; None for a list of letters (`A, C`)."""
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match is None or _replace(names, answer, lambda letter: letter) is not None:
        return None
    return match if match[1].upper() in {line.letter for line in names.lines} else None


def _replace(names: Lettering, answer: str, new: Callable[[str], str]) -> str | None:
    """An answer that is a list of option letters, each replaced; None if it is anything else."""
    known = {line.letter for line in names.lines}
    if len(answer) > _LONGEST_ANSWER:
        return None
    parts = _CHOICES.split(answer)
    for i in range(0, len(parts), 2):
        match = _CHOICE.fullmatch(parts[i])
        if match is None or match[2].upper() not in known:
            return None
        letter = new(match[2].upper())
        parts[i] = match[1] + (letter if match[2].isupper() else letter.lower()) + match[3]
    return "".join(parts)


def _names_in(answer: str, names: Names) -> list[Mention]:
    """Every name of an image in an answer; none if one of them cannot be told for certain."""
    if len(answer) > _LONGEST_ANSWER:
        return []
    if listed := _list(answer, names):
        return listed
    if both := _LETTER_AND_TEXT.fullmatch(answer):
        slot = _slot(both[1], names)
        said = _names_in(both[2], names)
        if slot is None or {m.slot for m in said} != {slot}:
            return []
        at = both.start(2)
        letter = Mention(*both.span(1), slot, "letter")
        return [letter, *(replace(m, start=m.start + at, end=m.end + at) for m in said)]
    found, ambiguous = read(answer, names)
    rest = list(answer)
    for mention in found:
        rest[mention.start : mention.end] = "\0" * (mention.end - mention.start)
    unclear = ambiguous or unsupported_mentions(answer, found) or _STRAY.search("".join(rest))
    return [] if unclear else found


def _list(answer: str, names: Names) -> list[Mention]:
    """An answer that is nothing but names; empty if it is not."""
    found, position = [], 0
    ends = [match.span() for match in _SEPARATOR.finditer(answer)]
    for end, after in [*ends, (len(answer), len(answer))]:
        item = answer[position:end]
        if match := _NAME.fullmatch(item):
            slot = _slot(match[1], names)
            style = "number" if match[1].isdigit() else "letter"
            one = None if slot is None else Mention(*match.span(1), slot, style)
        else:
            one = bare_name(item, names)
        if one is None or one.style == "word":
            return []
        found.append(replace(one, start=one.start + position, end=one.end + position))
        position = after
    return found


def _slot(name: str, names: Names) -> int | None:
    known = names.numbers if name.isdigit() else names.letters
    index = int(name) - 1 if name.isdigit() else LETTERS.index(name.upper())
    return known[index] if 0 <= index < len(known) else None
