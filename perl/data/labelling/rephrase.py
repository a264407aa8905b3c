"""Open-ended questions made into multiple choice by a language model, and the checks on what it returns.

The paper's first step with its data: a choice among images can be checked and followed when images
move, a free answer cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl.data.labelling.llm import ask_twice, json_object
from perl.llm import Endpoint, EndpointError
from perl.permutation.answers import lettering, named_images, option_lines, text_of
from perl.rewards.answers import normalise
from perl.types import IMAGE_SLOT, Example, Message

TYPES = ("ReferenceComparison", "Other")
_MAX_TOKENS = 2048

_TASK = """\
Rewrite an open-ended question about {count} images as a multiple-choice question with one right option. The \
images fill the <image> slots in sequence.

Rules:
- The new question holds exactly {count} <image> slots; the k-th slot is still the k-th image.
- If the answer names one of the images, make the images the options, each behind a letter: "A. <image>".
- Otherwise write two to six short text options, each on its own line behind a letter; one of them is \
the given answer word for word, and the others are wrong but plausible.
- Letters run A, B, C, ... without a gap. "answer" is the letter of the right option.
- Ask the same thing; add nothing and give nothing away.

"question_type" is "ReferenceComparison" if options are compared with a reference image in the question, else \
"Other".

Reply with one JSON object and nothing else:
{{"question": "...", "answer": "B", "question_type": "ReferenceComparison" or "Other"}}

Question:
{question}

Answer: {answer}
"""


@dataclass(frozen=True, slots=True)
class Rephrased:
    """A multiple-choice question in place of an open one; `answer` is a letter."""

    question: str
    answer: str
    question_type: str


def is_open(example: Example) -> bool:
    """Whether a question over several images has no options: neither in words nor labelled images."""
    only_asked = all(message.role in ("system", "user") for message in example.messages)
    counted = tuple(range(len(example.images)))
    options = option_lines(text_of(example))
    return (
        len(example.images) > 1
        and only_asked
        and sum(message.role == "user" for message in example.messages) == 1
        and not options
        and lettering(example, counted).source == "count"
    )


def rephrase(
    examples: Sequence[Example], endpoint: Endpoint
) -> list[Rephrased | str | EndpointError]:
    """For each open question its multiple-choice form, or why it keeps its own.

    An EndpointError stands where the endpoint is down or refuses everything.
    """
    tasks = [
        _TASK.format(
            count=len(example.images), question=_asked(example).content, answer=example.answer
        )
        for example in examples
    ]
    return ask_twice(endpoint, tasks, lambda i, said: _read(said, examples[i]), str, _MAX_TOKENS)


def _asked(example: Example) -> Message:
    return next(message for message in example.messages if message.role == "user")


def _read(said: str, example: Example) -> Rephrased:
    """Raises ValueError for what is no multiple choice, or asks for something else."""
    value = json_object(said)
    question, answer, kind = (value.get(key) for key in ("question", "answer", "question_type"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("question and answer must be texts")
    if kind not in TYPES:
        raise ValueError(f"question_type must be {' or '.join(TYPES)}")
    count = len(example.images)
    if question.count(IMAGE_SLOT) != count:
        raise ValueError(f"{question.count(IMAGE_SLOT)} {IMAGE_SLOT} slots for {count} images")
    letter = answer.strip().strip("().").upper()
    new = replace(example, question=question, answer=letter)
    counted = tuple(range(count))
    letters, options = lettering(new, counted), option_lines(question)
    if letters.source == "slots":
        named = named_images(letter, count, letters.slots)
        before = named_images(example.answer, count, counted)
        if named is None:
            raise ValueError(f"the answer '{answer}' is none of the options")
        if before != named:
            raise ValueError(f"option {letter} is not the image that was the answer")
    elif letter not in options:
        raise ValueError(f"the answer '{answer}' is none of the options")
    elif normalise(options[letter]) != normalise(example.answer):
        raise ValueError(f"option {letter} is not the given answer word for word")
    return Rephrased(question, letter, str(kind))
