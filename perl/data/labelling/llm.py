"""What a language model is asked for: labels, and open questions made into multiple choice.

It is shown the text of a question, not its pictures, and replies with JSON. Labels by a model are what the paper
calls the check for semantic variation; multiple choice is its first step with its data, since a choice among images
can be checked and followed when images move, and a free answer cannot. An answer that cannot be used is asked for
once more; then the images stay, or the question does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from perl.data.labelling.label import Label, checked, unsure
from perl.llm import Endpoint, EndpointError
from perl.permutation import Consistency, named_images, option_lines, plan_of, text_of
from perl.rewards.reading import canonical
from perl.types import IMAGE_SLOT, Example

TYPES = ("ReferenceComparison", "Other")

# Tokens of a reply: a model that reasons first needs more than the JSON takes.
_LABEL_TOKENS = 1024
_REPHRASE_TOKENS = 2048

_LABEL = """\
A question about {count} images is given below with its right answer. The {count} images fill its \
<image> slots in sequence. We want to show the same images in another sequence and still know the right \
answer. {text}

Decide two things.

"kind": which images may change places without making the question meaningless or its answer unknowable.
- "all": any of them; the question treats all images alike.
- "first_fixed": all but the first, which the question itself is about (a reference, a scene, a query).
- "last:K": only the last K, for example "last:4" when four images are the options.
- "blocks:2,4": only the numbered slots, counted from 1.
- "ordering": the options in the text are sequences of the images, such as "A. 2, 1, 3".
- "none": none of them: the images are steps in time, frames of a video, before and after, left and \
right, or text beside each one describes it; or you are not certain.

"should_change": true if the right answer names an image (a letter that labels an image, a number, \
"Image 2", a list of these), so that it has to be renamed when that image moves. false if the answer stays \
right wherever the images are (a count, yes or no, an object they have in common, a text option).

Reply with one JSON object and nothing else:
{{"kind": "...", "should_change": true or false, "reason": "at most fifteen words"}}

Question:
{question}

Right answer: {answer}
"""
_TEXT = {
    "slots": 'The text will not be rewritten: after the change "image 2" means whatever stands second, so an '
    "image that the question names apart from the others must keep its place.",
    "references": 'Mentions such as "Image 2" or "the second picture" will be rewritten to follow their image; '
    'other words, such as "the left one" or "the next", will not.',
}
_REPHRASE = """\
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
_T = TypeVar("_T")
_F = TypeVar("_F")
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rephrased:
    """A multiple-choice question in place of an open one; `answer` is a letter."""

    question: str
    answer: str
    question_type: str


def label_by_llm(
    examples: Sequence[Example], endpoint: Endpoint, text: Consistency = "slots"
) -> list[Label | EndpointError]:
    """A label for each example, or the error of an endpoint that is down or refuses everything.

    A prompt that the endpoint refuses by itself, or two answers that are no label, give `unsure`.
    """
    tasks = [
        _LABEL.format(count=len(e.images), text=_TEXT[text], question=text_of(e), answer=e.answer)
        for e in examples
    ]
    read = [partial(_read_label, example=e, text=text) for e in examples]
    return _ask_twice(endpoint, tasks, read, unsure, _LABEL_TOKENS)


def is_open(example: Example) -> bool:
    """Whether a question over several images has no options: neither in words nor labelled images."""
    return (
        len(example.images) > 1
        and [m.role for m in example.messages if m.role != "system"] == ["user"]
        and not option_lines(text_of(example))
        and not plan_of(example).lettered
    )


def rephrase(
    examples: Sequence[Example], endpoint: Endpoint
) -> list[Rephrased | str | EndpointError]:
    """For each open question its multiple-choice form, or why it keeps its own.

    An EndpointError stands where the endpoint is down or refuses everything.
    """
    tasks = [
        _REPHRASE.format(
            count=len(e.images),
            question=next(m.content for m in e.messages if m.role == "user"),
            answer=e.answer,
        )
        for e in examples
    ]
    read = [partial(_read_rephrased, example=e) for e in examples]
    return _ask_twice(endpoint, tasks, read, str, _REPHRASE_TOKENS)


def _ask_twice(
    endpoint: Endpoint,
    tasks: Sequence[str],
    read: Sequence[Callable[[str], _T]],
    failed: Callable[[str], _F],
    max_tokens: int,
) -> list[_T | _F | EndpointError]:
    """What `read[i]` makes of the answer to task i.

    Where it raises ValueError the task is put once more with what was wrong; then, and for a prompt
    that the endpoint refuses, `failed(reason)` stands in. An endpoint that is down stays an error.
    """
    out: dict[int, _T | _F | EndpointError] = {}
    chats = {i: [{"role": "user", "content": task}] for i, task in enumerate(tasks)}
    for attempt in range(2):
        said = endpoint.complete_each(list(chats.values()), max_tokens=max_tokens)
        again = {}
        for (i, chat), answer in zip(chats.items(), said, strict=True):
            if isinstance(answer, EndpointError):
                out[i] = failed(f"{answer}") if answer.of_request else answer
                continue
            try:
                out[i] = read[i](str(answer))
            except ValueError as error:
                out[i] = failed(f"the model gave no usable answer ({error})")
                wrong = f"That cannot be used: {error}. Reply with the corrected JSON object alone."
                again[i] = [
                    *chat,
                    {"role": "assistant", "content": str(answer)},
                    {"role": "user", "content": wrong},
                ]
        chats = again
        if attempt or not chats:
            break
    return [out[i] for i in range(len(tasks))]


def _json_object(said: str) -> dict[str, object]:
    """The JSON object in an answer, which may stand in a code fence or behind reasoning.

    Raises ValueError if there is none.
    """
    match = _OBJECT.search(said.rpartition("</think>")[2])
    if match is None:
        raise ValueError("there is no JSON object")
    try:
        value = json.loads(match[0])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {error}") from None
    return value


def _read_label(said: str, example: Example, text: Consistency) -> Label:
    value = _json_object(said)
    kind, change, reason = (value.get(key) for key in ("kind", "should_change", "reason"))
    if not isinstance(kind, str) or not isinstance(change, bool) or not isinstance(reason, str):
        raise ValueError("kind and reason must be texts and should_change true or false")
    label = Label(kind.strip(), change, f"model: {' '.join(reason.split())[:200]}")
    held = checked(example, label, text)
    if not held.sure:
        raise ValueError(held.reason.removeprefix("unsure: "))
    return held


def _read_rephrased(said: str, example: Example) -> Rephrased:
    """Raises ValueError for what is no multiple choice, or asks for something else."""
    value = _json_object(said)
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
    plan, options = plan_of(replace(new, kind="all")), option_lines(question)
    if plan.lettered:
        named = named_images(letter, count, plan.letters)
        before = named_images(example.answer, count, counted)
        if named is None:
            raise ValueError(f"the answer '{answer}' is none of the options")
        if before != named:
            raise ValueError(f"option {letter} is not the image that was the answer")
    elif letter not in options:
        raise ValueError(f"the answer '{answer}' is none of the options")
    elif canonical(options[letter]) != canonical(example.answer):
        raise ValueError(f"option {letter} is not the given answer word for word")
    return Rephrased(question, letter, str(kind))
