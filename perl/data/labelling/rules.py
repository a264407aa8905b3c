"""Labels by rules, from the form of a question, its options and its answer; no model is asked.

An example's images move only if every sentence is of a form in `perl.data.labelling.grammar`, and layout, options and
answer are of a kind that is known to go with it. Whatever is not covered stays as it is, with a reason that begins with
"unsure".
"""

from __future__ import annotations

import re

from perl.data.labelling.grammar import (
    Form,
    asked_for,
    asks_for_candidate,
    compares,
    is_instruction,
    names_image,
    telling_word,
)
from perl.data.labelling.label import Label, checked, kind_of, stays, unsure
from perl.data.labelling.text import Question, Slots
from perl.permutation import CARDINALS, LETTERS, Consistency, slots_named
from perl.permutation.plan import names_in_answers
from perl.types import IMAGE_SLOT, Example

_LONGEST_ANSWER = 5  # Words; a longer answer may describe the images one after the other.
_NUMBER = re.compile(rf"[0-9]+(?:,[0-9]{{3}})*|{'|'.join(CARDINALS)}|zero|none", re.IGNORECASE)
_YES_NO = re.compile(r"yes|no|true|false", re.IGNORECASE)
_LIST = re.compile(r",|;|/|&|\b(?:and|or|then|versus|vs)\b", re.IGNORECASE)
_JOINED = re.compile(r",|\band\b|\bby\b|\bto\b")
"""One image for each: "the dog and the cat", or in a sequence: "by size", "small to large"."""
_NUMBER_OF_IMAGE = re.compile(
    r"\b(?:number|letter|index|label) of the (?:correct |right )?(?:image|picture|photo)\b"
)
_NAMES_ONLY = re.compile(r"[\s(\[]*(?:[A-Za-z]|[0-9]{1,2})(?:[\s).\],;&>-]+(?:and\s+)?[(\[]?(?:[A-Za-z]|[0-9]{1,2}))*[\s).\]]*")  # fmt: skip
_NO_ONE_IMAGE = re.compile(
    r"(?:neither|none|both|all|(?:(?:they|both|it) (?:are|is) )?(?:about |equal(?:ly)? )?(?:equal|identical|the same|a tie)|equally|cannot (?:tell|be (?:told|determined))|no difference)"
    r"(?: of (?:them|the above|these|(?:the |these )?(?:two )?\w+s))?(?: \w+)?",
    re.IGNORECASE,
)
_PLACED = re.compile(
    r"\b(?:left\w*|right\w*|top|bottom|upper|lower|middle|former|latter|previous|next|earlier|later|other|before|after|"
    r"first|second|third|fourth|last)\b",
    re.IGNORECASE,
)
_ASKS_FOR_ONE: tuple[Form, ...] = ("which", "bare", "option", "compare", "relate")


def label_by_rules(example: Example, text: Consistency = "slots") -> Label:
    """The label of an example.

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
    question = Question(example)
    label = _label(question, text)
    words = question.plan.faults.get("text", "")
    # An option that is "the third" has been read as an option.
    if label.kind != "none" and words and words not in question.options.values():
        label = unsure(f"its text may name an image ({words})")
    return checked(example, label, text)


def _label(question: Question, text: Consistency) -> Label:
    every = tuple(range(question.count))
    if why := question.plan.faults.get("any"):
        return unsure(why)
    start = question.plan.start
    numbers = [
        int(n)
        for s in question.sentences
        if is_instruction(s)
        for n in re.findall(r"\b[0-9]+\b", s)
    ]
    if any(not start <= n < start + question.count for n in numbers):
        return unsure("it speaks of numbers that are no image's")
    if not all(_names_all(question, s) for s in question.sentences if is_instruction(s)):
        return unsure("the answer may be some of the images only")
    places = _places(question)
    if isinstance(places, Label):
        return places
    candidates = len(places) < question.count
    if candidates and len(set(_named(question))) == 1 and not question.options:
        labelled = question.labelled and "text" not in question.plan.faults
        if asks_for_candidate(question.sentences, bool(labelled) and question.ends_in_images) and (
            labelled or not _NUMBER.fullmatch(question.example.answer.strip())
        ):
            return _moving(question, places, True, "the last images are the options")
    asked = asked_for(question.sentences)
    if asked is None:
        if word := telling_word(question.sentences):
            return stays(f"the text speaks of a sequence or of places ({word})")
        return unsure("the question is of no known form")
    if _is_ordering(question, asked):
        return Label("ordering", True, "the options are sequences of the images")
    if asked in ("arrange", "values"):
        return _in_turn(question, asked, places == every)
    kept = set(question.spoken_of if text == "slots" else ())
    kept |= {m.slot for m in question.plan.mentions if m.style == "other"}
    # "Which of the last three images": those are asked about, and the others are named for themselves.
    several = {m.slot for m in question.plan.mentions if m.style == "several"}
    single = {m.slot for m in question.plan.mentions if m.style != "several"}
    if several and asked == "relate" and not several & single:
        places, kept = tuple(sorted(several)), kept - several
    else:
        kept |= several
    free = tuple(slot for slot in places if slot not in kept)
    if len(free) < 2:
        return stays("the text speaks of particular images")
    if asked == "compare" and len(free) > 2:
        return unsure("it compares, and does not say with which image")
    if question.options:
        return _with_options(question, asked, free, text)
    return _without_options(question, asked, free, candidates)


def _names_all(question: Question, sentence: str) -> bool:
    """Whether an instruction that lists what to answer with, as in "answer A, B or C", lists every image or every option."""
    if re.search(r"\b(?:such as|like|e g|for example|counting|from|start)\b", sentence):
        return True
    listed = re.findall(r"\b(?:[0-9]|[a-h])\b(?=\s*(?:,|or\b|/|and\b|to\b|-|\)?$))", sentence)
    if len(listed) < 2 or (
        len(listed) == 2 and re.search(r"[0-9a-h]\s*(?:-|to|and)\s*[0-9a-h]", sentence)
    ):
        return True
    letters = len(question.options) or question.count
    first = question.plan.start
    every = {str(first + k) for k in range(question.count)}
    return set(listed) in (every, set(LETTERS[:letters].lower()))


def _places(question: Question) -> Slots | Label:
    """The slots whose images are alike to the question, as the layout of its text shows."""
    *_, last = question.runs
    if labelled := question.labelled:
        if not any(set(labelled) <= set(run) for run in question.runs):
            return unsure("text stands beside single images")
        return labelled
    if len(question.runs) == 1:
        return last
    if len(question.runs) == 2 and len(last) > 1:
        return last
    return unsure("text stands beside single images")


def _is_ordering(question: Question, asked: Form) -> bool:
    """Whether options are sequences of all images and the answer is one of them."""
    every = list(range(question.count))
    sequences = [s for s in question.plan.sequences.values() if sorted(s) == every]
    return asked == "arrange" and len(sequences) >= 2 and not question.spoken_of


def _in_turn(question: Question, asked: Form, all_alike: bool) -> Label:
    """The answer lists all images, or has a value for each."""
    if question.options or question.spoken_of or not all_alike:
        return unsure("it is not about all images alike")
    if asked == "values":
        if question.plan.form != "values":
            return unsure("its answer may list the images in sequence, or a value for each image")
        return Label("all", True, "the answer has a value for each image in turn")
    named = _named(question)
    if question.plan.form != "sequence" or sorted(named) != list(range(question.count)):
        return unsure("the answer does not list all images")
    return Label("all", True, "the answer lists all images in sequence")


def _named(question: Question) -> Slots:
    names = names_in_answers(question.plan, question.count)
    return slots_named(question.example.answer.strip(), names) or ()


def _with_options(question: Question, asked: Form, free: Slots, text: Consistency) -> Label:
    """Options in words: each names an image, some do, or none does."""
    answer = question.example.answer.strip()
    letter = answer.strip("().").upper()
    by_letter = letter in question.options
    if not by_letter:
        alike = [k for k, line in question.options.items() if line.casefold() == answer.casefold()]
        if len(alike) != 1:
            return unsure("the answer is none of the options")
        letter = alike[0]
    bare = {k: question.bare(k) for k in question.options}
    slots = tuple(s for s in free if any(s in named for named in bare.values()))
    if any(bare.values()) and asked in (*_ASKS_FOR_ONE, "options"):
        rest = [line for k, line in question.options.items() if not bare[k]]
        if not all(_NO_ONE_IMAGE.fullmatch(line.strip().rstrip(".")) for line in rest):
            return unsure("some options are images, others are not")
        follows = bool(bare[letter]) and not (rest and by_letter and text == "references")
        return _moving(
            question, slots, follows, f"{'some' if rest else 'the'} options name the images"
        )
    speaking = {m.slot for line in question.options.values() for m in question.named(line)}
    if speaking:
        alone = [line for line in question.options.values() if len(question.named(line)) < 2]
        if asked != "options" or any(compares(line) for line in alone):
            return unsure("the options speak of particular images")
        if text == "references":
            return _moving(question, free, False, "the options speak of images by name")
        return stays("the options speak of particular images")
    if asked in _ASKS_FOR_ONE:
        return unsure("it asks for an image, and the options are none")
    return _invariant(question, asked, free, answer if not by_letter else question.options[letter])


def _without_options(question: Question, asked: Form, free: Slots, candidates: bool) -> Label:
    """The answer stands alone: an image, a number, a yes or no, or a few words."""
    answer = question.example.answer.strip()
    if asked not in _ASKS_FOR_ONE:
        return _invariant(question, asked, free, answer)
    named = _named(question)
    if not named:
        return unsure("it asks for an image and the answer names none")
    if (
        len(named) > 1
        and question.plan.form != "sequence"
        and (
            list(named) != sorted(named)
            or any(_JOINED.search(s) for s in question.sentences if not is_instruction(s))
        )
    ):
        return unsure("the answer may list the images in a sequence")
    if _NAMES_ONLY.fullmatch(answer):
        letters = any(c.isalpha() for c in answer.replace("and", ""))
        if letters and not question.labelled and question.spoken_of:
            return unsure("letters may count all images or the others")
        if not letters and candidates and not question.spoken_of:
            return unsure("numbers may count all images or the options")
        told = any(_NUMBER_OF_IMAGE.search(s) for s in question.sentences if is_instruction(s))
        is_open = asked in ("bare", "option") or (
            asked == "compare" and not names_image(question.sentences)
        )
        sure = told or not is_open or (letters and question.labelled)
        if not sure or (asked == "option" and not question.ends_in_images):
            return unsure("the answer may be an image or something else")
    return _moving(question, free, True, "it asks for an image, and the answer names it")


def _invariant(question: Question, asked: Form, free: Slots, answer: str) -> Label:
    """An answer that stays wherever the images are."""
    said = answer.rstrip(".")
    if any(_PLACED.search(line) for line in (said, *question.options.values())):
        return unsure("answer or options speak of places")
    if asked == "number" and _NUMBER.fullmatch(said):
        return _moving(question, free, False, "it counts over all images alike")
    if asked == "truth" and _YES_NO.fullmatch(said):
        return _moving(question, free, False, "it asks whether something holds of all images alike")
    if asked == "thing" and not _may_list(said, question.options):
        return _moving(question, free, False, "it asks what the images have in common")
    return unsure("the answer does not fit what is asked for")


def _may_list(answer: str, options: dict[str, str]) -> bool:
    """Whether an answer in words could be about one image after the other."""
    if options:
        # "a cat and a dog" beside "a dog and a cat" asks for a sequence.
        words = sorted(answer.lower().split())
        return sum(sorted(line.lower().split()) == words for line in options.values()) > 1
    return len(answer.split()) > _LONGEST_ANSWER or bool(_LIST.search(answer))


def _moving(question: Question, slots: Slots, should_change: bool, why: str) -> Label:
    if len(slots) < 2:
        return stays("fewer than two images may change places")
    return Label(kind_of(slots, question.count), should_change, why)
