"""The plan of a question: what in its text and answer follows the images, read once.

Which image a letter names: where the text labels its slots (`A <image> B <image>`, `(A) <image>`,
`A. <image>`) the labels decide. Where it lists options in words (`A. Image 2`, `B. both`, `C. a dog`), or a sentence
explains codes ("answer 1 for the first image and 2 for the second image"), a letter or number stands for what is said of
it, which may speak of one image, of several or of none. Else the letters count the options: all images, or for the kinds
`first_fixed` and `last:K` those that may move, the others being the question's own. A number, as in `2` or `Image 2`, names
the slot that is labelled with it (`Image 2: <image>`); without such labels numbers count all slots, from 1 or from what the
text states ("0-indexed"). Ordinals ("the second image") count all slots.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perl.permutation.forms import form_of
from perl.permutation.layout import (
    Option,
    SlotLabels,
    counts_backwards,
    counts_options,
    find_codes,
    find_options,
    first_numbers,
    images_in,
    meaning,
    numbers_its_options,
    slot_labels,
)
from perl.permutation.references import (
    LETTERS,
    Names,
    bare_name,
    hinted,
    labels_in,
    listed,
    mentions,
    read,
)
from perl.types import IMAGE_SLOT, Example, Meaning, Mention, Plan, UserError, one_line


def plan_of(example: Example) -> Plan:
    """The plan that an example has with it, or that is read now: if there is none, or it is of something else."""
    count = len(example.images)
    last = re.fullmatch(r"last:([0-9]{1,4})", example.kind)
    first = max(0, count - int(last[1])) if last else int(example.kind == "first_fixed")
    counted = tuple(range(first, count))
    given = example.extra.get("answer_form") or None
    if given not in (None, "set", "sequence", "values"):
        raise UserError(
            f"example '{example.id}': answer_form '{one_line(given, 40)}' is none of set, sequence, values; correct it, or "
            "leave it empty"
        )
    said = (text_of(example), example.answer, count, example.should_change, counted, given)
    key = hashlib.blake2b(repr((_reader(), *said)).encode(), digest_size=8).hexdigest()
    if example.plan is not None and example.plan.key == key:
        return example.plan
    return _read(key, *said)


@functools.cache
def _reader() -> str:
    """What tells this reader of questions from an older one, whose plans may have faults that it has not."""
    sources = (
        Path(__file__).with_name(f"{n}.py") for n in ("forms", "layout", "plan", "references")
    )
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sources)).hexdigest()


def to_json(plan: Plan) -> str:
    """As a column of a labelled file: what is not as usual."""
    usual = asdict(Plan("", (), ()))
    return json.dumps(
        {key: value for key, value in asdict(plan).items() if value != usual[key]},
        separators=(",", ":"),
    )


def from_json(text: Any) -> Plan | None:
    """What `to_json` wrote; None for anything else."""
    try:
        read = {"letters": (), "numbers": (), **json.loads(text)}
        for key, value in read.items():
            if isinstance(value, list):
                read[key] = _tuples(value)
            elif key in ("options", "sequences"):
                read[key] = {name: _tuples(said) for name, said in value.items()}
        read["mentions"] = tuple(Mention(**mention) for mention in read.get("mentions", ()))
        return Plan(**read)
    except (ValueError, TypeError, AttributeError):
        return None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def text_of(example: Example) -> str:
    """All messages of an example as one text."""
    return "\n".join(message.content for message in example.messages)


def names_in_text(plan: Plan, count: int) -> Names:
    """What is named in the text, where "image B" may stand only if B labels a slot."""
    return Names(count, plan.letters if plan.lettered else (), plan.numbers, plan.start, plan.nouns)


def names_in_answers(plan: Plan, count: int) -> Names:
    """What is named in an answer, whose letters may count images or stand for options."""
    return Names(count, plan.letters, plan.numbers, plan.start, plan.nouns)


@functools.lru_cache(
    maxsize=16
)  # An example without its plan is asked about several times in turn.
def _read(
    key: str,
    text: str,
    answer: str,
    count: int,
    should_change: bool,
    counted: tuple[int, ...],
    given: str | None,
) -> Plan:
    labels = slot_labels(text)
    in_words, pictured = find_options(text)
    stated = first_numbers(text, count)
    numbers = labels.numbers or tuple(range(count))
    start = labels.start if labels.numbers else min(stated, default=1)
    names = Names(count, labels.letters, numbers, start, labels.nouns)
    numbered = replace(names, letters=())
    found, unclear = read(text, names, labels.spans)
    lines, codes = in_words, False
    if not lines and (coded := _codes(text, found, labels.spans)):
        lines, codes = coded, True

    bare: list[Mention] = []
    if not codes:
        # The names in options that are nothing but a number or an ordinal, if all are, of different images.
        bare = [
            replace(one, start=one.start + line.start, end=one.end + line.start)
            for line in lines
            if (one := bare_name(line.text, numbered))
        ]
    some_bare = bool(bare)
    if not should_change or len({one.slot for one in bare}) < len(lines):
        bare = []

    def says(line: Option) -> Meaning:
        one = bare_name(line.text, names) if bare else None
        own = [one] if one else mentions(line.text, names)
        return meaning(line.text, own)

    options = {line.letter: says(line) for line in lines}
    slots = labels.letters or _slots_in(pictured, text)
    lettered = bool(slots)
    if not slots:
        slots = _named_by(options) if lines else counted[: len(LETTERS)]
    mentioned = sorted({*found, *bare}, key=lambda m: (m.start, m.slot))

    lists = {
        line.letter: tuple(m.slot for m in listed(re.sub("[-–]", ",", line.text), numbered))
        for line in in_words
    }
    faults = {}
    if len(stated) > 1 or (labels.numbers and stated - {start}):
        faults["any"] = (
            "it says in two ways what numbers count from; label each slot as in 'Image 1: <image>'"
        )
    if (codes and len(options) < len(lines)) or len(lines) == 1:
        faults["any"] = (
            "its text gives a number or letter a meaning of its own, which cannot be followed; list such "
            "answers as options, each on its own line ('A. Image 1')"
        )
    form = given or form_of(text)
    if form == "values" and not (lines or _lists(answer)):
        form = None
    if form == "as named" and should_change and _lists(answer):
        faults["any"] = (
            "its answer lists what the question names or places one after the other, which cannot follow the images"
        )
    if form == "unclear" and should_change and _lists(answer):
        faults["any"] = (
            "its answer may list the images in sequence, or a value for each image; ask for one of them "
            "('In which order ...', 'For each image in turn ...')"
        )
    numeral = answer.strip(" ().").isdigit()
    if conflict := _conflict(labels, [answer, *(line.text for line in lines)], bool(lines)):
        faults["answer"] = conflict
    elif why := numeral and _no_number(text, codes, counted[:1] > (0,)):
        faults["answer"] = why
    elif some_bare and not bare:
        faults["answer"] = (
            "some of its options are bare numbers; write 'Image 1' if they name images"
        )
    words = [*labels.ambiguous, *unclear]
    if words:
        faults["text"] = words[0]
    stem = list(text)
    for begin, end in [*labels.spans, *((line.mark, line.end) for line in lines)]:
        stem[begin:end] = "\n" * (end - begin)
    loose = [
        words
        for words, slot in hinted("".join(stem), found, count)
        if slot is None or slot in counted
    ]
    if labels.letters:
        loose += labels_in("".join(stem), LETTERS[: len(labels.letters)])
    if loose:
        faults["stem"] = loose[0]
        faults.setdefault("text", loose[0])
    for line in lines:
        unsure = () if bare_name(line.text, numbered) else read(line.text, names)[1]
        if unsure:
            faults["options"] = unsure[0]
        # "Candidate 1" may be the first image or the first that may move.
        if counted[:1] > (0,) and any(m.style == "other" for m in mentions(line.text, names)):
            faults["answer"] = (
                "its options may count all images or those that may move; name them as in 'Image 2', or set kind to none"
            )
    return Plan(
        key=key,
        letters=tuple(slots),
        numbers=numbers,
        start=start,
        nouns=labels.nouns,
        lettered=lettered,
        mentions=tuple(mentioned),
        options=options,
        sequences={letter: slots for letter, slots in lists.items() if slots},
        lines=tuple((line.start, line.end) for line in lines),
        bare=bool(bare),
        form={"unclear": None, "as named": "sequence"}.get(form or "", form),
        faults=faults,
    )


def _codes(text: str, found: Sequence[Mention], labels: Sequence[tuple[int, int]]) -> list[Option]:
    """Codes of which at least one is said to mean an image; a number that is part of an image's name is none."""
    taken = [*labels, *((m.start, m.end) for m in found)]
    codes = [
        code
        for code in find_codes(text)
        if not any(start <= code.mark < end for start, end in taken)
    ]
    spoken = any(code.start <= m.start < code.end for code in codes for m in found)
    return codes if spoken else []


def _slots_in(lines: Sequence[Option], text: str) -> tuple[int, ...]:
    """The slots that options show, for as many of the first options as show one each."""
    slots: list[int] = []
    for line in lines:
        if line.text.count(IMAGE_SLOT) != 1:
            break
        slots.append(text.count(IMAGE_SLOT, 0, line.start))
    return tuple(slots)


def _named_by(options: Mapping[str, Meaning]) -> tuple[int, ...]:
    """The slots that options name, for as many of the first options as name one each."""
    slots: list[int] = []
    for said in options.values():
        if len(images_in(said)) != 1:
            break
        slots += images_in(said)
    return tuple(slots)


def _no_number(text: str, codes: bool, own_images: bool) -> str:
    """Why a number in the answer need not be that of an image; empty if it is. `own_images`: the first are the question's."""
    if not codes and numbers_its_options(text):
        return "its answer may be an image or one of its numbered options; letter the options"
    if counts_backwards(text) or (own_images and counts_options(text)):
        return "its numbers count the images in another way than from the first on; label each slot as in 'Image 1: <image>'"
    return ""


def _conflict(labels: SlotLabels, said: Sequence[str], options: bool) -> str:
    """Why it is unclear what labels a slot; empty if nothing in the answer or the options hangs on it."""
    if "number" in labels.conflicts and any(c.isdigit() for text in said for c in text):
        return (
            f"'{labels.ambiguous[0]}' may label an image slot or not, so that numbers are unclear; "
            "write 'Image 1: <image>' before each image, or set kind to none"
        )
    if "letter" in labels.conflicts and not options:
        return (
            f"it is unclear which image slot the letter '{labels.ambiguous[0]}' labels; "
            "write 'A: <image>' before each image, or set kind to none"
        )
    return ""


def _lists(answer: str) -> bool:
    return bool(re.search(r"[,;>\n]|->|→|\band\b", answer))
