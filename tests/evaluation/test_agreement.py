"""Agreement across orders: the same picture, however its slot is called."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from perl.data.labelling.rules import label_by_rules
from perl.evaluation.agreement import Reading, agreement, chosen_picture, group_agreement
from perl.permutation import all_orders, answer_form, permute
from perl.rewards.scorer import load_reward
from perl.types import EncodedPrompt, Example, Group, Rollout
from tests.data.labelling.test_questions import QUESTIONS, example_of

PICTURES = tuple(Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue"))
EXAMPLE = Example("e", PICTURES, "A <image> B <image> C <image> which image shows red ?", "A")


def rollout(order: tuple[int, ...], text: str, example: Example = EXAMPLE) -> Rollout:
    empty = np.zeros(0, np.int64)
    prompt = EncodedPrompt(empty, np.zeros((3, 0), np.int64), 0, (), 0)
    return Rollout(permute(example, order), prompt, empty, empty, text, True)


def chosen(rollout: Rollout, function: str = "accuracy") -> str | None:
    reading = Reading.of(load_reward(function))
    assert reading
    return chosen_picture(rollout, reading)


def test_the_same_picture_under_different_letters() -> None:
    here, there = rollout((0, 1, 2), r"\boxed{ A }"), rollout((2, 0, 1), r"\boxed{ B }")
    assert chosen(here) == chosen(there)
    assert chosen(rollout((2, 0, 1), r"\boxed{ A }")) != chosen(here)


@pytest.mark.parametrize(
    ("text", "picture"),
    [
        (r"\boxed{ A }", "c"),
        (r"A \boxed{ 2 } \boxed{ Image 3 }", "2"),
        *((text, None) for text in ("", "A", r"\boxed{ Z }", r"\boxed{", r"\boxed{ a cat }")),
    ],
)
def test_an_answer_that_names_no_picture_is_none(text: str, picture: str | None) -> None:
    """In an order that shows the third picture first; pictures by their place in the data."""
    assert chosen(rollout((2, 0, 1), text)) == picture


def test_answers_that_stay_are_compared_as_they_are() -> None:
    example = Example("e", PICTURES, "<image> <image> <image> how many ?", "2", should_change=False)
    assert chosen(rollout((1, 0, 2), r"\boxed{ 2 }", example)) == "2"


WHICH, ORDER, RANKS, MANY = (
    f"A <image> B <image> C <image> {asked}"
    for asked in (
        "Which images show red?",
        "In which order were they taken?",
        "Rank the images: give for each image in turn its rank.",
        "Which numbers are on the signs?",
    )
)


@pytest.mark.parametrize(
    ("question", "function", "here", "there", "same"),
    [
        # There the slots show the pictures C, A, B.
        (WHICH, "accuracy", r"\boxed{A, C}", r"\boxed{A and B}", True),
        (WHICH, "accuracy", r"\boxed{C, A}", r"\boxed{B, A}", True),
        (WHICH, "accuracy", r"\boxed{A, C}", r"\boxed{A, C}", False),
        (WHICH, "choice", "<answer>(C) and (A)</answer>", "The answer is A and B.", True),
        (ORDER, "accuracy", r"\boxed{C, A, B}", r"\boxed{A, B, C}", True),
        (ORDER, "accuracy", r"\boxed{A, B, C}", r"\boxed{A, B, C}", False),
        (ORDER, "accuracy", r"\boxed{A, C, B}", r"\boxed{A, B, C}", False),
        (ORDER, "accuracy(unordered=True)", r"\boxed{A, C, B}", r"\boxed{A, B, C}", True),
        (ORDER, "ordering", r"C > A > B", r"\boxed{A, B, C}", True),
        (WHICH, "accuracy(tags=True)", r"\boxed{A}<answer>B</answer>", "<answer>C</answer>", True),
        (RANKS, "accuracy", r"\boxed{2, 3, 1}", r"\boxed{1, 2, 3}", True),
        (RANKS, "accuracy", r"\boxed{2, 3, 1}", r"\boxed{3, 1, 2}", False),
        (WHICH, "accuracy(tags=True)", r"\boxed{A}", r"\boxed{B}", None),
        (WHICH, "choice", r"\boxed{CA}", r"\boxed{AB}", True),
        (WHICH, "choice", r"\boxed{A or B}", r"\boxed{not B}", None),
        (WHICH, "math", "<answer>C</answer>", "So the answer is (A).", True),
        (WHICH, "accuracy", r"\boxed{\text{C}}", r"\boxed{A. a cat}", True),
        (WHICH, "accuracy", r"\boxed{\text{A and C}}", r"\boxed{AB}", True),
        (WHICH, "accuracy", r"\boxed{\textbf{B:}}", r"\boxed{(C) a cat, A: a dog}", False),
        (ORDER, "math", r"\boxed{A, C}", r"\boxed{A, B}", False),
        (ORDER, "math", r"\boxed{C, A}", r"\boxed{A, B}", True),
        (MANY, "ordering", r"\boxed{5, 7}", r"\boxed{7, 5}", False),
        (MANY, "accuracy", r"\boxed{5, 7}", r"\boxed{7, 5}", True),
        (MANY, "accuracy", r"\boxed{B}", r"\boxed{B. a dog}", True),
        (MANY, "accuracy", r"\boxed{5 cm}", r"\boxed{5}", True),
        (MANY, "accuracy", r"\boxed{B. a cat}", r"\boxed{B. a dog}", False),
    ],
)
def test_choices_are_read_and_compared_as_rewards_do(
    question: str, function: str, here: str, there: str, same: bool | None
) -> None:
    gold = "5, 7" if question == MANY else "A, B, C"
    example = Example("e", PICTURES, question, gold, should_change=question != MANY)
    reading = Reading.of(load_reward(function))
    assert reading
    one = chosen(rollout((0, 1, 2), here, example), function)
    other = chosen(rollout((2, 0, 1), there, example), function)
    alike = reading.same_in(example)
    assert (alike(one, other) if one and other else None) == same
    assert agreement([[one], [other]], alike) == bool(same)


def test_an_option_that_stands_for_a_sequence_is_compared_as_one() -> None:
    example = Example("e", PICTURES, "In which order? A. 2, 3 B. 3, 2", "A", "ordering")
    reading = Reading.of(load_reward("accuracy(unordered=True)"))
    assert reading and reading.same_in(example)("2, 3", "2, 3")
    assert not reading.same_in(example)("2, 3", "3, 2")


def test_formulas_are_equal_by_their_values() -> None:
    """Of six pairs from two orders four are equal; nothing said equals nothing."""
    reading = Reading.of(load_reward("math"))
    assert reading
    same = reading.same_in(EXAMPLE)
    picks = [[r"2\sqrt{3}", r"\sqrt{12}"], [r"\sqrt{4 \cdot 3}", r"\sqrt{12}", None]]
    assert agreement(picks, same) == pytest.approx(4 / 6)
    assert agreement(picks) == pytest.approx(1 / 6)


def test_agreement_counts_pairs_from_different_orders() -> None:
    assert agreement([["x"], ["x"], ["x"]]) == 1
    assert agreement([["x"], ["y"], ["x"]]) == pytest.approx(1 / 3)
    assert agreement([["x", "y"], ["x", "y"]]) == 0.5
    assert agreement([["x", "x"], ["y", "y"]]) == 0  # equal within an order is not consistency
    assert agreement([[None], [None]]) == 0
    assert math.isnan(agreement([["x", "x"]]))
    assert math.isnan(agreement([]))


def test_a_group_compares_its_orders() -> None:
    """a, c and none against c and c: two of six pairs are equal."""
    texts = {(0, 1, 2): ("A", "C", ""), (2, 0, 1): ("A", "A")}
    rollouts = tuple(rollout(order, rf"\boxed{{{t}}}") for order, ts in texts.items() for t in ts)
    none = np.zeros(0)
    assert group_agreement(
        Group(EXAMPLE, (), rollouts, none, {}, none), Reading()
    ) == pytest.approx(2 / 6)


@pytest.mark.parametrize("function", ["accuracy", "choice", "math", "ordering"])
@pytest.mark.parametrize("way", ["{}", r"\text{{{}}}", "{}."])
def test_right_answers_in_every_order_are_right_and_agree(function: str, way: str) -> None:
    """Of questions that the rules let move: where a function scores the right answers, they are right and chose the same."""
    found = load_reward(function)
    reading = Reading.of(found)
    assert reading
    scored = 0
    for row in QUESTIONS:
        bare = example_of(row)
        label = label_by_rules(bare, "slots")
        example = replace(bare, kind=label.kind, should_change=label.should_change)
        form = answer_form(example)
        if label.kind == "none" or (function == "ordering" and form != "sequence"):
            continue
        rollouts = [
            rollout(order, rf"\boxed{{{way.format(permute(example, order).answer)}}}", example)
            for order in all_orders(example, 4, 0)
        ]
        texts = [r.text for r in rollouts]
        answers = [r.variant.answer for r in rollouts]
        columns = {"prompts": texts, "completions": texts, "answer": answers}
        scores = found(columns | {"answer_form": [form] * len(texts)}, {})
        if None not in scores:
            scored += 1
            picks = [[chosen_picture(r, reading)] for r in rollouts]
            same = agreement(picks, reading.same_in(example))
            assert (set(scores), same) == ({1}, 1), (row, texts)
    assert scored >= {"choice": 40, "ordering": 3}.get(function, 100)
