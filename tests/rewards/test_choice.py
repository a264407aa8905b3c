"""The letter that a completion settles on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.rewards.scoring import score, totals

CHOSEN = {
    "B": (
        "<answer>B</answer>", "A or C? <answer> (b) </answer>", "<answer>B. A dog</answer>", "<answer>B) dog</answer>",
        "<answer>Option B</answer>", "<answer>option b.</answer>", "<answer>It shows A dog, so B</answer>",
        "<answer>C</answer> <answer>B</answer>", r"\boxed{\text{B}}", r"\boxed{B}", "<think>A is wrong</think> B", "B.",
        "Maybe (A). No: the answer is B", "<answer>e.g. B</answer>", "<answer>i.e., the second: (B)</answer>",
        "<answer>E.G. option B</answer>", "<answer>B.Dog</answer>",
    ),
    "C": (
        "<answer>The answer is (C)</answer>", "I think that (C) fits", "Option A? No, option C", "(A)? No, (C), like (C) before",
        "<answer>Option C, not option A</answer>", "<answer>(C), not (A)</answer>", "<answer>it is C, not A</answer>",
    ),
    "D": ("<answer>**D**</answer>",),
    None: ("<answer>a.m.</answer>", "A cat is to be seen.", "<answer>a dog</answer>", "<answer></answer>", ""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("letter", "text"), [(letter, text) for letter, texts in CHOSEN.items() for text in texts]
)
def test_choice_finds_the_letter(letter: str | None, text: str) -> None:
    scores = {gold: score("choice", text, answer=gold) for gold in "ABCD"}
    assert {gold for gold, value in scores.items() if value == 1} == ({letter} - {None})
    if letter:
        assert score("choice", text, answer=f"({letter}) a thing") == 1


@pytest.mark.parametrize(
    "text",
    ["A, C", "C and A", "A and C", "(c), (a)", "AC", "C; A.", "e.g. A and C", "(a), i.e. (c)"],
)
def test_choice_of_several(text: str) -> None:
    tagged = f"<answer>{text}</answer>"
    assert score("choice(unordered=True)", tagged, answer="A, C") == 1
    assert score("choice(unordered=True)", tagged, answer="A, B, C") == 0


def test_choice_without_gold_and_with_a_gold_that_is_none(caplog: Any) -> None:
    scorer, scores = totals("choice", ["A"] * 3, answer=["A", None, "12"])
    np.testing.assert_array_equal(scores, [1, np.nan, np.nan])  # nothing else scores the other two
    assert scorer.faults == {"choice": 0} and not caplog.text
