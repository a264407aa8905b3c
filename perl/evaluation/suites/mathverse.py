"""MathVerse testmini: 788 problems of geometry and functions in five versions, 3940 items with one image each.

Format: the card of AI4Math/MathVerse on the hub and output_templates/output_testmini.json of ZrrSkywalker/MathVerse. Prompt: the
column `query_cot`. The five versions are Text Dominant, Text Lite, Vision Intensive, Vision Dominant and Vision Only; the sixth,
Text Only, is another file and has no image. Not official: both the extraction of the answer and its comparison are
GPT's (evaluation/extract_answer_s1.py, score_answer_s2.py); here rules read the answer, and a free one is compared by the
library math-verify.
"""

from __future__ import annotations

import re

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, judge_option, judge_value
from perl.types import Example

_CHOICE = re.compile(r"^\s*\(?[A-H]\)?\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)


def _example(item: Item) -> Example:
    text = item.text("query_cot")
    if item.think:
        question = item.text("question") or "Answer the question that is shown in the image."
        text = f"{question}\n{item.think}"
    # The version Vision Only has its question in the picture; this column has it as text for the judge.
    asked = item.text("question_for_eval") or item.text("question")
    return make_example(
        item.text("sample_index"),
        [item.picture(item.value("image"))],
        text,
        item.text("answer"),
        item.text("problem_version"),
        options=_CHOICE.findall(asked),
        choice=item.text("question_type") == "multi-choice",
        problem=item.text("problem_index"),
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    if not example.extra["choice"]:
        return judge_value(reply, gold)
    options = example.extra["options"]
    return judge_option(reply, gold.strip()[:1].upper(), options, len(options) or 5)


SUITE = Suite(
    name="mathverse",
    title="MathVerse",
    home="https://huggingface.co/datasets/AI4Math/MathVerse",
    expected=3940,
    files=("testmini.parquet",),
    example=_example,
    judge=_judge,
    uses_math_verify=True,
)
