"""Labels by a language model: it is shown the text of a question, not its pictures, and asked for JSON.

What the paper calls the check for semantic variation, by a model of one's own choice. An answer that
is no label, or one that does not hold, is asked for once more; then the images stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from perl.data.labelling.label import Label, checked, unsure
from perl.llm import Endpoint, EndpointError
from perl.permutation.answers import text_of
from perl.permutation.permute import Consistency
from perl.types import Example

_MAX_TOKENS = 1024  # A model that reasons first needs more than the label takes.

_TASK = """\
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
_T = TypeVar("_T")
_F = TypeVar("_F")
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def label_by_llm(
    examples: Sequence[Example], endpoint: Endpoint, text: Consistency = "slots"
) -> list[Label | EndpointError]:
    """A label for each example, or the error of an endpoint that is down or refuses everything.

    A prompt that the endpoint refuses by itself, or two answers that are no label, give `unsure`.
    """
    tasks = [_task(example, text) for example in examples]
    return ask_twice(
        endpoint, tasks, lambda i, said: _read(said, examples[i], text), unsure, _MAX_TOKENS
    )


def ask_twice(
    endpoint: Endpoint,
    tasks: Sequence[str],
    read: Callable[[int, str], _T],
    failed: Callable[[str], _F],
    max_tokens: int,
) -> list[_T | _F | EndpointError]:
    """What `read(i, answer)` makes of the answer to each task.

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
                out[i] = read(i, str(answer))
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


def json_object(said: str) -> dict[str, object]:
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


def _task(example: Example, text: Consistency) -> str:
    return _TASK.format(
        count=len(example.images),
        text=_TEXT[text],
        question=text_of(example),
        answer=example.answer,
    )


def _read(said: str, example: Example, text: Consistency) -> Label:
    value = json_object(said)
    kind, change, reason = (value.get(key) for key in ("kind", "should_change", "reason"))
    if not isinstance(kind, str) or not isinstance(change, bool) or not isinstance(reason, str):
        raise ValueError("kind and reason must be texts and should_change true or false")
    label = Label(kind.strip(), change, f"model: {' '.join(reason.split())[:200]}")
    held = checked(example, label, text)
    if not held.sure:
        raise ValueError(held.reason.removeprefix("unsure: "))
    return held
