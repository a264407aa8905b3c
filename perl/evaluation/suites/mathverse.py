"""MathVerse testmini: 788 problems of geometry and functions in five versions, 3940 items with one image each.

Format: the card of AI4Math/MathVerse on the hub and output_templates/output_testmini.json of ZrrSkywalker/MathVerse. Prompt: the
column `query_cot`. The five versions are Text Dominant, Text Lite, Vision Intensive, Vision Dominant and Vision Only; the sixth,
Text Only, is another file and has no image. Not official: both the extraction of the answer and its comparison are
GPT's (evaluation/extract_answer_s1.py, score_answer_s2.py); here rules read the answer, and a free one is compared by the
library math-verify.
"""

from __future__ import annotations

import re

from perl.evaluation.suites.base import THINK, Item, Judgement, Reply, Suite
from perl.evaluation.suites.choices import option_letter
from perl.evaluation.suites.maths import check_maths, said, same_value
from perl.types import IMAGE_SLOT, Example

_CHOICE = re.compile(r"^\s*\(?([A-H])\)?\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)


def _example(item: Item) -> Example:
    text = item.text("query_cot")
    if item.think:
        question = item.text("question") or "Answer the question that is shown in the image."
        text = f"{question}\n{THINK}"
    # The version Vision Only has its question in the picture; this column has it as text for the judge.
    asked = item.text("question_for_eval") or item.text("question")
    options = [text for _, text in _CHOICE.findall(asked)]
    return Example(
        id=item.text("sample_index"),
        images=(item.picture(item.value("image")),),
        question=IMAGE_SLOT + text,
        answer=item.text("answer"),
        kind="none",
        should_change=False,
        task=item.text("problem_version"),
        extra={
            "options": options,
            "choice": item.text("question_type") == "multi-choice",
            "problem": item.text("problem_index"),
        },
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    if example.extra["choice"]:
        options = example.extra["options"]
        letter = option_letter(reply.text, len(options) or 5, options)
        return Judgement(letter, float(letter is not None and letter == gold.strip()[:1].upper()))
    answer = reply.text if reply.boxed else said(reply.text)
    return Judgement(answer or None, float(same_value(answer, gold)))


SUITE = Suite(
    name="mathverse",
    title="MathVerse",
    home="https://huggingface.co/datasets/AI4Math/MathVerse",
    expected=3940,
    files=("testmini.parquet",),
    rows=("testmini.parquet",),
    example=_example,
    judge=_judge,
    check=check_maths,
)
