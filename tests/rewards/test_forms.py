"""The form that each reward function reads is the one that it scores."""

from __future__ import annotations

import pytest

from perl.rewards.forms import BOX, READS, Form, fits, forms_of, written
from perl.rewards.scorer import BUILT_IN, Scorer

THINK, ANSWER, INDEX = "<think>", "<answer>", "<index>"


def test_every_function_says_what_it_reads() -> None:
    assert list(READS) == list(BUILT_IN)


@pytest.mark.parametrize(
    ("spec", "forms", "gold"),
    [
        ("accuracy", [{BOX}], "B"),
        ("accuracy(tags=True)", [{ANSWER}], "B"),
        ("format", [{THINK, BOX}], "B"),
        ("format_tags", [{THINK, ANSWER}], "B"),
        ("format_tags(tags=['think', 'index', 'answer'])", [{THINK, INDEX, ANSWER}], "B"),
        ("math", [{BOX}, {ANSWER}], "x + 1"),
        ("ordering", [{BOX}, {ANSWER}], "C, A, B"),
        ("frame_index(count=2)", [{INDEX}], "1, 3"),
    ],
)
def test_a_right_answer_in_its_form_scores_and_in_no_form_does_not(
    spec: str, forms: list[set[str]], gold: str
) -> None:
    if spec == "math":
        pytest.importorskip("math_verify")
    (found,) = forms_of([spec], [1.0]).values()
    assert list(found) == forms
    scorer = Scorer((spec,), (1.0,))
    texts = [written(gold, form) for form in found]
    texts += [
        f"It is {gold}, I think.",
        *(written(gold, form - {m}) for form in found for m in form),
    ]
    columns = {"answer": [gold] * len(texts), "order": [[0, 1, 2]] * len(texts)}
    totals, _ = scorer.score([""] * len(texts), texts, columns)
    right = len(found)
    assert totals[:right].tolist() == [1.0] * right and totals[right] == 0
    if right == 1:  # Without one of its marks.
        assert not totals[right:].any()


@pytest.mark.parametrize(
    ("spec", "gold"), [("choice", "B"), ("box_iou", "(1,2),(3,4)"), ("temporal_iou", "2 to 6 s")]
)
def test_what_needs_no_form_finds_the_answer_anyhow(spec: str, gold: str) -> None:
    assert forms_of([spec], [1.0]) == {spec: ()}
    texts = [f"The answer: {gold}", written(gold, {THINK, ANSWER}), written(gold, {THINK, BOX})]
    totals, _ = Scorer((spec,), (1.0,)).score([""] * 3, texts, {"answer": [gold] * 3})
    assert totals.tolist() == [1.0] * 3


def test_ones_own_functions_and_those_without_weight_need_none() -> None:
    own = "nowhere.py:share_of_b"
    assert forms_of(["accuracy", own], []) == {"accuracy": (Form({BOX}),), "share_of_b": ()}
    assert forms_of([own, "format", "accuracy"], [1.0, 0.0, 0.5]) == {
        "share_of_b": (),
        "accuracy": (Form({BOX}),),
    }


def test_a_text_mentions_all_marks_of_one_form() -> None:
    forms = [Form({THINK, BOX}), Form({ANSWER})]
    assert fits(forms, r"<think> ... </think> \boxed{}") and fits(forms, "in <answer> tags")
    assert not fits(forms, r"put it in \boxed{}") and not fits((), r"<answer> \boxed{}")
    assert written("B", {THINK, INDEX, ANSWER, BOX}) == (
        r"<think>...</think><index>B</index><answer>\boxed{B}</answer>"
    )
