"""MV-MATH: 2009 problems of school mathematics over 2 to 8 figures, multiple choice, one value, or several steps.

Format: eternal8080/MV-MATH, data/MV-MATH.json and images/ (marks `<image_1>` in the question). Prompts: models/prompt.py there, the
instruction and the system message of each type, without its two worked examples. Score as in evaluation/merge_score.py: the share
of right questions, one of several steps being right where every step is. Not official: whether an answer is right is judged by
DeepSeek (evaluation/evaluate_*.py); here rules read it, and math-verify compares values, which is stricter
where an answer is a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import (
    Judgement,
    Reply,
    judge_option,
    judge_value,
    numbered_slots,
)
from perl.permutation import LETTERS
from perl.rewards.math import equal_values
from perl.rewards.reading import said
from perl.types import IMAGE_SLOT, Example, Message

_ASSISTANT = (
    "You are an assistant for solving math problems. Your input consists of a math question and images. Your task "
    "is to output the solution steps and the answer. The output format should be a step-by-step approach."
)
_SYSTEM = {
    "choice": f"{_ASSISTANT} Each question is multiple choice with one correct answer. Your final answer must be "
    "one of A, B, C, or D",
    "single-step": _ASSISTANT,
    "multi-step": "You are a math problem-solving assistant. Your input is a math problem and a picture of the "
    "problem. Each problem is a multi-step problem. Your task is to output the solution ideas and answers for each "
    "step. The output format is step-by-step.",
}
_STEPS = (
    "using the following format: Step X (Mathematical theorem/basis used): Detailed solution steps."
)
_INSTRUCTION = {
    "choice": "Your final answer must be one of A, B, C, and D.\nPlease reason step by step, and put your final "
    f"answer within {{}}. Each step is placed on a new line, {_STEPS} Answer: {{}}",
    "single-step": f"Please reason step by step, each step is placed on a new line, {_STEPS} Answer",
    "multi-step": f"Please reason step by step, each step is placed on a new line, {_STEPS} Answer: X",
}
_PART = re.compile(r"(?<![A-Za-z0-9])[(（]\s*([0-9])\s*[)）]")
_SLOT = re.compile(rf"(?:(?<![A-Za-z])([A-Z])\s*[.:)]?\s*)?{IMAGE_SLOT}")
_LONE_LETTER = re.compile(r"^\s*[A-Z]\s*[.:)]?\s*$", re.MULTILINE)


def _paths(item: Item) -> Sequence[Path]:
    return [item.folder / "images" / name for name in item.texts("input_image")]


def _example(item: Item) -> Example:
    pictures = [item.picture(path) for path in _paths(item)]
    text, order = numbered_slots(item.text("question"), "<image_([0-9]+)>", len(pictures))
    kind = item.text("answer_type")
    moving = _option_images(text) if kind == "choice" else 0
    if item.think:
        messages = (Message("user", f"{text}\n{item.think}"),)
    else:
        instruction = _INSTRUCTION.get(kind, _INSTRUCTION["single-step"])
        system = Message("system", _SYSTEM.get(kind, _ASSISTANT))
        messages = (system, Message("user", f"{instruction}\nQuestion: {text}"))
    return make_example(
        item.text("problem_id"),
        [pictures[i] for i in order],
        messages,
        item.text("answer").strip(),
        item.text("subject"),
        "none" if not moving else "all" if moving == len(pictures) else f"last:{moving}",
        type=kind,
    )


def _option_images(text: str) -> int:
    """How many images at the end are the options, labelled A, B, ... before each; 0 where any doubt is left."""
    labels = [match[1] for match in _SLOT.finditer(text)]
    count = sum(label is not None for label in labels)
    # A letter that stands alone after the last image labels it from behind, and so it is with the others.
    behind = _LONE_LETTER.search(text.rpartition(IMAGE_SLOT)[2])
    return 0 if count < 2 or behind or labels[-count:] != list(LETTERS[:count]) else count


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    kind = example.extra["type"]
    if kind == "choice":
        return judge_option(reply, gold[:1].upper(), (), 4)
    if kind != "multi-step":
        return judge_value(reply, gold)
    given, wanted = _parts(reply.text), _parts(gold)
    right = bool(wanted) and all(
        equal_values(said(given.get(part, "")), value) for part, value in wanted.items()
    )
    written = "; ".join(f"({part}) {said(value)}" for part, value in given.items())
    return Judgement(written or None, float(right))


def _parts(text: str) -> dict[str, str]:
    """What stands after each `(1)`, `(2)`, ...; the last of each number counts."""
    pieces = _PART.split(text)
    return {n: value.strip(" .;；\n") for n, value in zip(pieces[1::2], pieces[2::2], strict=True)}


SUITE = Suite(
    name="mv_math",
    title="MV-MATH",
    home="https://github.com/eternal8080/MV-MATH (its page links the images)",
    expected=2009,
    files=("data/MV-MATH.json",),
    folders=("images",),
    example=_example,
    judge=_judge,
    uses_math_verify=True,
    picture_files=_paths,
)
