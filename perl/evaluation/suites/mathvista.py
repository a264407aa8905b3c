"""MathVista testmini: 1000 questions of mathematics over one image, multiple choice or a number.

Format: the card of AI4Math/MathVista on the hub. Prompt: its column `query`, made by lupantech/MathVista,
evaluation/build_query.py (zero-shot, hint, "solution"). Scoring: evaluation/calculate_score.py there, followed here: a choice is
compared as text, the nearest one by edit distance where the answer is none of them; numbers are rounded to the item's
precision. Not official: the answer is extracted by GPT-4 (evaluation/extract_answer.py); here by rules, which
guess no choice from a whole text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, labelled, option_letter
from perl.permutation import LETTERS
from perl.types import Example

_LONGEST_CHOICE = 100
_NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def _example(item: Item) -> Example:
    text, choices = item.text("query"), item.texts("choices")
    if item.think:
        unit = f" (Unit: {item.text('unit')})" if item.text("unit") else ""
        options = f"\nChoices:\n{labelled(choices)}" if choices else ""
        text = f"Question: {item.text('question')}{unit}{options}\n{item.think}"
    return make_example(
        item.text("pid"),
        [item.picture(item.value("decoded_image"))],
        text,
        item.text("answer"),
        str((item.value("metadata") or {}).get("task", "")),
        choices=choices,
        answer_type=item.text("answer_type"),
        precision=item.value("precision"),
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    choices, kind = example.extra["choices"], example.extra["answer_type"]
    if choices:
        answer = _choice(reply, choices)
    elif kind == "list":
        lists = re.findall(r"\[[^\[\]]*\]", reply.text)
        answer = lists[-1] if lists else None
    else:
        answer = _number(reply.text, kind, example.extra["precision"])
    return Judgement(answer, float(answer is not None and answer == gold))


def _choice(reply: Reply, choices: Sequence[str]) -> str | None:
    if reply.text in choices:
        return reply.text
    if letter := option_letter(reply, choices):
        return choices[LETTERS.index(letter)]
    if reply.marked and 0 < len(reply.text) <= _LONGEST_CHOICE:
        return min(choices, key=lambda choice: _distance(reply.text, choice))
    return None


def _number(text: str, kind: str, precision: float | None) -> str | None:
    """The last number of a text as the data writes it: an integer cut off, a float rounded."""
    try:
        value = float(text)
    except ValueError:
        *_, last = "nan", *_NUMBER.findall(text)
        value = float(last.replace(",", ""))
    if not math.isfinite(value):
        return None
    digits = int(precision) if precision is not None and not math.isnan(precision) else 1
    return str(int(value)) if kind == "integer" else str(round(value, digits))


def _distance(one: str, other: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


SUITE = Suite(
    name="mathvista",
    title="MathVista",
    home="https://huggingface.co/datasets/AI4Math/MathVista",
    expected=1000,
    files=("data/testmini-*.parquet",),
    example=_example,
    judge=_judge,
)
