"""Where the answer of a completion stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.reading import extract_answer, final_answer, said, stated_answer


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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<answer> A </answer> <answer>B</answer> \boxed{C}", "B"),
        (r"\boxed{A} <answer>It is \boxed{ B }.</answer> \boxed{C}", "B"),
        (r"<answer>A \boxed{B} \boxed{ C }", "C"),
        ("<think>A</think>B</think> C ", "C"),
        (r" A \boxed{B", r"A \boxed{B"),
        ("<answer></answer>", ""),
        ("I say it is B</answer>", "I say it is B</answer>"),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so the answer is 5.", "5"),
        ("The answer: 5 cm. It is long.", "5 cm"),
        ("The answer is 4. No, the answer is 5.", "5"),
        ("It is 5", "It is 5"),
        ("<think>answer: 4</think> 5", "5"),
        (r"The answer is 4, \boxed{5}", "5"),
        ("<answer>the answer is 5</answer>", "the answer is 5"),
        ("Final Answer:\n**5**", "5"),
        ("", ""),
    ],
)
def test_what_a_text_without_a_mark_states(text: str, answer: str) -> None:
    assert stated_answer(text) == answer


def test_what_a_text_says() -> None:
    assert said("one\ntwo") == "two" and said("Answer: {C}") == "C"
