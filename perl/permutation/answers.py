"""Which images an answer names, and the answer that names the same images somewhere else.

Where the text is rewritten, an option in words follows its images and its letter stays right. Where
the text stays, the right option is the one that says of the images' new slots what the old one said
of the old slots. If no option does, or two do, there is no right answer and the question is refused.
A set of images is written sorted, as it has no sequence; values of each image in turn move with their images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from perl.permutation.layout import described, images_in, letter_of, meaning, moved
from perl.permutation.plan import names_in_answers, names_in_text
from perl.permutation.references import (
    NOUN,
    ORDINAL,
    Names,
    bare_name,
    listed,
    mentions,
    read,
    written,
)
from perl.types import Meaning, Mention, Plan

Slots = tuple[int, ...]

_LONGEST_ANSWER = 400  # Any text may come out of a model; a longer one names no image.
_CODE_AND_TEXT = re.compile(
    r"\s*[(\[]?([A-Za-z])(?:[).:\]]+\s*|\s*,\s+|\s+[-–—]\s+)(\S.*?)\s*",
    re.DOTALL | re.ASCII,
)
_STRAY = re.compile(
    rf"(?<![\w'])([A-Z])(?![\w'])(?!\s[a-z])|[(\[]([A-Za-z])[)\]]|^\s*[0-9]+\s*[.):]|(?<![\w.'])[0-9]{{1,2}}(?![\w'])(?!\s[a-z])|\b(?:{ORDINAL}|the other)\b|\((?:left|right|middle)\)|{NOUN}[\s#_-]{{0,4}}[0-9]",
    re.ASCII,
)
_CHOICE = re.compile(
    r"(\s*[(\[]*\s*(?:(?:option|choice|image|picture)\s+)?)([A-Za-z]|[0-9]{1,2})(\s*[)\]]*\s*\.?\s*)",
    re.IGNORECASE | re.ASCII,
)
_CHOICES = re.compile(r"(\s{0,8}(?:,|;|&|\band\b)\s{0,8})", re.IGNORECASE | re.ASCII)
_VALUES = re.compile(r"(\s*(?:,|;|\band\b|\n|\|)\s*)")
_NAMED_VALUE = re.compile(
    rf"\s*(?:the\s+)?(?:(?:{ORDINAL}|left|right)(?:\s+{NOUN})?\s*[:=,-]?\s+\w|{NOUN}[\s#_-]*(?:[0-9]|[A-Z]\b)|[(\[]?(?:[0-9]{{1,2}}|[A-Za-z])(?:[:=)\]]\s*[A-Za-z]|[:.=)\]]\s))",
    re.ASCII | re.IGNORECASE,
)
"""A value with the name of its image: "Image 1: a dog", "1. a dog", "the first shows a dog"."""
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")


class NoAnswer(Exception):
    """Why an answer cannot be written when the images move."""


def named_images(
    answer: str, count: int, letters: Sequence[int], numbers: Sequence[int] | None = None
) -> Slots | None:
    """The 0-based slots that an answer names, in the sequence written; None if it names none.

    `count` is the number of images, letter k names slot `letters[k]` and number k + 1 `numbers[k]`;
    left out, numbers count all slots. An answer that names one image by a letter and another one in
    words (`A. Image 2`) names none.
    """
    return slots_named(answer, Names(count, letters, range(count) if numbers is None else numbers))


def slots_named(answer: str, names: Names) -> Slots | None:
    """`named_images` by the names of a question."""
    found = _names_in(answer, names)
    if not found:
        return None
    spelled = _CODE_AND_TEXT.fullmatch(answer) and found[0].style == "letter"
    twice = spelled and len({m.slot for m in found}) == 1
    return (found[0].slot,) if twice else tuple(m.slot for m in found)


def plainly_named(answer: str, plan: Plan, count: int) -> Slots:
    """The 0-based slots that an answer names whatever was asked; empty if it may mean something else.

    Those are letters that label slots, in a question without options in words, and images that are named
    with a noun (`Image 2`, `the second image`). A bare number may be a count, and a letter without
    labels an option.
    """
    letters = () if plan.options else plan.letters
    known = replace(names_in_answers(plan, count), letters=letters)
    slots = [m.slot for m in mentions(answer, known)]
    if plan.lettered and not plan.options:
        slots += [m.slot for m in _names_in(answer, known) if m.style == "letter"]
    return tuple(slots)


def rename(
    answer: str, slots: Sequence[int], names: Names, form: str | None = None, gold: bool = False
) -> str | None:
    """The answer with every named slot s replaced by `slots[s]`, in the style it is written in; a set sorted.

    A `gold` answer that does not list its set in ascending order keeps its sequence, which may be what is asked for ("Which
    images show the king and his wife?").

    None if it names no image, or would have to name a slot by a letter or number that it has not
    got.
    """
    found = _names_in(answer, names)
    lettered = [m for m in found if m.style == "letter"]
    if not found or any(slots[m.slot] not in names.letters for m in lettered):
        return None
    old = [m.slot for m in found]
    where = [slots[slot] for slot in old]
    if form == "set" and len(set(where)) == len(found) and not (gold and old != sorted(old)):
        where.sort()
    out, position = [], 0
    for mention, slot in zip(found, where, strict=True):
        name = answer[mention.start : mention.end]
        try:
            new = name if slot == mention.slot else written(mention, name, slot, names)
        except LookupError:
            return None
        out += [answer[position : mention.start], new]
        position = mention.end
    return "".join([*out, answer[position:]])


def inverse(order: Sequence[int]) -> list[int]:
    """For each original image the slot where it is now."""
    return sorted(range(len(order)), key=lambda slot: order[slot])


def rearranged_values(answer: str, order: Sequence[int]) -> str | None:
    """One value for each image in turn, in another order of the images; None if there are not as many.

    Example: `rearranged_values("2, 3, 1", (1, 0, 2)) == "3, 2, 1"`.
    """
    if len(answer) > _LONGEST_ANSWER or _THOUSANDS.fullmatch(answer.strip()):
        return None
    opened = re.match(r"\s*[(\[]?\s*", answer)
    closed = re.search(r"\s*[)\]]?\s*\.?\s*$", answer)
    assert opened is not None and closed is not None
    start, end = opened.end(), max(opened.end(), closed.start())
    parts = _VALUES.split(answer[start:end])
    values = parts[::2]
    if len(values) != len(order) or not all(values) or any(map(_NAMED_VALUE.match, values)):
        return None
    parts[::2] = [values[i] for i in order]
    return answer[:start] + "".join(parts) + answer[end:]


def is_choice(plan: Plan, answer: str) -> bool:
    """Whether an answer gives letters of options in words, alone or with the text of one."""
    return bool(_choices(plan, answer)) or _letter_and_text(plan, answer) is not None


def follow(plan: Plan, answer: str, where: Sequence[int], rewritten: bool) -> str:
    """The right answer to a question with options in words when the image of each slot s has moved to
    slot `where[s]`.

    Raises:
        NoAnswer: there is none that is certain.
    """
    options, names = plan.options, names_in_text(plan, len(where))
    if not rewritten and (words := plan.faults.get("options")):
        raise NoAnswer(f"its options name images in words that cannot be followed ('{words}')")
    if not is_choice(plan, answer):
        said = _says(plan, answer, names)  # It may be an option's own words.
        if (
            not rewritten
            and letter_of(said, options)
            and not letter_of(moved(said, where), options)
        ):
            raise NoAnswer("no option says the same when images move")
        new = rename(answer, where, names, plan.form, gold=True)
        if new is None:
            raise NoAnswer("it names no image, or one that moves to a slot without a name")
        return new
    if plan.lettered:
        raise NoAnswer("its letters label images as well as options in words")

    def moved_letter(letter: str) -> str:
        said = options[letter]
        if rewritten and len(plan.sequences.get(letter, ())) > 1 and not images_in(said):
            raise NoAnswer(
                f"option {letter} lists images by bare numbers, which cannot be rewritten"
            )
        if rewritten:
            return letter
        if not images_in(said):
            raise NoAnswer(f"option {letter} speaks of no image")
        new = letter_of(moved(said, where), options)
        if new is None or letter_of(said, options) is None:
            raise NoAnswer(f"no option, or more than one, says what {letter} says when images move")
        return new

    both = _letter_and_text(plan, answer)
    if both is None:
        return _replace(plan, answer, moved_letter, gold=True)
    letter, text = both[1].upper(), both[2]
    if _says(plan, text, names) != options[letter]:
        raise NoAnswer("its letter and its text are not the same option")
    new = moved_letter(letter) if both[1].isupper() else moved_letter(letter).lower()
    said = rename(text, where, names)
    if said is None and images_in(options[letter]):
        raise NoAnswer("its text cannot be rewritten")
    between = answer[both.end(1) : both.start(2)]
    return f"{answer[: both.start(1)]}{new}{between}{said or text}{answer[both.end(2) :]}"


def back(plan: Plan, answer: str, order: Sequence[int], rewritten: bool) -> str | None:
    """An answer given in `order`, as the original option, or in words if none says the same there.

    Equal results mean that the same pictures were chosen; None if letter and text disagree or no
    image is named.
    """
    options, names = plan.options, names_in_text(plan, len(order))
    if both := _letter_and_text(plan, answer):
        shown = options[both[1].upper()]
        if _says(plan, both[2], names) != (moved(shown, inverse(order)) if rewritten else shown):
            return None
        answer = both[1]

    def original(letter: str) -> str:
        if rewritten or not images_in(options[letter]):
            return letter
        said = moved(options[letter], order)
        same = letter if said == options[letter] else letter_of(said, options)
        return same or described(said)

    if _choices(plan, answer):
        return _replace(plan, answer, original)
    return rename(answer, order, names, plan.form)


def _says(plan: Plan, text: str, names: Names) -> Meaning:
    """What an option or an answer says."""
    one = bare_name(text, names) if plan.bare else None
    return meaning(text, [one] if one else mentions(text, names))


def _letter_and_text(plan: Plan, answer: str) -> re.Match[str] | None:
    """The letter of an option in words, and the text behind it; None for a list of letters (`A, C`)."""
    match = _CODE_AND_TEXT.fullmatch(answer)
    if match is None or _choices(plan, answer):
        return None
    return match if match[1].upper() in plan.options else None


def _choices(plan: Plan, answer: str) -> list[re.Match[str] | str]:
    """An answer that is a list of options' letters: their matches and what separates them; empty for anything else."""
    if len(answer) > _LONGEST_ANSWER:
        return []
    parts: list[re.Match[str] | str] = [*_CHOICES.split(answer)]
    for i in range(0, len(parts), 2):
        match = _CHOICE.fullmatch(str(parts[i]))
        if match is None or match[2].upper() not in plan.options:
            return []
        parts[i] = match
    return parts


def _replace(plan: Plan, answer: str, new: Callable[[str], str], gold: bool = False) -> str:
    """A list of options' letters with each replaced; a set sorted as in `rename`."""
    parts = _choices(plan, answer)
    old = [str(match[2]).upper() for match in parts[::2]]
    letters = [new(letter) for letter in old]
    if plan.form == "set" and not (gold and old != sorted(old)):
        letters.sort()
    out = [
        f"{match[1]}{letter if match[2] == match[2].upper() else letter.lower()}{match[3]}"
        for match, letter in zip(parts[::2], letters, strict=True)
    ]
    between = [str(part) for part in parts[1::2]]
    return "".join(a + b for a, b in zip(out, [*between, ""], strict=True))


def _names_in(answer: str, names: Names) -> list[Mention]:
    """Every name of an image in an answer; none if one of them cannot be told for certain."""
    if len(answer) > _LONGEST_ANSWER:
        return []
    if found := listed(answer, names):
        return found
    if both := _CODE_AND_TEXT.fullmatch(answer):
        slot = names.slot(both[1])
        said = _names_in(both[2], names)
        if slot is None or {m.slot for m in said} != {slot}:
            return []
        at = both.start(2)
        letter = Mention(*both.span(1), slot, "letter")
        return [letter, *(replace(m, start=m.start + at, end=m.end + at) for m in said)]
    found, unclear = read(answer, names)
    rest = list(answer)
    for mention in found:
        rest[mention.start : mention.end] = "\0" * (mention.end - mention.start)
    return [] if unclear or _STRAY.search("".join(rest)) else found
