"""ReMI: 13 tasks of reasoning over 2 to 6 images, 200 questions each.

Format: mehrankazemi/ReMI on the hub (test.parquet: question with marks `<image1>`, image_1 to image_6, label, task).
Prompts and scoring: the evaluation code that Google released with the data (Apache-2.0), read in public copies of it,
the paper 2406.09175 for the tolerances. Both are followed: the reply is JSON with the field `answer`; anything else is
wrong, but for a boxed answer, which that code does not know. The score is the mean over tasks.
"""

from __future__ import annotations

import json

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, numbered_slots
from perl.types import Example

_IMAGES = tuple(f"image_{k}" for k in range(1, 7))
_JSON = (
    ' Output only a valid JSON string with two fields: "explanation" and "answer". Do not output anything else. '
    "The explanation field contains your reasoning. "
)
_NUMBER = "The answer field contains the numeric value corresponding to your final answer."
_STRING = "The answer field contains a string corresponding to your final answer."
_CLOSING = {
    "Collisions": f"{_NUMBER} If it is a yes or no question, the answer field must be 0 for no and 1 for yes.",
    "Clocks": _NUMBER,
    "Schedule": _STRING,
    "EmojiAlgebra": _NUMBER,
    "Charts": "The answer field contains a string or numerical value corresponding to your final answer.",
    "CodeEdit": "The answer field contains the line of code corresponding to your final answer.",
    "GeomShape": _NUMBER,
    "GeomCost": _NUMBER,
    "FuncRead": "The answer field contains a string or numeric value corresponding to your final answer.",
    "RefCoco": _NUMBER,
    "IQ": "The answer field contains the a string corresponding to your final choice.",
    "Isomorphism": "The answer field must be 1 if the two graphs are isomorphic and 0 otherwise.",
    "Maps": _STRING,
}


def _example(item: Item) -> Example:
    images, task = item.pictures(_IMAGES), item.text("task")
    text, order = numbered_slots(item.text("question"), "<image([0-9])>", len(images))
    closing = f"\n{item.think}" if item.think else _JSON + _CLOSING.get(task, _STRING)
    return make_example(
        f"{task}/{item.index}",
        [images[i] for i in order],
        f"Question: {text}{closing}",
        item.text("label"),
        task,
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    answer = reply.text if reply.marked else _field(reply.text)
    if answer is None:
        return Judgement(None, 0.0)
    given = answer.lower().partition("%")[0].strip()
    label = gold.lower().replace("\\", "").partition("%")[0].strip()
    if example.task == "RefCoco":
        right = given in label.split(",")
    elif example.task in ("GeomShape", "GeomCost"):
        right = _near(given, label, share=0.03)
    elif example.task == "Clocks":
        right = _near(given, label, minutes=10)
    else:
        right = _equal(given, label)
    return Judgement(answer, float(right))


def _field(text: str) -> str | None:
    """The field `answer` of the JSON in a text, between its first and its last brace."""
    written = text[text.find("{") : text.rfind("}") + 1].replace('\\"', "").replace("\\", "")
    try:
        return str(json.loads(written)["answer"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _equal(given: str, label: str) -> bool:
    """Equal as written but for spaces, brackets around it or the `(x)` of a function; numbers within 1 %."""
    return (
        label in (given, given.replace(" ", ""), f"({given})")
        or given in (label.replace(" ", ""), f"({label})")
        or (label in ("f", "g", "h") and given == f"{label}(x)")
        or _near(given, label, share=0.01)
    )


def _near(given: str, label: str, share: float = 0.0, minutes: float = 0.0) -> bool:
    try:
        value, wanted = float(given), float(label)
    except ValueError:
        return False
    # A share of a negative label would be an empty range: the official code accepts only an equal number there.
    margin = share * wanted + minutes
    return wanted - margin <= value <= wanted + margin or value == wanted


SUITE = Suite(
    name="remi",
    title="ReMI",
    home="https://huggingface.co/datasets/mehrankazemi/ReMI",
    expected=2600,
    files=("test.parquet",),
    example=_example,
    judge=_judge,
    averaged="tasks",
)
