"""Whether a completion gives the gold answer, and the form of completions.

The reward functions `accuracy`, `format_reward` and `format_tags` follow TRL's convention:
`f(prompts, completions, **columns) -> list of float or None`. `score_each` and `column_of` are for all that do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from perl.permutation import AnswerForm
from perl.rewards.reading import equal, extract_answer, gold_text, tagged
from perl.types import UserError

Score = TypeVar("Score")

# Atomic groups make this linear; backtracking over a looping model's thousand "</think>" is cubic.
_WELL_FORMED = re.compile(r"<think>(?>.*?</think>)(?>.*?\\boxed\{).*?\}", re.DOTALL)


def accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    tags: bool = False,
    unordered: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the last boxed answer is the gold one (see `equality`), else 0; None without gold.

    PeRL, arXiv 2506.14907. With `tags` the answer is what the last `<answer>...</answer>` holds;
    with `unordered` lists are sets, else what the column `answer_form` says.
    """
    read = tagged if tags else extract_answer
    return score_each(
        lambda text, gold, form: float(equal(read(text), gold_text(gold), *form)),
        completions,
        answer,
        [("set",)] * len(completions) if unordered else forms_in(columns, completions),
    )


def format_reward(
    prompts: Sequence[Any], completions: Sequence[str], **columns: Any
) -> list[float]:
    r"""1 where the whole text matches `<think>.*</think>.*\\boxed\{.*\}.*`, else 0.

    PeRL, arXiv 2506.14907.
    """
    return [float(_WELL_FORMED.match(text) is not None) for text in completions]


def format_tags(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    tags: Sequence[str] = ("think", "answer"),
    **columns: Any,
) -> list[float]:
    """1 where the text is `<think>...</think><answer>...</answer>` and no more, else 0.

    UniVG-R1, arXiv 2505.14231, and others; each tag stands once, with blanks at most between two
    blocks. `tags` names other blocks, as `("think", "index", "answer")` of ViaRL, arXiv 2505.15447.
    """
    return [float(_in_blocks(text, tags)) for text in completions]


def score_each(
    score: Callable[..., Score], completions: Sequence[str], *golds: Sequence[Any]
) -> list[Score | None]:
    """`score(completion, *gold)` of each completion; None where a gold value is None."""
    return [
        None if any(gold is None for gold in wanted) else score(text, *wanted)
        for text, *wanted in zip(completions, *golds, strict=True)
    ]


def forms_in(
    columns: Mapping[str, Sequence[Any]], completions: Sequence[Any]
) -> list[tuple[AnswerForm | None]]:
    """What a list in each gold answer is, in tuples, as None is no missing gold. A column of the data by the name
    `answer_form` may hold other words, which say nothing."""
    column = columns.get("answer_form") or [None] * len(completions)
    return [(form if form in get_args(AnswerForm) else None,) for form in column]


def column_of(reward: str, columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The column that an option of a reward names; UserError if the data has none of that name."""
    if name not in columns:
        raise UserError(
            f"reward {reward}: the data has no column '{name}'; there are "
            f"{', '.join(columns) or 'none'}; name the right one in its options"
        )
    return columns[name]


def _in_blocks(text: str, tags: Sequence[str]) -> bool:
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.startswith(opening):
            return False
        rest = rest.partition(closing)[2].lstrip()
    return not rest
