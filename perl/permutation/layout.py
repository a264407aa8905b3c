"""How a question lays out its images and its options in the text.

*Labels* of `<image>` slots: `Image 1: <image>`, `(A) <image>`, `<image> (Image 1)`. A label belongs to
its slot, whatever the slot shows. A row of labels counts if each stands directly before its slot, or
each directly after it, if it runs 1, 2, ... or A, B, ... (or from another number on, where it labels all), in any
sequence, and if it leaves out no slot between its own. A text may also *state* what numbers count from.

*Options* of a multiple-choice question, which run `A.`, `B)`, `(C)`, ... unbroken from A, on lines of
their own or in one line, and what each says, whatever names it gives the images. *Codes* are options that stand in
a sentence: "answer 1 for the first image and 2 for the second image".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from perl.permutation.references import LETTERS, LINK, NOUN, OTHER_NOUN, value_of
from perl.types import IMAGE_SLOT, Meaning, Mention

_LABEL = (
    rf"(?:<image[ _-]?(?P<tag>[0-9]{{1,2}})>|(?P<noun>(?:{NOUN}|{OTHER_NOUN}|(?i:option|choice))"
    rf"(?:{LINK}|#|(?=[0-9])))?(?P<name>(?:[0-9]{{1,2}}|[A-Za-z])(?![A-Za-z0-9])))"
)
_BEFORE = re.compile(
    rf"(?<![\w'.]){_LABEL}(?P<close>(?:[\s).:\]=*_(\[–—-]|(?<![A-Za-z0-9])(?i:is)\b){{0,16}})\Z",
    re.ASCII,
)
_AFTER = re.compile(
    rf"(?P<open>[ \t(\[*_:=–—-]{{0,8}}\n?[ \t(\[*_]{{0,8}}){_LABEL}(?P<close>[)\]*_]{{0,4}})"
    r"(?P<rest>[.,;]?\s{0,8}\Z|[.,;]?[ \t]{0,8}\n)?",
    re.ASCII,
)
_MARK = re.compile(
    r"(?:(?P<line>^[ \t>*_#-]{0,8})|(?<=\s))(?:(?:option|choice)[ \t]{1,4})?(?P<open>[(\[]?)"
    r"(?P<letter>[A-Za-z])(?:(?P<close>[).:\]]{1,3})[*_]{0,2}\s{0,8}|(?P<dash>[ \t]{1,4}(?:[|–—-][ \t]{1,4})?))(?=\S)",
    re.IGNORECASE | re.MULTILINE | re.ASCII,
)
_NUMBER = r"([0-9]{1,2}|zero|one)"
_COUNTED_FROM = re.compile(
    rf"\b(?:count|number|ind(?:ex|ic)|label)\w{{0,5}}\b[^.?!\n]{{0,20}}?\b(?:from|(?:start|begin|beginn)(?:s|ing)?\s(?:at|from|with))\s{{1,3}}{_NUMBER}\b"
    rf"|\b(?:start|begin|beginn)(?:ing|s)?\s(?:(?:counting|numbering|indexing)\s(?:at|from|with)|at|from)\s{{1,3}}{_NUMBER}\b|\b{_NUMBER}[ -]?(?:indexed|based)\b"
    rf"|\bfirst\s(?:image|picture|photo|one)\s(?:is|has|as)\s[^.?!\n]{{0,20}}?(?:number|index|image|picture|position)\s{{1,3}}{_NUMBER}\b",
    re.IGNORECASE | re.ASCII,
)
_BACKWARDS = re.compile(
    r"\b(?:count|number|ind(?:ex|ic))\w{0,5}\b[^.?!\n]{0,40}?\b(?:backwards?|in reverse|right to left|from (?:the )?(?:end|right|back|last|bottom))\b",
    re.IGNORECASE,
)
_NUMBER_OF_OPTION = re.compile(
    r"\bnumber of (?:the|that|this) (?:\w+ )?(?:candidate|option|choice)\b|\b(?:candidate|option|choice) number\b",
    re.IGNORECASE,
)
_LISTED = r"\s{0,3}(?:,|/|\bor\b|\band\b|,\s{0,3}or\b|,\s{0,3}and\b)\s{0,3}"
_SAYS = r"(?:=|:|->|→|\b(?:for|if|when|means?|meaning|stands?\s+for|denotes?|represents?|corresponds?\s+to|refers?\s+to|is)\b)"
_QUOTED = r"['\"(\[]?(?P<code>[0-9]{1,2}|[A-Z])['\")\]]?"
_CODE = re.compile(
    rf"(?<![\w'.-]){_QUOTED}\s{{0,3}}{_SAYS}\s{{1,3}}"
    rf"(?P<said>(?:(?!\b(?:and|or)\s+['\"(\[]?(?:[0-9]{{1,2}}|[A-Z])['\")\]]?\s{{0,3}}{_SAYS}\s)[^,;.?!\n<]){{2,120}})",
    re.ASCII,
)
_LONGEST = 500  # Characters of a last option without a line's end.
_WORD = re.compile(r"[^\W_]")
_JOINING = re.compile(r"\b(?:and|or)\b", re.IGNORECASE | re.ASCII)
_TOKEN = re.compile(r"[^\W_]+|[<>=≠→]")
_EMPTY_WORD = re.compile(rf"(?:the|number|no|{NOUN})\Z", re.IGNORECASE | re.ASCII)
_NUMBERED = re.compile(
    r"(?:^|(?<=[\s>]))[(\[]?(1|2)[).\]]{1,2}[ \t]{1,8}(?=[^\s<])", re.MULTILINE | re.ASCII
)


@dataclass(frozen=True, slots=True)
class SlotLabels:
    """What labels the slots of a text: number `start` + k the slot `numbers[k]`, letter k `letters[k]`.

    `spans` are where the labels stand, `nouns` the words before them. `ambiguous` are words that are labels by one reading
    only; `conflicts` says of which kind ("number", "letter") some would name another slot than counting does.
    """

    numbers: tuple[int, ...]
    start: int
    letters: tuple[int, ...]
    nouns: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    ambiguous: tuple[str, ...]
    conflicts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Label:
    slot: int
    name: str
    noun: str
    span: tuple[int, int]
    strong: bool
    """It has a noun and stands as labels do: at the start of a line, or before a colon or a bracket."""


def slot_labels(text: str) -> SlotLabels:
    """The labels of a text's slots: the one row that fits, or of two the only one that covers all slots."""
    parts = text.split(IMAGE_SLOT)
    count = len(parts) - 1
    before, after = list(_labels_before(parts)), list(_labels_after(parts))
    named: list[tuple[int, ...]] = []
    ambiguous: list[str] = []
    conflicts: list[str] = []
    spans: set[tuple[int, int]] = set()
    nouns: set[str] = set()
    start = 1
    for digits in (True, False):
        rows = [[x for x in row if x.name.isdigit() == digits] for row in (before, after)]
        fitting = [
            row for i, row in enumerate(rows) if _runs(row, count) and _covers(row, parts, i)
        ]
        whole = [row for row in fitting if len(row) == count]
        fitting = whole if len(whole) == 1 else fitting
        chosen = fitting[0] if len(fitting) == 1 else []
        named.append(tuple(x.slot for x in sorted(chosen, key=lambda x: _index(x.name))))
        spans.update(x.span for x in chosen)
        nouns.update(x.noun for x in chosen)
        if digits and chosen:
            start = min(_index(x.name) for x in chosen) + 1
        left = [[x for x in row if x.span not in spans] for row in rows]
        loose = [
            row
            if not chosen and (_runs(row, count) or _repeats(row) or len(row) == count > 1)
            else [x for x in row if x.strong]
            for row in left
        ]
        ambiguous += [" ".join(text[slice(*x.span)].split()) for row in loose for x in row]
        tellable = [row for row in loose if len(row) > 1 or (row and _index(row[0].name) <= 0)]
        if not chosen and any(x.slot != _index(x.name) for row in tellable for x in row):
            conflicts.append("number" if digits else "letter")
    return SlotLabels(
        numbers=named[0],
        start=start,
        letters=named[1],
        nouns=tuple(sorted(nouns - {""})),
        spans=tuple(sorted(spans)),
        ambiguous=tuple(dict.fromkeys(ambiguous)),
        conflicts=tuple(conflicts),
    )


def _labels_before(parts: Sequence[str]) -> Iterator[_Label]:
    offset = 0
    for slot, part in enumerate(parts[:-1]):
        tail = part[-80:]
        end = offset + len(part)
        if match := _BEFORE.search(tail):
            lead = tail[: match.start()].rstrip(" \t([*_#->")
            starts = not lead or lead.endswith("\n")
            name, close = match["tag"] or match["name"], match["close"]
            noun = bool(match["noun"] or match["tag"])
            marked = bool(re.search(r"[:)\]=(\[–—-]|\bis\b", close, re.I | re.ASCII))
            sentence = bool(re.search(r"\.\s*\n", close)) and not starts
            # "a <image>" holds an article, and "these 2 <image>" a count.
            plain = name.islower() or name.isdigit()
            bare = not noun and plain and not re.match(r"[).:\]]", close)
            if not sentence and not bare:
                start = end - len(tail) + match.start()
                span = (start, end - len(close))
                word = _noun_of(match)
                yield _Label(slot, name.upper(), word, span, noun and (starts or marked))
        offset = end + len(IMAGE_SLOT)


def _labels_after(parts: Sequence[str]) -> Iterator[_Label]:
    offset = len(parts[0]) + len(IMAGE_SLOT)
    for slot, part in enumerate(parts[1:]):
        match = _AFTER.match(part)
        if match and not _heads_next(match, part, slot == len(parts) - 2):
            name, noun = match["tag"] or match["name"], bool(match["noun"] or match["tag"])
            closed = match["close"] and re.search(r"[(\[]", match["open"])
            if closed or (match["rest"] is not None and (noun or not name.islower())):
                start = offset + match.end("open")
                end = offset + (match.end("tag") + 1 if match["tag"] else match.end("name"))
                yield _Label(slot, name.upper(), _noun_of(match), (start, end), noun)
        offset += len(part) + len(IMAGE_SLOT)


def _heads_next(match: re.Match[str], part: str, last: bool) -> bool:
    """Whether a label behind a slot is rather that of the next, by a colon or its place in the lines."""
    rest = part[match.end("close") :]
    in_next_line = "\n" in match["open"] and "\n" not in rest and not last
    return in_next_line or bool(re.match(r"\s*[:=]|\s+is\b", rest))


def _index(name: str) -> int:
    return int(name) - 1 if name.isdigit() else LETTERS.index(name)


def _noun_of(match: re.Match[str]) -> str:
    return re.sub(r"[^a-z]", "", (match["noun"] or "").lower())


def _runs(row: Sequence[_Label], count: int) -> bool:
    """Whether the names are 1, 2, ... or A, B, ..., at least two where there are two slots.

    Numbers that label all slots may run from another one on.
    """
    if len(row) < max(1, min(2, count)):
        return False
    places = sorted(_index(x.name) for x in row)
    first = places[0] if len(row) == count > 1 and row[0].name.isdigit() else 0
    return places == list(range(first, first + len(row)))


def _repeats(row: Sequence[_Label]) -> bool:
    """Whether the names begin anew, as in the turns of a chat."""
    names = {x.name for x in row}
    return 1 < len(names) < len(row) and bool(names & {"1", "A"})


def _covers(row: Sequence[_Label], parts: Sequence[str], after: int) -> bool:
    """Whether no slot without a label stands bare beside one with a label, on its far side."""
    own = {x.slot for x in row}
    step = 1 if after else -1
    return all(
        slot in own or slot + step not in own or re.search(r"\w", parts[slot + after])
        for slot in range(len(parts) - 1)
    )


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `text[start:end]` is what it says; its letter stands at `mark`."""

    letter: str
    start: int
    end: int
    text: str
    mark: int


def find_options(text: str) -> tuple[list[Option], list[Option]]:
    """The options of a text that are words, and those that hold images: of each the longest run, of equal
    ones the last; empty if there is none."""
    found = _option_runs(text)
    pictured = [run for run in found if any(IMAGE_SLOT in option.text for option in run)]
    in_words = [run for run in found if run not in pictured]
    return max(in_words, key=len, default=[]), max(pictured, key=len, default=[])


def only_options(text: str) -> dict[str, str]:
    """The options in words that a text lists, by letter, if it has no other list by letters; else empty."""
    found = _option_runs(text)
    if len(found) != 1 or any(IMAGE_SLOT in option.text for option in found[0]):
        return {}
    return {option.letter: option.text for option in found[0]}


def _option_runs(text: str) -> list[list[Option]]:
    """The lists of options, the last one first: A, B, ... in one style, each with words of its own or an image."""
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
    found = [_options(text, run) for run in reversed(runs) if len(run) > 1]
    return [run for run in found if all(_says(option.text) for option in run)]


def option_lines(text: str) -> dict[str, str]:
    """The options of a multiple-choice question, by letter; empty if there are no two of them.

    Options in words count before options that are images.
    """
    in_words, pictured = find_options(text)
    return {option.letter: option.text for option in in_words or pictured}


def numbers_its_options(text: str) -> bool:
    """Whether a text lists options as `1.`, `2.`, whose numbers may be taken for those of images."""
    return {match[1] for match in _NUMBERED.finditer(text)} == {"1", "2"}


def first_numbers(text: str, count: int) -> set[int]:
    """What a text says that the numbers of its images count from: {0} for "0-indexed", or for "answer 0, 1 or 2" over three
    images."""
    said = [next(filter(None, groups)).lower() for groups in _COUNTED_FROM.findall(text)]
    found = {0 if number == "zero" else value_of(number) for number in said}
    listed = _LISTED.join(map(str, range(count)))
    to_last = rf"0\s{{0,3}}(?:-|–|to|and|through)\s{{0,3}}{count - 1}"
    if count > 1 and re.search(rf"(?<![\w.])(?:{listed}|{to_last})(?!\w|\.[0-9])", text):
        found.add(0)
    for first in range(2, 10) if count > 1 else ():
        listed = _LISTED.join(map(str, range(first, first + count)))
        if re.search(
            rf"\b(?:answer|reply|respond)\b[^.?!\n]{{0,20}}(?<![\w.]){listed}(?!\w|\.[0-9])",
            text,
            re.I,
        ):
            found.add(first)
    return found


def counts_backwards(text: str) -> bool:
    """Whether a text says that its images are counted from the end."""
    return bool(_BACKWARDS.search(text))


def counts_options(text: str) -> bool:
    """Whether a text asks for the number of one of its candidates, which need not be that of the image."""
    return bool(_NUMBER_OF_OPTION.search(text))


def find_codes(text: str) -> list[Option]:
    """Numbers and letters that a sentence says the meaning of, as in "answer 1 for the first image and 2 for the second
    image"; a code may be there twice."""
    found = []
    for match in _CODE.finditer(text):
        said, start = match["said"].rstrip(), match.start("said")
        found.append(
            Option(match["code"].upper(), start, start + len(said), said, match.start("code"))
        )
    return found


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


def _options(text: str, run: Sequence[re.Match[str]]) -> list[Option]:
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
        out.append(Option(mark["letter"].upper(), start, start + len(said), said, mark.start()))
    return out


def _says(text: str) -> bool:
    return bool(_WORD.search(_JOINING.sub(" ", text)))


def _words(text: str) -> list[str]:
    return [w for w in _TOKEN.findall(text.casefold()) if not _EMPTY_WORD.match(w)]
