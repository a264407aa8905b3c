"""What a multi-image question says about its images: where they stand, what is named, in which words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from perl.permutation import Lettering, Mention, lettering, mentions, option_lines, text_of
from perl.types import IMAGE_SLOT, Example

Slots = tuple[int, ...]

NOUN = r"(?:images?|pictures?|photos?|photographs?|figures?|panels?)"
_ORDINAL = (
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|last|[0-9]{1,2}(?:st|nd|rd|th))"
)
_SIDE = r"(?:left|right|top|bottom|upper|lower|middle|cent(?:er|re|ral))(?:-?most|-?hand)?"

# A sentence on the form of the answer says nothing about the images.
_INSTRUCTION = re.compile(
    r"(?:\A|(?<=[.?!\n]))[^.?!\n]*(?:\\boxed|<think>|step by step|final answer|answer (?:with|using)|internal monologue|"
    r"reasoning process|option'?s letter|letter (?:of|from) the)[^.?!\n]*[.?!]?",
    re.IGNORECASE,
)
_SLOT_LABEL = re.compile(
    rf"(?:\b(?:{NOUN}|img|option|choice|candidate)\s*[#_-]?\s*)?[(\[]?\b(?:[A-Z]|[0-9]{{1,2}})\b"
    rf"[).:\]\s-]*(?={IMAGE_SLOT})",
    re.IGNORECASE,
)
_BETWEEN = re.compile(
    rf"(?:[\s,;:.()\[\]|/&#*_-]|\b(?:and|or|vs|versus|the|{NOUN}|img|option|choice|candidate|"
    rf"{_ORDINAL}|[A-Z]|[0-9]{{1,2}})\b)*",
    re.IGNORECASE,
)
_JOINED = re.compile(rf"(?:[\s,&]|\b(?:and|or|vs|versus|the|{NOUN})\b)*", re.IGNORECASE)
_BARE = re.compile(
    rf"(?:[\s().,#:'\"_<>-]|\b(?:the|only|{NOUN}|img|one|number|no)\b)*", re.IGNORECASE
)
# Words of time or sequence.
SEQUENCE = re.compile(
    r"\b(?:next|before|after|afterwards|then|earlier|later|latest|previous|previously|preceding|"
    r"consecutive|successive|sequence|sequential|chronological(?:ly)?|order(?:ed|ing)?|video|frames?|"
    r"clip|footage|time-?lapse|timeline|steps?|story|storyboard|happen(?:s|ed|ing)?|chang(?:e|es|ed|ing)|"
    r"becom(?:e|es|ing)|became|(?:dis)?appear(?:ed|ing)|remov(?:ed|ing)|add(?:ed|ing)|missing|"
    r"mov(?:e|es|ed|ing)|movement|motion|camera|transition|progress(?:ion|es|ed)?|initial(?:ly)?|respectively|"
    r"final(?:ly)?|beginning|result(?:s|ed|ing)?|edit(?:s|ed|ing)?|turn(?:s|ed) into)\b",
    re.IGNORECASE,
)
_PLACE = re.compile(
    rf"\b{_SIDE}\s+(?:{NOUN}|one|side)\b"
    rf"|\b(?:{NOUN}|one|shown|side)\s+(?:on|to|at|in)\s+(?:the\s+)?(?:far\s+)?{_SIDE}(?!\s+of\b)"
    rf"|\b(?:{NOUN}|shown)\s+(?:above|below)\b|\b(?:above|below)\s+{NOUN}\b|\b(?:former|latter)\b"
    rf"|\b{NOUN}\s+(?:one|two|three|four|five|six|(?-i:[ivx]+|[IVX]+|[b-h]))\b|\b{NOUN}\s+(?-i:a)\s*[,.;:?)]"
    rf"|\b(?:adjacent|neighbou?ring)\b|\bother\s+(?:one\s+)?on\s+the\b",
    re.IGNORECASE,
)
_NAKED_ORDINAL = re.compile(rf"\bthe\s+{_ORDINAL}\b(?:\s+ones?\b)?", re.IGNORECASE)
# "The image", though there are several.
SINGULAR = re.compile(
    r"\b(?:the|this)\s+(?:image|picture|photo|photograph|figure)\b"
    r"(?!\s+(?:that|which|where|whose|with|without|of|in which|on which|showing|containing|depicting|most|least))",
    re.IGNORECASE,
)
# Words for the images together.
TOGETHER = re.compile(
    r"\b(?:images|pictures|photos|photographs|figures|panels|both|all|any|each|every|these|they|them|two|"
    r"three|four|five|six|same|common|total|altogether|alike|either|neither|none)\b",
    re.IGNORECASE,
)
ASKS_WHICH = re.compile(
    rf"\b(?:which|what)\s+(?:(?:of|one|ones|other|two|among|the|these|those|following|all|candidate|option)\s+)*"
    rf"(?:{NOUN}|one\b|ones\b|candidate|option)"
    rf"|\b(?:choose|select|pick|find|identify|name|point out|give the number of)\s+(?:(?:all|the|an?|one|of|these|other)\s+)*"
    rf"(?:{NOUN}|one\b|candidate|option)|\band which\b",
    re.IGNORECASE,
)
COUNTS = re.compile(r"\b(?:how many|number of|how often|count)\b", re.IGNORECASE)
ARRANGES = re.compile(
    r"\b(?:order|sequence|chronological(?:ly)?|arrange|sort|rank|rearrange|earliest|oldest|sequential)",
    re.IGNORECASE,
)
# Words for one image that is unlike the others, such as a reference.
SPECIAL = re.compile(
    r"\b(?:reference|query|anchor|template|prototype|original|(?:source|target|given|main|test) (?:image|picture|photo))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """One example's text, taken apart. Slots are 0-based."""

    example: Example

    @property
    def count(self) -> int:
        return len(self.example.images)

    @cached_property
    def text(self) -> str:
        asked = "\n".join(m.content for m in self.example.messages if m.role != "system")
        return _INSTRUCTION.sub(" ", asked)

    @cached_property
    def letters(self) -> Lettering:
        """What letters name if all images may move."""
        return lettering(self.example, tuple(range(self.count)))

    @cached_property
    def labelled(self) -> Slots:
        """Slots that carry a letter as their label."""
        return tuple(sorted(self.letters.slots)) if self.letters.source == "slots" else ()

    @cached_property
    def options(self) -> dict[str, str]:
        """The options that are text, by letter; none where images are the options."""
        options = option_lines(text_of(self.example))
        return {} if any(IMAGE_SLOT in line for line in options.values()) else options

    @cached_property
    def stem(self) -> str:
        """The question without its options and without the labels of slots."""
        text = _SLOT_LABEL.sub(" ", self.text)
        for letter, line in self.options.items():
            text = re.sub(rf"[(\[]?\b{letter}[).:\]]+\s+{re.escape(line)}", " ", text)
        return text.replace(IMAGE_SLOT, " ")

    @cached_property
    def runs(self) -> tuple[Slots, ...]:
        """Slots in groups that follow each other with nothing but labels between."""
        _, *between = self.text.split(IMAGE_SLOT)
        groups: list[list[int]] = [[0]]
        for slot, text in enumerate(between[:-1], start=1):
            if _BETWEEN.fullmatch(text):
                groups[-1].append(slot)
            else:
                groups.append([slot])
        return tuple(tuple(group) for group in groups)

    def named(self, text: str, letters: Slots | None = None) -> list[Mention]:
        """Mentions of images in a part of the text; `letters` are the slots that letters name."""
        names = self.letters.in_answers
        return mentions(text, names if letters is None else replace(names, letters=letters))

    @cached_property
    def spoken_of(self) -> Slots:
        """Slots that the question itself names apart from others.

        A list of all images, or of all those that the options name, sets none of them apart: "which of
        the second and third image".
        """
        groups: list[list[Mention]] = []
        for mention in self.named(self.stem):
            last = groups[-1][-1] if groups else None
            if last and _JOINED.fullmatch(self.stem[last.end : mention.start]):
                groups[-1].append(mention)
            else:
                groups.append([mention])
        optional = {self.bare(line) for line in self.options.values()} - {None}
        alike = (set(range(self.count)), optional)
        named = [{mention.slot for mention in group} for group in groups]
        return tuple(sorted(set().union(*(slots for slots in named if slots not in alike))))

    def bare(self, text: str) -> int | None:
        """The one slot that a text names, if it says nothing else: `Image 2`, `the second picture`."""
        found = self.named(text)
        if len(found) != 1:
            return None
        rest = text[: found[0].start] + text[found[0].end :]
        return found[0].slot if _BARE.fullmatch(rest) else None

    def asks(self, pattern: re.Pattern[str]) -> bool:
        """Whether the question itself has words of a kind: `asks(COUNTS)`."""
        return bool(pattern.search(self.stem))

    def words(self, pattern: re.Pattern[str]) -> str:
        """The first match in question or options, in lower case; empty if there is none."""
        match = pattern.search("\n".join([self.stem, *self.options.values()]))
        return " ".join(match[0].lower().split()) if match else ""

    @property
    def place(self) -> str:
        """Words for an image by its place, which no rewriting follows."""
        if found := self.words(_PLACE):
            return found
        # "The first" without a noun behind it; the mentions with one are known.
        parts = [self.stem, *self.options.values()]
        for part in parts:
            known = self.named(part)
            for match in _NAKED_ORDINAL.finditer(part):
                if not any(
                    match.start() <= m.start < match.end() or m.start <= match.start() < m.end
                    for m in known
                ):
                    return match[0].lower()
        return ""
