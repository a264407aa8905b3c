"""How an answer is written, and what holds for every function of a text."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.messages import refused
from tests.rewards.scoring import score, totals

EVERY_COLUMN = {"answer": "A", "image": 1, "box": "(0,0),(1,1)", "span": "1-2", "order": [0, 1]}


def test_length_penalty_is_dapos() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 1000]
    spec = "length_penalty(longest=100, buffer=20)"
    values = totals(spec, [""] * 7, completion_length=lengths)[1]
    np.testing.assert_allclose(values, [0, 0, -0.05, -0.5, -1, -1, -1])
    words = "length_penalty(longest=4, buffer=2, unit='words')"
    assert score(words, ["a b", "a b c", "a b c d", "a b c d e"]) == [0, -0.5, -1, -1]
    assert score("length_penalty(longest=4, buffer=2, unit='characters')", "a b") == -0.5
    for options, names in (
        ("longest=4, buffer=0", ["buffer = 0", "longest = 4"]),
        ("longest=4, buffer=5", ["buffer = 5", "longest = 4"]),
        ("longest=4, buffer=2, unit='lines'", ["unit = 'lines'", "tokens, words, characters"]),
        ("longest=4, buffer=2", ["column completion_length", "unit", "words"]),
    ):
        with refused("length_penalty", *names):
            score(f"length_penalty({options})", "a")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_counts_what_was_there_before(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    value = score(f"repetition(n={n})", " ".join(words))
    assert value == pytest.approx(before / len(grams) if grams else 0)


def test_repetition_is_of_words_in_any_case() -> None:
    assert score("repetition(n=1)", "Go go GO STRASSE\tstraße") == pytest.approx(3 / 5)
    assert score("repetition(n=2)", "A b a B") == pytest.approx(1 / 3)


ANSWERS = {
    "accuracy(tags=True)": ("A", "B"),
    "accuracy(tags=True, unordered=True)": ("A", "A, B"),
    "choice": ("(a)", "B"),
    "choice(unordered=True)": ("A", "AB"),
    "box_iou(column='box')": ("(0,0),(1,1)", "(1,0),(2,1)"),
    "detection(column='box')": ("[0,0,1,1]", ""),
    "grounding": ("image 1 (0,0),(1,1)", "image 2 (0,0),(1,1)"),
    "temporal_iou(column='span')": ("1-2", "2-3"),
    "ordering(kendall=True)": ("A", "B"),
    "frame_index(count=1)": ("<index>2</index>", "<index>3</index>"),
}
PIECES = (
    "<answer>", "</answer>", "(", "1,", " ", "A", "box ", "image 2", "[1,2", "<index>", "</index>", "\n", "and", "->", "-3.5",
    "B", r"\boxed{", "}", "1:02",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_only_the_last_answer_counts(text: str) -> None:
    for spec, answers in ANSWERS.items():
        completions = [f"{text}<answer>{answer}</answer>" for answer in answers]
        assert score(spec, completions, **EVERY_COLUMN) == [1, 0]


@pytest.mark.parametrize(
    "text",
    [
        *(
            piece * 50_000
            for piece in ("(1,", "<answer>", "A, ", " ", "1:", "image ", "[", "option ")
        ),
        "<think>" + "</think>" * 10_000 + r"\boxed{" * 10_000,
    ],
    ids=lambda text: text[:16],
)
def test_a_looping_model_costs_no_time(text: str) -> None:
    start = time.process_time()
    for spec in (
        "choice",
        "grounding",
        "temporal_iou(column='span')",
        "ordering",
        "format_tags",
        "format",
    ):
        score(spec, [text, f"<answer>{text}</answer>"], **EVERY_COLUMN)
    assert time.process_time() - start < 3
