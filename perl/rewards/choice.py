"""Multiple choice: the letters that a completion settles on, however they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perl.permutation import AnswerForm
from perl.rewards.answers import forms_in, score_each
from perl.rewards.reading import chosen_letters, gold_text, letters_in


def choice(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    unordered: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the chosen letters are the gold ones, in any sequence, else 0; None without gold, where it is no letter, or
    where the column `answer_form` says that several are no set.

    SEED-Bench-R1, arXiv 2503.24376. See `letters` for what is read as a choice. Several letters are one only where the
    gold has several; `unordered`, which asked for that once, changes nothing.
    """
    golds = [
        _letters(gold, form)
        for gold, (form,) in zip(answer, forms_in(columns, completions), strict=True)
    ]
    return score_each(lambda text, gold: float(chosen_letters(text) == gold), completions, golds)


def _letters(gold: str | None, form: AnswerForm | None) -> str | None:
    letters = None if gold is None else letters_in(gold_text(gold))
    in_sequence = form in ("sequence", "values") and letters and len(letters) > 1
    return None if in_sequence else letters
