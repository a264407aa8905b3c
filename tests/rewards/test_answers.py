"""Completions that give the gold answer, and the form of completions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.answers import accuracy, format_reward, format_tags

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def test_accuracy_scores_each_completion() -> None:
    texts = [r"\boxed{B}", r"\boxed{A}", "B", r"\boxed{B}"]
    assert accuracy(["q"] * 4, texts, ["B", "B", "B", None]) == [1.0, 0.0, 0.0, None]


def test_accuracy_of_tags_and_of_sets() -> None:
    texts = ["<answer>A</answer> <answer> (c) and A. </answer>", r"<answer>C, A \boxed{A, C}"]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2) == [0, 1]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True) == [1, 0]
    assert accuracy(["q"], [r"<answer>\boxed{42}</answer>"], ["42"], tags=True) == [1]
    assert accuracy(["q"], texts[:1], ["A, B"], tags=True) == [0]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True, unordered=True) == [1, 0]
    assert accuracy(["q"], [r"\boxed{A}"], ["A, C"], unordered=True) == [0]
    assert accuracy(["q"], [r"\boxed{2; 1}"], ["1,2"], unordered=True) == [1]


def test_accuracy_of_a_box_in_tags() -> None:
    texts = [r"<answer>\boxed{B}</answer>", r"<answer>so \boxed{A}</answer>", "<answer>B</answer>"]
    assert accuracy(
        ["q"] * 3, texts, ["B", r"<answer>\boxed{A}</answer>", r"\boxed{B}"], tags=True
    ) == [1, 1, 1]


def test_accuracy_of_lists_whose_form_is_known() -> None:
    texts, golds = [r"\boxed{B, A}", r"\boxed{C, A}"] * 3, ["A, B", "A, C"] * 3
    forms = [None, None, "set", "sequence", "free text", "values"]
    assert accuracy(["q"] * 6, texts, golds, answer_form=forms) == [0, 1, 1, 0, 0, 0]
    assert accuracy(["q"] * 6, texts, golds, answer_form=forms, unordered=True) == [1] * 6


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
