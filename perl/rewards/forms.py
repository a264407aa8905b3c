r"""The form in which each reward function reads an answer: what a completion must write around it.

A form is the marks that it takes, each as a prompt writes it when it asks for it: `\boxed`, `<think>`, `<answer>`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from perl.config import REWARD_SPEC, names_of
from perl.rewards.answers import accuracy
from perl.rewards.choice import choice
from perl.rewards.judge import judge
from perl.rewards.loading import BoundReward, RewardFunction, load
from perl.rewards.math import math_reward
from perl.rewards.reading import (
    Reader,
    chosen_letters,
    extract_answer,
    final_answer,
    stated_answer,
    tagged,
)
from perl.rewards.scorer import BUILT_IN
from perl.rewards.sequences import ordering

Form = frozenset[str]
BOX = "\\boxed"

_BOX, _ANSWER = Form({BOX}), Form({"<answer>"})
_ANY: tuple[Form, ...] = ()
_EITHER = (_BOX, _ANSWER)

READS: dict[str, Callable[[Mapping[str, Any]], tuple[Form, ...]]] = {
    "accuracy": lambda options: (_ANSWER if options.get("tags") else _BOX,),
    "format": lambda _: (Form({"<think>", BOX}),),
    "math": lambda _: _EITHER,
    "choice": lambda _: _ANY,
    "format_tags": lambda options: (
        Form(f"<{tag}>" for tag in options.get("tags", ("think", "answer"))),
    ),
    "box_iou": lambda _: _ANY,
    "detection": lambda _: _ANY,
    "grounding": lambda _: _ANY,
    "temporal_iou": lambda _: _ANY,
    "ordering": lambda _: _EITHER,
    "frame_index": lambda _: (Form({"<index>"}),),
    "judge": lambda _: _ANY,
    "caption_facts": lambda _: _ANY,
    "length_penalty": lambda _: _ANY,
    "repetition": lambda _: _ANY,
}
"""For each function of `BUILT_IN`, by its options, the forms of which one is enough; none: it finds the answer however it
is written (a letter, coordinates, free text), or reads none. `math` and `ordering` compare the whole text where there is
no mark, which a model that reasons never gets right."""


def forms_of(functions: Sequence[str], weights: Sequence[float]) -> dict[str, tuple[Form, ...]]:
    """By its name the forms of each function that counts; none for the user's own, which are not loaded.

    Without `weights` all count. Raises UserError as `load` does.
    """
    found = {}
    weights = weights or [1.0] * len(functions)
    for name, spec, weight in zip(names_of(functions), functions, weights, strict=False):
        match = REWARD_SPEC.fullmatch(spec.strip())
        if weight and match and match["module"] is None:
            options = load(spec, BUILT_IN).options
            found[name] = READS[match["name"]](options)
        elif weight:
            found[name] = _ANY
    return found


def reader_of(function: BoundReward) -> Reader | None:
    """What reads a completion's answer as a reward function does, with its options; None for one whose answers are not
    known here: those that read boxes or spans, or none, and the user's own."""
    reader = _READERS.get(function.function)
    return reader and reader(function.options)


def says_right(spec: str) -> bool:
    """Whether a function of `reward.functions` is a built-in one that gives an answer 1 where it is right and else 0."""
    name = spec.partition("(")[0].strip()
    if BUILT_IN.get(name) not in _READERS:
        return False
    return not load(spec, BUILT_IN).options.get("kendall")


def _letters(text: str) -> str | None:
    return ", ".join(chosen_letters(text) or "") or None


_READERS: dict[RewardFunction, Callable[[Mapping[str, Any]], Reader]] = {
    accuracy: lambda options: tagged if options.get("tags") else extract_answer,
    choice: lambda _: _letters,
    math_reward: lambda _: stated_answer,
    ordering: lambda _: stated_answer,
    judge: lambda _: final_answer,
}
"""By its options, for each built-in function that compares one answer with the right one."""


def fits(forms: Collection[Form], text: str) -> bool:
    """Whether a text mentions, or writes, all marks of one of the forms."""
    return any(all(mark in text for mark in form) for form in forms)


def opened(prompt: str, forms: Iterable[Form]) -> Form:
    """The marks that a chat template has written behind the question, so that no completion does."""
    return Form(mark for form in forms for mark in form if prompt.rstrip().endswith(mark))


def written(answer: str, marks: Collection[str]) -> str:
    r"""A completion with these marks that gives an answer.

    Example: `written("B", {"<think>", "\\boxed"}) == r"<think>...</think>\boxed{B}"`.
    """
    tags = [mark for mark in sorted(marks) if mark not in (BOX, "<think>", "<answer>")]
    body = f"\\boxed{{{answer}}}" if BOX in marks else answer
    if "<answer>" in marks:
        body = f"<answer>{body}</answer>"
    thought = "<think>...</think>" if "<think>" in marks else ""
    return thought + "".join(f"{mark}{answer}</{mark[1:]}" for mark in tags) + body
