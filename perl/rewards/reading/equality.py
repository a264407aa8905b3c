"""Whether two answers are equal, by their forms."""

from __future__ import annotations

import re
from collections.abc import Callable

from perl.permutation import AnswerForm
from perl.rewards.reading.forms import GLUED, Answer, read
from perl.rewards.reading.notation import plain, tidy

_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[1-9][0-9]{2})+")
"""Which may be a list as well."""
_HEDGE = re.compile(r"[^=]*\bor\b[^=]*")
"""And no solutions of an equation, as `x = 1 or x = 2`."""
Same = Callable[[str, str], bool]
"""Whether two texts, given and gold, are equal that have no form by which to tell."""


def equal(
    given: str | None,
    gold: str,
    form: AnswerForm | None = None,
    same: Same | None = None,
    digits: int | None = None,
) -> bool:
    r"""Whether an answer is equal to the gold one, as docs/rewards.md says.

    Args:
        form: what a list in `gold` is; None: its notation tells, or else `2, 1, 3` and `B, A` (1 to n, A to ...) are
            sequences, and others of different items are sets.
        same: compares what is neither letter, number nor list; None: as texts.
        digits: numbers written with a point may differ behind so many digits after it; None: not at all.
    """
    if given is None:
        return False
    if same is None:
        same = lambda one, other: plain(one) == plain(other)  # noqa: E731
        if same(given, gold):
            return True
    return _equal(read(given, form), read(gold, form), form, same, digits)


def canonical(answer: str, form: AnswerForm | None = None) -> str:
    """The answer in the one way of writing that equal answers share; only a unit left out makes another one.

    Example: `canonical("(C) and A.") == "a,c"`.
    """
    return _key(read(answer, form), form)


def items(answer: str) -> list[str]:
    """A list such as `A, C`, `[3; 1]`, `B > A`, `A and C` or `CAB`, its items canonical and without labels, in sequence."""
    whole = read(answer, "sequence")
    return [item.letter or _key(item, None) for item in whole.items or (whole,) if item.text]


def _in_sequence(answer: Answer, form: AnswerForm | None) -> bool:
    if form is not None and answer.kind != "interval":
        return form != "set"
    if answer.kind:
        return answer.kind != "set"
    keys = [_key(item, None) for item in answer.items]
    first = (
        [str(k) for k in range(1, len(keys) + 1)],
        list("abcdefghijklmnopqrstuvwxyz"[: len(keys)]),
    )
    return len(set(keys)) < len(keys) or sorted(keys) in map(sorted, first)


def _key(answer: Answer, form: AnswerForm | None) -> str:
    if answer.form == "number":
        return f"{answer.number} {answer.unit}".strip()
    if answer.form == "letter":
        return f"{answer.letter}. {plain(answer.label)}" if answer.label else answer.letter
    if answer.form == "text":
        return f"{plain(answer.text)} {answer.unit}".strip()
    keys = [_key(item, None) for item in answer.items]
    text = ",".join(keys if _in_sequence(answer, form) else sorted(keys))
    shown = form is None and answer.mark not in ("", "<", ">", "{}")
    return answer.mark[0] + text + answer.mark[-1] if shown else text


def _equal(
    given: Answer, gold: Answer, form: AnswerForm | None, same: Same, digits: int | None
) -> bool:
    if (given.form == "list") != (gold.form == "list"):
        given, gold = _beside(given, gold), _beside(gold, given)
    if given.form == gold.form == "list":
        return _equal_lists(given, gold, form, same, digits)
    if {given.form, gold.form} in ({"list", "number"}, {"list", "letter"}):
        return False
    letters = {item.form for item in gold.items} == {"letter"}
    if given.form == "text" and gold.items and (letters or _HEDGE.fullmatch(plain(given.text))):
        return False  # Mathematics takes a hedge, as A or C, for a set.
    if given.unit and gold.unit and given.unit != gold.unit:
        return False
    if given.is_ordinal and not gold.is_ordinal:
        return False  # The question's numbers may count from 0.
    if given.form == gold.form == "number":
        return _equal_numbers(given, gold, digits)
    if given.form == gold.form == "letter":
        both = given.label and gold.label
        return given.letter == gold.letter and (not both or plain(given.label) == plain(gold.label))
    return same(_plainly(given), _plainly(gold))


def _plainly(answer: Answer) -> str:
    """As mathematics reads it, to which 2 1/2 is no mixed number."""
    fraction = answer.form == "number" and not answer.is_decimal and answer.number.denominator > 1
    return str(answer.number) if fraction else answer.text


def _equal_numbers(given: Answer, gold: Answer, digits: int | None) -> bool:
    one, other = given.number, gold.number
    if digits is None or not (given.is_decimal or gold.is_decimal) or one == other:
        return one == other
    return round(one, digits) == round(other, digits) != 0


def _equal_lists(
    given: Answer, gold: Answer, form: AnswerForm | None, same: Same, digits: int | None
) -> bool:
    if len(given.items) != len(gold.items):
        return False
    marks = given.mark and gold.mark and given.mark != gold.mark
    if marks and (form is None or {given.mark, gold.mark} == {"<", ">"}):
        return False
    if _in_sequence(gold, form):
        pairs = zip(given.items, gold.items, strict=True)
        return all(_equal(one, other, None, same, digits) for one, other in pairs)
    left = list(given.items)
    for wanted in gold.items:
        found = next(
            (k for k, one in enumerate(left) if _equal(one, wanted, None, same, digits)), None
        )
        if found is None:
            return False
        del left[found]
    return True


def _beside(answer: Answer, other: Answer) -> Answer:
    """An answer as it is read beside another one: `CAB` and `100,200` beside a list, `1,234` beside a number."""
    text = tidy(answer.text)
    if answer.form == "list":
        return read(text) if other.form == "number" else answer
    glued = GLUED.fullmatch(text) and len(text) == len(other.items)
    return read(text, "sequence") if glued or _THOUSANDS.fullmatch(text) else answer
