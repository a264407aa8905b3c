"""Mantis-Eval: 217 questions over several images, multiple choice or a short answer.

Format: the card of TIGER-Lab/Mantis-Eval on the hub. Prompts and scoring: TIGER-AI-Lab/Mantis,
mantis/benchmark/eval.py and mantis/benchmark/templates. Both are followed; a boxed answer, which that code does not
know, stands for the whole reply.
"""

from __future__ import annotations

import re

from perl.evaluation.suites.base import Item, Suite, kind_by_rules, make_example
from perl.evaluation.suites.reading import Judgement, Reply, without_label
from perl.permutation import LETTERS
from perl.types import Example

_CHOICE = "{question}\nAnswer with the option's letter from the given choices directly."
_SHORT = (
    "Given the images, answer the following short answer vqa question:\nQ: {question}\n"
    'You can first give your analysis, and then give your final answer as "Final Answer:"'
)


def _example(item: Item) -> Example:
    images = tuple(item.picture(value) for value in item.value("images"))
    question, options = item.text("question"), item.texts("options")
    choice = item.text("question_type") == "multi-choice"
    if choice:
        for letter, option in zip(LETTERS, options, strict=False):
            marked = any(f"{letter}{mark}" in option.upper() for mark in "):.")
            question += f"\n {option}" if marked else f"\n ({letter}) {option}"
    answer = item.text("answer").strip("()\n ")
    official = (_CHOICE if choice else _SHORT).replace("{question}", question)
    return make_example(
        item.text("id"),
        images,
        f"{question}\n{item.think}" if item.think else official,
        answer,
        item.text("category"),
        kind_by_rules(images, question, answer) if choice else "none",
        options=options,
        choice=choice,
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    text = re.split("final answer:", reply.text, maxsplit=1, flags=re.IGNORECASE)[-1].strip()
    if not example.extra["choice"]:
        return Judgement(text or None, float(text.lower() == gold.lower()))
    options = example.extra["options"]
    right = next((c for c in gold if c.isalpha()), "A").upper()
    stated = re.match(r"Answer: ([A-Z])", text)
    letter = stated[1] if stated else next((c.upper() for c in text if c.isalpha()), "")
    if letter and letter in LETTERS[: len(options)]:
        return Judgement(letter, float(letter == right))
    wanted = without_label(options[LETTERS.index(right)])
    return Judgement(None, float(reply.text == wanted))


SUITE = Suite(
    name="mantis_eval",
    title="Mantis-Eval",
    home="https://huggingface.co/datasets/TIGER-Lab/Mantis-Eval",
    expected=217,
    files=("mantis_eval/test-*.parquet",),
    example=_example,
    judge=_judge,
)
