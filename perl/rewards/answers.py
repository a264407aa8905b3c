"""Reads the final answer out of a completion, compares it with the gold one, and scores the form.

The reward functions `accuracy`, `format_reward` and `format_tags` follow TRL's convention:
`f(prompts, completions, **columns) -> list of float or None`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from perl.types import UserError

Score = TypeVar("Score")

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # An escaped brace is a character, not a bracket.
# Atomic groups make this linear; backtracking over a looping model's thousand "</think>" is cubic.
_WELL_FORMED = re.compile(r"<think>(?>.*?</think>)(?>.*?\\boxed\{).*?\}", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:/[0-9]+)?")
_NOUN = re.compile(r"^(?:image|option)(?: (?=(?:[a-z]|[0-9]+)$)|(?=[0-9]+$))")
_SEPARATOR = re.compile(r"->|[,;→><&]|\band\b", re.IGNORECASE)
_LONGEST_NUMBER = 64

GOLD_COLUMNS = ("answer", "solution", "ground_truth", "target", "label")
"""Columns that data hold their answers in, the most telling one first."""


def accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    tags: bool = False,
    unordered: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the last boxed answer is the gold one (see `same_answer`), else 0; None without gold.

    PeRL, arXiv 2506.14907. With `tags` the answer is what the last `<answer>...</answer>` holds;
    with `unordered` the answer is a set: `C and A` equals `A, C`.
    """
    read = tagged if tags else extract_answer
    same = _same_set if unordered else same_answer
    return score_each(lambda text, gold: float(same(read(text), gold)), completions, answer)


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


def column_of(reward: str, columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The column that an option of a reward names; UserError if the data has none of that name."""
    if name not in columns:
        raise UserError(
            f"reward {reward}: the data has no column '{name}'; there are "
            f"{', '.join(columns) or 'none'}; name the right one in its options"
        )
    return columns[name]


def tagged(text: str, tag: str = "answer") -> str | None:
    """What the last `<tag>...</tag>` holds; None without one or if it never closes.

    Example: `tagged("<answer> B </answer>") == "B"`.
    """
    span = _tag_span(text, tag)
    return None if span is None else text[span].strip()


def final_answer(text: str) -> str:
    """The part of a completion that answers: the last `<answer>` block, else the last boxed answer,
    else what follows `</think>`, else the whole text."""
    found = (tagged(text), extract_answer(text), text.rpartition("</think>")[2].strip())
    return next(answer for answer in found if answer is not None)


def items_of(answer: str) -> list[str]:
    """A list such as `A, C`, `[3; 1]`, `B > A` or `A and C`, its items normalised."""
    text = normalise(_SEPARATOR.sub(",", _unwrap(answer)))
    return [item for item in text.split(",") if item]


def extract_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None without one or if it never closes.

    Example: `extract_answer(r"... \boxed{ \frac{1}{2} }") == r"\frac{1}{2}"`.
    """
    span = _box_span(text)
    return None if span is None else text[span].strip()


def gold_text(value: Any) -> str:
    """The answer in a column of the data: of a text that says more, what its last `<answer>` block or box holds; empty:
    there is none."""
    if isinstance(value, Mapping):  # verl's reward_model
        value = value.get("ground_truth")
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # A column of whole numbers with gaps is read as floats.
    text = "" if value is None else str(value).strip()
    return next((a for a in (tagged(text), extract_answer(text)) if a is not None), text)


def with_answer(text: str, old: str, new: str) -> str:
    """A text that gives the answer `old`, giving `new` instead: in its last `<answer>` block and in its last box, or else as
    a whole. What stands around it stays; a text that gives it nowhere becomes `new`."""
    spans = [
        span for span in (_tag_span(text), _box_span(text)) if span and text[span].strip() == old
    ]
    if not spans:
        return text.replace(old, new) if text.strip() == old else new
    for span in sorted(spans, key=lambda span: -span.start):
        text = text[: span.start] + text[span].replace(old, new) + text[span.stop :]
    return text


def same_answer(given: str | None, gold: str) -> bool:
    r"""Whether two answers are equal as numbers or after normalising.

    Case, spaces, `$`, `\text{}`, a trailing period, brackets around a name and the words "image"
    and "option" before it make no difference: `(b).` equals `B`, `Image 2` equals `2`, `0.50`
    equals `1/2`; lists are compared in sequence.
    """
    return given is not None and normalise(given) == normalise(extract_answer(gold) or gold)


def normalise(answer: str) -> str:
    """An answer in the form in which `same_answer` compares it."""
    text = _WRAPPED.sub(r"\1", answer).replace("$", "").replace("\u2212", "-")
    text = _unwrap(_FRACTION.sub(r"\1/\2", text))
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return ",".join(_normalise_item(item) for item in re.split(r"[,;]", text))


def _same_set(given: str | None, gold: str) -> bool:
    wanted = sorted(items_of(extract_answer(gold) or gold))
    return given is not None and sorted(items_of(given)) == wanted


def _tag_span(text: str, tag: str = "answer") -> slice | None:
    start = text.rfind(f"<{tag}>") + len(tag) + 2
    end = text.find(f"</{tag}>", start)
    return slice(start, end) if start > len(tag) + 1 and end >= 0 else None


def _box_span(text: str) -> slice | None:
    *_, last = None, *_BOXED.finditer(text)
    if last is None:
        return None
    depth = 1
    for mark in _BRACE.finditer(text, last.end()):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return slice(last.end(), mark.start())
    return None


def _in_blocks(text: str, tags: Sequence[str]) -> bool:
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.startswith(opening):
            return False
        rest = rest.partition(closing)[2].lstrip()
    return not rest


def _normalise_item(item: str) -> str:
    text = _NOUN.sub("", " ".join(_unwrap(item).split()).casefold())
    text = _unwrap(text)
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return text
    top, _, bottom = text.partition("/")
    return text if bottom and int(bottom) == 0 else str(Fraction(top) / int(bottom or 1))


def _unwrap(text: str) -> str:
    """Without a trailing period and one pair of brackets around the whole."""
    text = text.strip().rstrip(".").strip()
    if (
        len(text) > 2
        and text[0] + text[-1] in ("()", "[]")
        and not re.search(r"[()\[\]]", text[1:-1])
    ):
        return text[1:-1].strip()
    return text
