"""Reading a benchmark's texts: which option or value a completion answers with, and where a question shows its images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from perl.permutation import LETTERS
from perl.rewards.math import equal_values
from perl.rewards.reading import letters_in, marked, said
from perl.rewards.reading.notation import WRAPPED
from perl.types import IMAGE_SLOT

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_IMAGE = re.compile(
    rf"(?:the\s+)?(?:({'|'.join(_ORDINALS)})\s+(?:image|picture|photo)|(?:image|picture)\s*([0-9]{{1,2}}))\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s*[(\[]?([A-Z])[)\].:]\s*")


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer read out of a completion, None where there is none to be read, and its score from 0 to 1."""

    answer: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a completion answers with: its last `<answer>` block, else its last `\\boxed{}`, else what follows its thinking."""

    text: str
    marked: bool

    @classmethod
    def of(cls, completion: str) -> Reply:
        answer = marked(completion)
        if answer is None:
            return cls(completion.rpartition("</think>")[2].strip(), False)
        return cls(" ".join(WRAPPED.sub(r"\1", answer).split()), True)

    @property
    def value(self) -> str:
        """The free answer: all of a box, else what the text says that it is."""
        return self.text if self.marked else said(self.text)


def judge_option(
    reply: Reply, right: str | None, options: Sequence[str], count: int | None = None
) -> Judgement:
    """The option that a reply chooses, against the letter of the right one; see `option_letter`.

    `count` is how many options there are, where the data does not list them.
    """
    letter = option_letter(reply, options, count)
    return Judgement(letter, float(letter is not None and letter == right))


def judge_value(reply: Reply, gold: str, digits: int = 6) -> Judgement:
    """A free answer of mathematics, compared by `equal_values` to `digits` after the point."""
    right = bool(reply.value) and equal_values(reply.value, gold, digits=digits)
    return Judgement(reply.value or None, float(right))


def option_letter(reply: Reply, options: Sequence[str], count: int | None = None) -> str | None:
    """The one letter that a reply chooses (`perl.rewards.reading.letters`); None if it chooses none or several."""
    number = count or len(options)
    letters = letters_in(reply.text, number, options, whole=not reply.marked)
    return letters if letters and len(letters) == 1 else None


def without_label(option: str) -> str:
    """An option's text without a leading letter: `"(A) the first image"` gives `"the first image"`."""
    return _LABEL.sub("", option, count=1).strip() if _LABEL.match(option) else option.strip()


def labelled(options: Sequence[str]) -> str:
    """One line `(A) text` for each option."""
    return "\n".join(f"({letter}) {o}" for letter, o in zip(LETTERS, options, strict=False))


def image_kind(question: str, options: Sequence[str], count: int) -> str:
    """The `kind` of a question over `count` images; unless it is "none", the answer follows its image.

    The images may move where every option names one of them, in their sequence, those are the last of all, and
    the question (without its options) mentions none of them but all at once ("the second or the third image"): then the right
    letter follows its image. Everything else keeps its order.

    Example: `image_kind("Which is real?", ["the first image", "the second image"], 2) == "all"`.
    """
    matches = [_IMAGE.fullmatch(without_label(o).rstrip(".").strip()) for o in options]
    first = count - len(options)
    named = [_slot(match) if match else None for match in matches]
    if len(options) < 2 or first < 0 or named != list(range(first, count)):
        return "none"
    each = (rf"(?:the )?{name}(?: image)?" for name in _ORDINALS[first:count])
    alike = re.sub(r"(?:,| or|, or| and|, and) ".join(each), "", question, flags=re.IGNORECASE)
    if any(_slot(match) >= first for match in _IMAGE.finditer(alike)):
        return "none"
    return "all" if first == 0 else f"last:{len(options)}"


def numbered_slots(text: str, mark: str, count: int) -> tuple[str, tuple[int, ...]]:
    """The text with a slot where each image is first marked, and the 0-based images in the sequence of their slots.

    `mark` is a pattern whose first group is the image's number from 1, as `<image_([0-9]+)>`. A later mark of an
    image becomes the words "image k"; an image without a mark stands before the text; a mark of an image that is
    not there is left as it is.

    Example: `numbered_slots("<image2> or <image1>?", "<image([0-9])>", 3) == ("<image><image> or <image>?", (2, 1, 0))`.
    """
    seen: list[int] = []

    def slot(match: re.Match[str]) -> str:
        image = int(match[1]) - 1
        if not 0 <= image < count:
            return match[0]
        if image in seen:
            return f"image {image + 1}"
        seen.append(image)
        return IMAGE_SLOT

    text = re.sub(mark, slot, text)
    before = [image for image in range(count) if image not in seen]
    return IMAGE_SLOT * len(before) + text, (*before, *seen)


def _slot(match: re.Match[str]) -> int:
    return _ORDINALS.index(match[1].lower()) if match[1] else int(match[2]) - 1
