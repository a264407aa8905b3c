"""Multiple choice: the letters that a completion settles on, however they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perl.rewards.answers import score_each
from perl.rewards.reading import chosen_letters, gold_text, letters_in


def choice(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    unordered: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the chosen letters are the gold ones, in any sequence, else 0; None without gold, or where it is no letter.

    SEED-Bench-R1, arXiv 2503.24376. See `letters` for what is read as a choice. Several letters are one only where the
    gold has several; `unordered`, which asked for that once, changes nothing.
    """
    golds = [None if gold is None else letters_in(gold_text(gold)) for gold in answer]
    return score_each(lambda text, gold: float(chosen_letters(text) == gold), completions, golds)
