"""Answers read out of completions and compared, and the form of completions."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.answers import (
    accuracy,
    extract_answer,
    final_answer,
    format_reward,
    format_tags,
    items_of,
    normalise,
    same_answer,
)

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{B}", "B"),
        (r"</think> \boxed{ B }", "B"),
        (r"\boxed {B}", "B"),
        (r"\boxed{A} no, \boxed{C}.", "C"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", ""),
        (r"\boxed{A} \boxed{B", None),
        (r"\boxed{\text{A}", None),
        ("boxed{B}", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(alphabet="{}\\boxed ab", max_size=60))
def test_extract_answer_survives_any_text(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer in text
    normalise(answer or "")


EQUAL = (
    ("B", "b", "(B)", "(b).", "B.", "option B", r"\text{B}", "$B$"),
    ("2", "Image 2", "image2", "2.0"),
    ("1/2", "0.50", "0.5", r"\frac{1}{2}"),
    ("-.5", r"-\dfrac{1}{2}"),
    ("3", "+3"),
    ("-3", "\u22123"),
    ("1234", "1,234", "+1,234.0"),
    ("1234567.5", "1,234,567.5"),
    ("(A) or (B)", "(a)  or (B)."),
    ("7", "007", "0" * 63 + "7"),
    ("0" * 64 + "7", "image " + "0" * 64 + "7"),
    ("A, C", "A,C", "(A), (C)", "(A, C)"),
    ("1,3,2", "[1, 3, 2]"),
    ("A red car", "a  Red   car."),
)


@pytest.mark.parametrize("alike", EQUAL, ids=lambda alike: alike[0])
def test_same_answers(alike: tuple[str, ...]) -> None:
    for given_, gold in itertools.product(alike, (*alike, rf"\boxed{{{alike[0]}}}")):
        assert same_answer(given_, gold), (given_, gold)
    others = [answer for other in EQUAL if other is not alike for answer in other]
    assert not any(same_answer(alike[0], other) for other in others)


@pytest.mark.parametrize(
    ("given_", "gold"),
    [
        (None, "B"), ("", "B"), ("A", "B"), ("BB", "B"), ("images", "s"), ("C, A", "A, C"), ("2", "3"), ("1/0", "1"),
        ("1/3", "0.333"), ("12", "1,2"), ("1e3", "1000"), ("9" * 100_000, "9" * 99_999),
    ],
)  # fmt: skip
def test_different_answers(given_: str | None, gold: str) -> None:
    assert not same_answer(given_, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<answer> A </answer> <answer>B</answer> \boxed{C}", "B"),
        (r"<answer>A \boxed{B} \boxed{ C }", "C"),
        ("<think>A</think>B</think> C ", "C"),
        (r" A \boxed{B", r"A \boxed{B"),
        ("<answer></answer>", ""),
        ("I say it is B</answer>", "I say it is B</answer>"),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_items_of_a_list() -> None:
    for text in ("A, c and 02", "[a; C; 2.]", "(A) > (C) > (2)", "a→c->2", "A<C&2", "A,, C AND 2,"):
        assert items_of(text) == ["a", "c", "2"]


def test_accuracy_scores_each_completion() -> None:
    texts = [r"\boxed{B}", r"\boxed{A}", "B", r"\boxed{B}"]
    assert accuracy(["q"] * 4, texts, ["B", "B", "B", None]) == [1.0, 0.0, 0.0, None]


def test_accuracy_of_tags_and_of_sets() -> None:
    texts = ["<answer>A</answer> <answer> (c) and A. </answer>", r"<answer>C, A \boxed{A, C}"]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2) == [0, 1]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True) == [0, 0]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True, unordered=True) == [1, 0]
    assert accuracy(["q"], [r"\boxed{A}"], ["A, C"], unordered=True) == [0]
    assert accuracy(["q"], [r"\boxed{2; 1}"], ["1,2"], unordered=True) == [1]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>x</think><answer>B</answer>", 1),
        ("\n<think>\nx</think>\n <answer>B</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>x</think> so <answer>B</answer>", 0),
        ("<think>x</think><answer>B</answer> !", 0),
        ("<think>x</think><answer>B</answer><answer>C</answer>", 0),
        ("<think><think>x</think><answer>B</answer>", 0),
        ("<answer>B</answer><think>x</think>", 0),
        ("<think>x</think><answer>B", 0),
        ("<think>x</think><index>1</index><answer>B</answer>", 0),
        ("", 0),
    ],
)
def test_format_of_tags(text: str, score: float) -> None:
    assert format_tags(["q"], [text]) == [score]
    three = text.replace("<answer>", "<index>1</index><answer>")
    assert format_tags(["q"], [three], tags=("think", "index", "answer")) == [score]
    others = text.replace("think>", "index>").replace("answer>", "box>")
    assert format_tags(["q"], [others], tags=("index", "box")) == [score]


@given(st.lists(st.sampled_from(["<think>", "</think>", r"\boxed{", "}", "x", "\n"]), max_size=8))
def test_format_is_the_expression(parts: list[str]) -> None:
    text = "".join(parts)
    assert format_reward(["q"], [text]) == [float(bool(FORMAT.fullmatch(text)))]
