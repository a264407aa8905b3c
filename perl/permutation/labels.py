"""What labels the `<image>` slots of a text: `Image 1: <image>`, `(A) <image>`, `<image> (Image 1)`.

A label belongs to its slot, whatever the slot shows. A row of labels counts if each stands directly
before its slot, or each directly after it, if it runs 1, 2, ... or A, B, ..., and if it leaves out no
slot between its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perl.permutation.references import LETTERS, LINK, NOUN
from perl.types import IMAGE_SLOT

_LABEL = (
    rf"(?:<image[ _-]?(?P<tag>[0-9]{{1,2}})>|(?P<noun>(?:{NOUN}|(?i:option|choice|candidate))"
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


@dataclass(frozen=True, slots=True)
class SlotLabels:
    """What labels the slots of a text: number k + 1 the slot `numbers[k]`, letter k `letters[k]`.

    `spans` are where the labels stand. `doubtful` are words that are labels by one reading only;
    `conflicts` says of which kind ("number", "letter") some would name another slot than counting does.
    """

    numbers: tuple[int, ...]
    letters: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    doubtful: tuple[str, ...]
    conflicts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Label:
    slot: int
    name: str
    span: tuple[int, int]
    strong: bool
    """It has a noun and stands as labels do: at the start of a line, or before a colon or a bracket."""


def slot_labels(text: str) -> SlotLabels:
    """The labels of a text's slots: the one row that fits, or of two the only one that covers all slots."""
    parts = text.split(IMAGE_SLOT)
    count = len(parts) - 1
    before, after = list(_labels_before(parts)), list(_labels_after(parts))
    named: list[tuple[int, ...]] = []
    doubtful: list[str] = []
    conflicts: list[str] = []
    spans: set[tuple[int, int]] = set()
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
        left = [[x for x in row if x.span not in spans] for row in rows]
        loose = [
            row if _runs(row, count) and not chosen else [x for x in row if x.strong]
            for row in left
        ]
        doubtful += [" ".join(text[slice(*x.span)].split()) for row in loose for x in row]
        tellable = [row for row in loose if len(row) > 1 or (row and _index(row[0].name) == 0)]
        if not chosen and any(x.slot != _index(x.name) for row in tellable for x in row):
            conflicts.append("number" if digits else "letter")
    return SlotLabels(
        numbers=named[0],
        letters=named[1],
        spans=tuple(sorted(spans)),
        doubtful=tuple(dict.fromkeys(doubtful)),
        conflicts=tuple(conflicts),
    )


def labelled_numbers(text: str) -> tuple[int, ...]:
    """The 0-based slots that carry the numbers 1, 2, ... as labels; empty where the text numbers none.

    Example: in `"Query: <image> Image 1: <image> Image 2: <image>"` number 1 names slot 1.
    """
    return slot_labels(text).numbers


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
                yield _Label(slot, name.upper(), span, noun and (starts or marked))
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
                yield _Label(slot, name.upper(), (start, end), noun)
        offset += len(part) + len(IMAGE_SLOT)


def _heads_next(match: re.Match[str], part: str, last: bool) -> bool:
    """Whether a label behind a slot is rather that of the next, by a colon or its place in the lines."""
    rest = part[match.end("close") :]
    in_next_line = "\n" in match["open"] and "\n" not in rest and not last
    return in_next_line or bool(re.match(r"\s*[:=]|\s+is\b", rest))


def _index(name: str) -> int:
    return int(name) - 1 if name.isdigit() else LETTERS.index(name)


def _runs(row: Sequence[_Label], count: int) -> bool:
    """Whether the names are 1, 2, ... or A, B, ..., at least two where there are two slots."""
    return (
        len(row) >= min(2, count)
        and len(row) > 0
        and sorted(_index(x.name) for x in row) == list(range(len(row)))
    )


def _covers(row: Sequence[_Label], parts: Sequence[str], after: int) -> bool:
    """Whether no slot without a label stands bare beside one with a label, on its far side."""
    own = {x.slot for x in row}
    step = 1 if after else -1
    return all(
        slot in own or slot + step not in own or re.search(r"\w", parts[slot + after])
        for slot in range(len(parts) - 1)
    )
