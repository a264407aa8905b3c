"""Labels by rules, from the words of a question, its options and its answer; no model is asked.

An answer that names an image follows it; one that does not is taken to stay only in the forms of
`perl.data.labelling.symmetry`. Whatever is not covered stays as it is, with a reason that begins with "unsure".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from perl.data.labelling.label import Label, checked, kind_of, stays, unsure
from perl.data.labelling.symmetry import asks_about_options, names_no_one, states_truth, stays_right
from perl.data.labelling.text import (
    ARRANGES,
    ASKS_WHICH,
    COUNTS,
    SEQUENCE,
    SINGULAR,
    SPECIAL,
    TOGETHER,
    Question,
    Slots,
)
from perl.permutation import LETTERS, Consistency, letter_slots, movable, named_images
from perl.types import IMAGE_SLOT, Example

_NAMES_ONLY = re.compile(r"[\s(\[]*(?:[A-Za-z]|[0-9]{1,2})(?:[\s).\],;&>-]+(?:and\s+)?[(\[]?(?:[A-Za-z]|[0-9]{1,2}))*[\s).\]]*")  # fmt: skip

_SOURCES = (
    (re.compile(r"nlvr", re.IGNORECASE), range(2, 3), "all", "two images side by side"),
    (re.compile(r"dreamsim", re.IGNORECASE), range(3, 4), "first_fixed", "the first image is the reference"),
    (re.compile(r"iconqa", re.IGNORECASE), range(3, 7), "first_fixed", "the first image is the question's"),
    (re.compile(r"(?:description_to|missing|next)_frame", re.IGNORECASE), range(5, 99), "last:4", "the last four images are the options"),
)  # fmt: skip
"""Data sets by name: for how many images, which may move, and why. After the rules by data set of the
paper's training code."""


@dataclass(frozen=True, slots=True)
class _Places:
    """The slots that may change places before the answer is looked at, and why.

    `certain`: the data set says so, and the text need not. `options`: they are labelled image options,
    which may change places though the images before them are steps in time.
    """

    slots: Slots
    why: str
    certain: bool = False
    options: bool = False


def label_by_rules(example: Example, text: Consistency = "slots", source: str = "") -> Label:
    """The label of an example; `source` is the name of its data set or task, where known.

    With `text="slots"` images that the question names keep their places; with `"references"` the
    names follow. The label has gone through `checked`.
    """
    count = len(example.images)
    if count < 2:
        return stays("a single image" if count else "no image")
    if any(
        m.role == "assistant" or (m.role == "system" and IMAGE_SLOT in m.content)
        for m in example.messages
    ):
        return unsure("a conversation of several turns")
    return checked(example, _label(Question(example), text, source), text)


def _label(question: Question, text: Consistency, source: str) -> Label:
    if _is_ordering(question):
        return Label("ordering", True, "the options are sequences of the images")
    if _is_arrangement(question):
        return Label("all", True, "the answer lists all images in sequence")
    places = _places(question, source)
    if isinstance(places, Label):
        return places
    if word := question.place:
        return stays(f"the text speaks of images by their place ({word})")
    context = len(places.slots) < question.count
    if (word := question.words(SEQUENCE)) and not (context and (places.certain or places.options)):
        return stays(f"the text speaks of a sequence ({word})")
    kept = question.spoken_of
    if (word := question.words(SPECIAL)) and not (context or kept or question.labelled):
        return unsure(f"it does not say which image is the {word}")
    if text == "references":
        named = question.labelled and question.letters.slots
        followed = {mention.slot for mention in question.named(question.stem, named or ())}
        kept = tuple(slot for slot in kept if slot not in followed)
    free = tuple(slot for slot in places.slots if slot not in kept)
    if len(free) < 2:
        return stays("the text speaks of particular images")
    if free != places.slots:
        places = _Places(free, f"{places.why}, without those that the text names", places.certain)
    if question.options:
        return _with_options(question, places, text)
    return _without_options(question, places)


def _is_ordering(question: Question) -> bool:
    """Whether options are sequences of all images and the answer is one of them."""
    every = list(range(question.count))
    sequences = [
        line
        for line in question.options.values()
        if sorted(named_images(line.replace("-", ","), question.count, ()) or ()) == every
    ]
    listed = len(sequences) >= 2 and not question.spoken_of
    return listed and (question.count > 2 or question.asks(ARRANGES))


def _is_arrangement(question: Question) -> bool:
    answer = question.example.answer
    named = named_images(answer, question.count, question.letters.slots, question.letters.numbers)
    return (
        not question.options
        and not question.spoken_of
        and question.asks(ARRANGES)
        and named is not None
        and sorted(named) == list(range(question.count))
        and _in_one_run(question, tuple(range(question.count)))
    )


def _in_one_run(question: Question, slots: Slots) -> bool:
    return any(set(slots) <= set(run) for run in question.runs)


def _places(question: Question, source: str) -> _Places | Label:
    for name, counts, kind, why in _SOURCES:
        if name.search(source) and question.count in counts:
            (slots,) = movable(kind, question.count)
            return _Places(slots, f"data set: {why}", certain=True)
    if labelled := question.labelled:
        if not _in_one_run(question, labelled):
            return unsure("text stands beside single images")
        why = "letters label the images" if len(labelled) == question.count else "image options"
        return _Places(labelled, why, options=True)
    *_, last = question.runs
    if len(question.runs) == 1:
        return _Places(last, "all images alike")
    if len(question.runs) == 2 and len(last) > 1:
        return _Places(last, "the last images are the options")
    return unsure("text stands beside single images")


def _with_options(question: Question, places: _Places, text: Consistency) -> Label:
    """Options in words: each names an image, some do, or none does."""
    answer = question.example.answer.strip()
    letter = answer.strip("().").upper()
    by_letter = letter in question.options
    if not by_letter:
        alike = [k for k, line in question.options.items() if line.casefold() == answer.casefold()]
        if len(alike) != 1:
            return unsure("the answer is none of the options")
        letter = alike[0]
    bare = {k: question.bare(line) for k, line in question.options.items()}
    slots = tuple(s for s in places.slots if s in bare.values())
    if all(slot is not None for slot in bare.values()):
        return _moving(question, slots, True, "the options name the images")
    speaking = {m.slot for line in question.options.values() for m in question.named(line)}
    if any(slot is not None for slot in bare.values()):
        if any(question.named(question.options[k]) for k, slot in bare.items() if slot is None):
            return unsure("some options name one image, others several")
        why = "some options name the images"
        if bare[letter] is None and not names_no_one(question.options[letter]):
            return unsure("the answer is an option that is no image")
        if bare[letter] is None or (by_letter and text == "references"):
            return _moving(question, slots, False, why)
        kind = kind_of(slots, question.count)
        if by_letter and not _letters_count(question, bare, kind):
            return unsure("the letters of the options do not count the images")
        return _moving(question, slots, True, why)
    if speaking:
        why = "the options speak of particular images"
        if not asks_about_options(question):
            return unsure(f"{why}, and the answer may depend on their sequence")
        followed = {m.slot for line in question.options.values() for m in question.named(line, ())}
        left = speaking - followed if text == "references" else speaking
        free = tuple(s for s in places.slots if s not in left)
        return stays(why) if len(free) < 2 else _moving(question, free, False, why)
    numbers = all(_NAMES_ONLY.fullmatch(line) for line in question.options.values())
    if numbers and not question.asks(COUNTS):
        return unsure("the options may be images or something else")
    return _invariant(question, places, answer if not by_letter else question.options[letter])


def _letters_count(question: Question, bare: dict[str, int | None], kind: str) -> bool:
    letters = letter_slots(replace(question.example, kind=kind))
    return all(
        LETTERS.index(letter) < len(letters) and letters[LETTERS.index(letter)] == slot
        for letter, slot in bare.items()
        if slot is not None
    )


def _without_options(question: Question, places: _Places) -> Label:
    """The answer stands alone: an image, a number, a yes or no, or a few words."""
    answer = question.example.answer.strip()
    if question.bare(answer) is not None and not _NAMES_ONLY.fullmatch(answer):
        return _moving(question, places.slots, True, f"{places.why}; the answer names one")
    if not _NAMES_ONLY.fullmatch(answer):
        return _invariant(question, places, answer)
    if question.asks(COUNTS) and answer.isdigit() and not question.asks(ASKS_WHICH):
        return _invariant(question, places, answer)
    named = named_images(answer, question.count, range(len(LETTERS)), question.letters.numbers)
    letters = any(c.isalpha() for c in answer.replace("and", ""))
    if named is None:
        return _invariant(question, places, answer)
    if letters and question.labelled:
        return _moving(question, places.slots, True, f"{places.why}; the answer is a label")
    if not (question.asks(ASKS_WHICH) or places.certain) or question.asks(COUNTS):
        return unsure("the answer may be an image or something else")
    whole = len(places.slots) == question.count
    if letters and question.spoken_of and not places.certain:
        return unsure("letters may count all images or the options")
    if not letters and not (whole or places.certain or question.spoken_of):
        return unsure("numbers may count all images or the options")
    return _moving(question, places.slots, True, f"{places.why}; the answer names one")


def _invariant(question: Question, places: _Places, answer: str) -> Label:
    """An answer that stays wherever the images are, if question and answer are of a form that says so."""
    if question.asks(ASKS_WHICH) and not (states_truth(answer) or question.options):
        return unsure("it asks for an image and the answer names none")
    if question.asks(SINGULAR) and not question.named(question.stem):
        return unsure("it speaks of one image and does not say which")
    # A data set of statements about all images alike; those that name one by its place are not here.
    statement = places.certain and len(places.slots) == question.count and states_truth(answer)
    if not (statement or question.asks(TOGETHER) or question.spoken_of):
        return unsure("it does not say that it is about all images")
    if not (statement or stays_right(question, answer)):
        return unsure("the answer may depend on the sequence of the images")
    said = "yes or no" if states_truth(answer) else "an answer in words"
    said = "a number" if answer.isdigit() else said
    return _moving(question, places.slots, False, f"{places.why}; {said} stays")


def _moving(question: Question, slots: Slots, should_change: bool, why: str) -> Label:
    if len(slots) < 2:
        return stays("fewer than two images may change places")
    return Label(kind_of(slots, question.count), should_change, why)
