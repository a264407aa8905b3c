"""The letters that a completion settles on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.reading import chosen_letters, letters_in
from tests.permutation.questions import ODD
from tests.rewards.scoring import score, totals

CHOSEN = {
    "B": (
        "<answer>B</answer>", "A or C? <answer> (b) </answer>", "<answer>B. A dog</answer>", "<answer>B) dog</answer>",
        "<answer>Option B</answer>", "<answer>option b.</answer>", "<answer>It shows A dog, so B</answer>",
        "B\n\nExplanation: the dog is shown in B, not A.", "A shows a cat and C a bird.\nB", "The answer to the question is B",
        "The answer is Image B because", "My choice is B", "At first the answer is A. After a second look the answer is B.", "The answer is most likely B.", "The answer is probably (B).", "The answer seems to be B", "The answer's B.", "Hmm, answer: A... wait, actually B.", "B) dog. A) is wrong",
        "<answer>ruled out A and C; B remains</answer>", "<answer>b: dog</answer>", "<answer>b) dog</answer>", "**Answer:** B",
        "Answer\n\nB", "答案：B", "<answer>（B）</answer>", "<answer>It's not A, it's B</answer>", "<answer>A (a cat) is out, so B</answer>",
        "Between A and C, I choose B", "So, B is the correct answer.", r"<answer>\boxed{B}</answer>", "<answer>B over A</answer>",
        "<answer>C</answer> <answer>B</answer>", r"\boxed{\text{B}}", r"\boxed{{B}}", r"\boxed{(\mathbf{B})}", r"\boxed{B}", "<think>A is wrong</think> B", "B.",
        "Maybe (A). No: the answer is B", "<answer>e.g. B</answer>", "<answer>i.e., the second: (B)</answer>",
        "<answer>E.G. option B</answer>", "<answer>B.Dog</answer>",
        "The answer is B. Option A shows a cat.", "The answer is A. Wait, no: the answer is B.", "Answer: B", "**B**", "(b)",
        "B) a dog", "B. a dog", "option B", "The answer is A. Wait, it's B.", "answer: b", "answer = **B**", "So the answer: (b).",
        "The correct choice is (B).", "I would choose B over A", "The answer is B because A is wrong", "It differs.\n\nHence (B)",
        "Is it A, B, C or D? The answer: B", "Option B is correct, and option A is not.", "A. cat\nB. dog\nThe answer is B",
        "<answer>The answer is not A but B</answer>", "<answer>B rather than A</answer>", "<answer>B, because it is a dog</answer>",
        "<answer>B is right, not A</answer>", "<answer>The answer isn't A; it's B</answer>", "<answer>Image B</answer>",
        "<answer>B: a dog</answer>", "<answer>B (a dog)</answer>", "(A) is not, so I choose:\n\n(B)", "Answer: B, not answer: (A)",
        "My final answer is option B!", "It must be B.", "<answer>B!</answer>", "Answer: {B}",
        "The answer is 'B'.", r"Therefore, the answer is \( B \).", "The answer is: <b>B</b>", "Final answer\n\n### B", "Option b is correct", r"\boxed{image b}",
        "I believe the answer might be B", "The answer is therefore B", "If the answer is A, there is a cat. So the answer is B.",
    ),
    "A": (
        "<answer>A is correct</answer>", "<answer>A. dog</answer>", "I pick option A.", "<answer>A</answer> I think", "The answer is A and nothing else",
    ),
    "C": (
        "<answer>The answer is (C)</answer>", "I think that (C) fits", "Option A? No, option C", "(A)? No, (C), like (C) before",
        "<answer>Option C, not option A</answer>", "<answer>(C), not (A)</answer>", "<answer>it is C, not A</answer>",
    ),
    "D": (
        "<answer>A, B, and C are wrong, so D</answer>", "The answer is D. Wait, A shows a cat and C a bird.", "<answer>**D**</answer>", "Which is best? I pick option D.",
    ),
    None: (
        "<answer>B isn't right</answer>", "<answer>Option B is not correct</answer>", "<answer>Not B, C, or D</answer>",
        "<answer>B doesn't fit</answer>", "<answer>any but B</answer>", "<answer>None of the above</answer>", "<answer>B1</answer>",
        "Options A and C show cats", "Image A shows a cat. Image B shows a dog. Therefore, B.", "<answer>A. cat, B. dog</answer>",
        "<answer>A > B > C</answer>", "The answer is either A or B", "The answer is definitely not B", "The answer is probably A or B", "(B) dog because (A) is a cat", "A) cat B) dog", "a) cat b) dog",
        r"\boxed{A or B}", "<answer>A, B, C or D</answer>", r"\boxed{not B}", "<answer>B is wrong</answer>", r"\boxed{A, C}",
        "<answer>It isn't B</answer>", "<answer>anything but B</answer>", "<answer>neither A nor B</answer>", "<answer>A/C</answer>",
        "<answer>all except C</answer>", "<answer>either A or C</answer>", "<answer>A) or B)</answer>", "<answer>Not (A)</answer>",
        "<answer>It can't be B</answer>", "<answer>B can't be it</answer>", "<answer>A cat sits</answer>", r"\boxed{A cat}",
        "I think A cat is there", "(A) or (B)", "The answer is A or B", "The answer is not A.", "Answer Bob", "Answer: a dog",
        "Option A shows a cat, option B a dog", "(A) a cat\n\n(B) a dog\n\n(C) a bird", "A. cat\nB. dog", "I cannot help",
        "The answer is A. The answer is not A.", "<answer>both A and B</answer>", "<answer>AC</answer>", "<answer>I think so</answer>",
        "The image on the left, I believe.", "<answer>A-level</answer>", "<answer>x = A + B</answer>",
        "Choose the correct option:\nA. cat\nB. dog\n\nI see a dog.", "Let me check each option:\nA. cat - no\nB. dog - yes\nC. bird - no",
        "Options: A. cat B. dog C. bird. I see a dog.", "The answer would be A if there was a cat", "If I choose A, it is wrong.",
        "I would not choose A.", "D?", "The answer is E = mc^2", "The answer is A'", "<answer>B+C</answer>", "<answer>A vs B</answer>", "Answer: A|B",
        "Answers: A; C", r"\boxed{B \text{ or } C}", "<answer>A  or  B</answer>", "<answer>B is unlikely</answer>",
        "<answer>a.m.</answer>", "A cat is to be seen.", "<answer>a dog</answer>", "<answer></answer>", ""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("letter", "text"), [(letter, text) for letter, texts in CHOSEN.items() for text in texts]
)
def test_choice_finds_the_letter(letter: str | None, text: str) -> None:
    scores = {gold: score("choice", text, answer=gold) for gold in "ABCD"}
    assert {gold for gold, value in scores.items() if value == 1} == ({letter} - {None})
    if letter:
        assert score("choice", text, answer=f"({letter}) a thing") == 1


@pytest.mark.parametrize("spec", ["choice", "choice(unordered=True)"])
@pytest.mark.parametrize(
    "text",
    ["A, C", "C and A", "A and C", "(c), (a)", "AC", "CA", r"\text{CA}", "C; A.", "e.g. A and C", "(a), i.e. (c)", "A, and C", "Options A and C",
     "The answers are A and C", "both A and C, not B"],
)  # fmt: skip
def test_choice_of_several(text: str, spec: str) -> None:
    for gold in ("A, C", "C, A", "AC", "(A) and (C)"):
        assert score(spec, f"<answer>{text}</answer>", answer=gold) == 1
    for gold in ("A, B, C", "A", "C", "B"):
        assert score(spec, f"<answer>{text}</answer>", answer=gold) == 0
    assert (
        score(spec, r"\boxed{A}", answer="A, C") == score(spec, r"\boxed{CAC}", answer="A, C") == 0
    )
    assert score(spec, "The answers are C and A.", answer="A, C") == 1
    for text in ("A or C", "C, or A", "A or C and B", "A/C"):
        assert score(spec, rf"\boxed{{{text}}}", answer="A, B, C" if "B" in text else "A, C") == 0


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("(A), not (B)", "xyz", "A"),
        ("Z", "wxyz", None),
        ("The answer is D", "xyz", None),
        ("Yes.", ["yes", "yes it is"], "A"),
        ("I say YES it is", ["yes", "yes it is"], None),
        ("I say no way", ["(A) no", "(B) yes"], "A"),
        ("I know", ["(A) no", "(B) yes"], None),
        ("not Image 2", ["Image 1", "Image 2"], None),
        ("Image 2", ["Image 1", "Image 2"], "B"),
        ("A cat sits", ["a cat", "a dog"], "A"),
        ("(A) x", ["x", "y"], "A"),
        ("B:8", ["7", "8"], "B"),
        (r"2*\sqrt{3}", ["8", r"2*\sqrt{3}"], "B"),
        ("Mr B has a dog", ["a cat", "a dog"], "B"),
        ("It is not B, I say it is a dog", ["a cat", "a dog"], None),
        ("yes", ["", "yes"], "B"),
    ],
)
def test_the_option_of_a_text(text: str, options: Any, letter: str | None) -> None:
    assert letters_in(text, len(options), list(options), whole=True) == letter
    assert chosen_letters(f"<think>B</think> {text}", len(options), list(options)) == letter


@given(ODD | st.text(alphabet="ABab ()[]{}.,:?\\n*not or and is answer option", max_size=60))
def test_any_text_chooses_letters_or_none(text: str) -> None:
    for found in (letters_in(text, 4, ["a", "b"]), chosen_letters(text)):
        assert found is None or (found and list(found) == sorted(set(found)))


LOOPS = (
    "A ",
    "(A) or ",
    "not ",
    "answer is ",
    "the ",
    "[",
    "A, ",
    "Answer: ",
    "option ",
    "is ",
    "e.g. ",
    "(A)\n\n",
    "wait, ",
    "\n",
    " ",
)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_looping_completion_takes_no_time(loop: str) -> None:
    text = loop * (100_000 // len(loop))
    start = time.process_time()
    chosen_letters(text, 4, ["a cat", "a dog"]), chosen_letters(f"<answer>{text}</answer>")
    assert time.process_time() - start < 1


def test_choice_without_gold_and_with_a_gold_that_is_none(caplog: Any) -> None:
    scorer, scores = totals("choice", ["A"] * 3, answer=["A", None, "12"])
    np.testing.assert_array_equal(scores, [1, np.nan, np.nan])  # nothing else scores the other two
    assert scorer.faults == {"choice": 0} and not caplog.text


def test_letters_that_are_all_a_text_says_are_a_choice_where_they_are_in_sequence() -> None:
    assert letters_in("AC", whole=True) == chosen_letters("AC") == "AC"
    assert letters_in("CA", whole=True) is chosen_letters("CA") is None and letters_in("CA") == "AC"


def test_choice_is_of_sets() -> None:
    """Where a sequence is asked for, sorted letters would make any one right."""
    forms = [None, "set", "sequence", "values", "sequence"]
    texts, golds = ["A, C"] * 4 + ["C"], ["C, A"] * 4 + ["C"]
    scores = totals("choice", texts, answer=golds, answer_form=forms)[1]
    np.testing.assert_array_equal(scores, [1, 1, np.nan, np.nan, 1])
