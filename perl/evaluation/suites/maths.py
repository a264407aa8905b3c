"""Free answers of mathematics: whether two are the same value, and which number a text ends with."""

from __future__ import annotations

import importlib.util
import logging
import re

from perl.rewards.answers import same_answer
from perl.types import UserError

_NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_CUE = re.compile(r"(?i:answer)\s*(?:is|should be|=|:)\s*:?\s*([^\n]+)")
_LONGEST = 400


def same_value(given: str | None, gold: str, digits: int = 6) -> bool:
    """Whether two answers are equal as written (`same_answer`) or, by the library math-verify, in value.

    `digits` after the point are compared. LaTeX need not stand between dollar signs. Longer texts than 400
    characters are no answers.
    """
    if given is None or not given.strip() or len(given) > _LONGEST:
        return False
    return same_answer(given, gold) or _equal(given, gold, digits)


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None without one."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def said(text: str) -> str:
    """What a text gives as its answer: what follows its last "answer is" or "Answer:", else its last line."""
    cued = _CUE.findall(text)
    answer = cued[-1] if cued else text.strip().rpartition("\n")[2]
    answer = re.split(r"\.\s", answer.strip(" *") + " ")[0].strip(" *")
    return answer[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", answer) else answer


def _equal(given: str, gold: str, digits: int) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    kinds = (LatexExtractionConfig(), ExprExtractionConfig())
    values = [
        parse(t if "$" in t else f"${t}$", extraction_config=kinds, fallback_mode="no_fallback")
        for t in (gold, given)
    ]
    return all(values) and bool(verify(*values, float_rounding=digits))


def check_maths() -> None:
    """Raise UserError if the library that compares values is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "this benchmark compares values with math-verify; pip install 'perl-rl[rewards]'"
        )
