"""MATH-Vision test: 3040 problems of mathematics competitions, five options or a value.

Format: the card of MathLLMs/MathVision on the hub and data/test.jsonl of mathllm/MATH-V; the one image of an item holds all its
figures, and the text keeps its marks `<image1>`. Prompt: models/Qwen-VL.py there (`geninput`). Scoring: evaluation/evaluate.py: right
where the answer is the letter or the value of the right option, numbers to two digits after the point. Not official: values are
compared by the library math-verify, not by evaluating what latex2sympy makes of them.
"""

from __future__ import annotations

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, judge_option, judge_value, labelled
from perl.permutation import LETTERS
from perl.types import Example, UserError

_PROMPT = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
    'question, only one letter is allowed in the "\\boxed{}".\n'
)


def _example(item: Item) -> Example:
    options = item.texts("options")
    text = item.text("question") + "\n"
    if "".join(options) not in ("", "ABCDE"):
        text += labelled(options) + "\n"
    return make_example(
        item.text("id"),
        [item.picture(item.value("decoded_image"))],
        text + item.think if item.think else _PROMPT + text,
        item.text("answer"),
        item.text("subject"),
        options=options,
    )


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    options = example.extra["options"]
    if not options:
        return judge_value(reply, gold, digits=2)
    right = _letter(gold, len(options))
    judged = judge_option(reply, right, options)
    if judged.answer is None:
        return judge_value(reply, options[LETTERS.index(right)], digits=2)
    return judged


def _check(item: Item) -> None:
    """Raise UserError for an item that could be asked but not judged."""
    options, gold = item.texts("options"), item.text("answer")
    if options and not _letter(gold, len(options)):
        raise UserError(
            f"{item.place}: the answer '{gold}' is no letter of its {len(options)} options; "
            "the file is not the published one"
        )


def _letter(gold: str, options: int) -> str:
    """The letter of the right option; empty where the answer begins with none of those."""
    first = gold.strip()[:1].upper()
    return first if first in LETTERS[:options] else ""


SUITE = Suite(
    name="mathvision",
    title="MathVision",
    home="https://huggingface.co/datasets/MathLLMs/MathVision",
    expected=3040,
    files=("data/test-*.parquet",),
    example=_example,
    judge=_judge,
    uses_math_verify=True,
    check_item=_check,
)
