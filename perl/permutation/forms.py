"""What kind of list an answer is, by what the question asks for."""

from __future__ import annotations

import re
from typing import Literal

from perl.permutation.answers import text_of
from perl.types import Example

AnswerForm = Literal["set", "sequence", "values"]

_SEQUENCE = re.compile(
    r"\b(?:in (?:what|which|the (?:right|correct|proper)) (?:order|sequence)|order|sequence|chronological(?:ly)?|"
    r"arrange|rearrange|sort|rank|first to last|(?:earliest|oldest|smallest|largest|shortest|tallest) to)\b",
    re.IGNORECASE,
)
_VALUES = re.compile(
    r"\b(?:for|of) (?:each|every) (?:image|picture|photo|figure|panel)\b|\bin turn\b|\brespectively\b",
    re.IGNORECASE,
)
_SET = re.compile(
    r"\b(?:which|what|select|name|list|find|identify|choose|pick)\b[^.?!\n]{0,40}\b(?:images|pictures|photos|photographs|"
    r"figures|panels|options|ones|two|all)\b",
    re.IGNORECASE,
)


def answer_form(example: Example) -> AnswerForm | None:
    """What a list in the gold answer is: a `set` of images in any sequence, a `sequence`, or one of the `values` of each
    image in turn; None where the question does not say.

    Example: "Which images show a bicycle?" asks for a set, "In which order were they taken?" for a sequence.
    """
    text = text_of(example)
    if _VALUES.search(text):
        return "values"
    if _SEQUENCE.search(text):
        return "sequence"
    return "set" if _SET.search(text) else None
