"""What a multi-image question says about its images: where they stand, what is named, in which sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from perl.data.labelling.grammar import NAMED
from perl.permutation import LETTERS, mentions, names_in_answers, plan_of, text_of
from perl.permutation.layout import Option, SlotLabels, find_options, images_in, slot_labels
from perl.permutation.references import NOUN, OTHER_NOUN
from perl.types import IMAGE_SLOT, Example, Mention, Plan

Slots = tuple[int, ...]

_NOUN = rf"(?:{NOUN}|{OTHER_NOUN}|option|choice)"
_BETWEEN = re.compile(
    rf"(?:[\s,;:.()\[\]|/&#*_=>-]|\b(?:and|or|vs|versus|the|is|{_NOUN})\b)*", re.IGNORECASE
)
_AROUND = re.compile(
    rf"(?:\bthe\s+)?(?:\b{_NOUN}[\s#_-]*)?{NAMED}(?:\s+{_NOUN}\b)?(?:(?:,\s*|,?\s+and\s+){NAMED}(?:\s+{_NOUN}\b)?)*",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"\b(?:caption|description|text|title|sentence|prompt|phrase|words?|says|saying|reading|reads|titled)s?\b\s{0,3}:?\s{0,3}"
    r"(?P<quoted>[\"“”][^\"“”\n]{1,300}[\"“”]|'[^'\n]{1,300}'(?!\w))"
    r"|\b(?:caption|description|text|title|prompt)\s{0,3}:\s{0,3}(?P<said>[^\n?]{1,300}?)(?=\.?\s*(?:\n|\?|\Z|<image>))",
    re.IGNORECASE,
)
"""What is said in an image, or of one alone: none of its words is about the others."""
_SLOT = "\1"


@dataclass(frozen=True)
class Question:
    """One example's text, taken apart, as if all its images might move. Slots are 0-based."""

    example: Example

    @property
    def count(self) -> int:
        return len(self.example.images)

    @cached_property
    def plan(self) -> Plan:
        return plan_of(replace(self.example, kind="all", should_change=True))

    @cached_property
    def labelled(self) -> Slots:
        """Slots that carry a letter as their label, or else a number."""
        return tuple(sorted(self.plan.letters if self.plan.lettered else self._labels.numbers))

    @cached_property
    def _labels(self) -> SlotLabels:
        return slot_labels(text_of(self.example))

    @cached_property
    def options(self) -> dict[str, str]:
        """The options that are text, by letter; none where images are the options."""
        return {option.letter: option.text for option in self._options[0]}

    @cached_property
    def _options(self) -> tuple[list[Option], list[Option]]:
        return find_options(text_of(self.example))

    @cached_property
    def _stem(self) -> str:
        """The text without system message, options and labels, and with a mark for each slot and each image that is named."""
        text = text_of(self.example)
        cut = list(self._labels.spans)
        in_words, pictured = self._options
        cut += [(option.mark, option.end) for option in in_words]
        cut += [(option.mark, option.start) for option in pictured]
        start = 0
        for message in self.example.messages:
            if message.role == "system":
                cut.append((start, start + len(message.content)))
            start += len(message.content) + 1
        text = _QUOTED.sub(_blank, text)
        marked = list(text)
        for mention in self.plan.mentions:
            marked[mention.start : mention.end] = NAMED + "\2" * (mention.end - mention.start - 1)
        for start, end in cut:
            marked[start:end] = "\n" * (end - start)
        return "".join(marked).replace("\2", "").replace(IMAGE_SLOT, _SLOT)

    @cached_property
    def runs(self) -> tuple[Slots, ...]:
        """Slots in groups that follow each other with nothing but labels between."""
        _, *between = self._stem.split(_SLOT)
        groups: list[list[int]] = [[0]]
        for slot, text in enumerate(between[:-1], start=1):
            if _BETWEEN.fullmatch(text):
                groups[-1].append(slot)
            else:
                groups.append([slot])
        return tuple(tuple(group) for group in groups)

    @property
    def ends_in_images(self) -> bool:
        """Whether its images stand behind the question, as options do."""
        return bool(_BETWEEN.fullmatch(self._stem.rpartition(_SLOT)[2]))

    @cached_property
    def sentences(self) -> list[str]:
        """The sentences without options, in lower case, a mark in place of every image that is named.

        What labels slots by another noun ("View A: <image>") is an image; where only letters do, a number or another letter
        names none.
        """
        text = _AROUND.sub(lambda match: " and ".join(NAMED * match[0].count(NAMED)), self._stem)
        for noun in self._labels.nouns:
            text = re.sub(rf"\b{noun}(s?)\b", r"image\1", text, flags=re.IGNORECASE)
        parts = (" ".join(part.lower().split()) for part in re.split(rf"[.?!:;\n{_SLOT}]+", text))
        if self.plan.lettered:
            others = (
                rf"(?<!['’])\b(?:[0-9.]+|[b-z])\b(?<![{LETTERS[: len(self.plan.letters)].lower()}])"
            )
            parts = (re.sub(others, "some", part) for part in parts)
        parts = (part.strip(" ,-–—()[]*#|/&=>_\"'") for part in parts)
        return [part for part in parts if part and not _BETWEEN.fullmatch(part)]

    def bare(self, letter: str) -> Slots:
        """The slots that an option names, if it says nothing else: `Image 2`, `the second picture`, `Images 1 and 3`."""
        said = self.plan.options[letter]
        words = {word for word in said if isinstance(word, str)}
        return tuple(sorted(images_in(said))) if words <= {"only", "it", "is", "<", ">"} else ()

    def named(self, text: str) -> list[Mention]:
        """The images that an option or an answer mentions."""
        return mentions(text, names_in_answers(self.plan, self.count))

    @cached_property
    def spoken_of(self) -> Slots:
        """Slots that the question itself names, outside its options."""
        stem = (
            m.slot
            for m in self.plan.mentions
            if not any(start <= m.start < end for start, end in self.plan.lines)
        )
        return tuple(sorted(set(stem)))


def _blank(match: re.Match[str]) -> str:
    said = match["quoted"] or match["said"]
    return match[0].replace(said, " " * len(said))
