"""Questions for the right sequence: another option is right in another order of the images."""

from __future__ import annotations

from typing import Any

import pytest

from perl.permutation import all_orders, check_answer, num_orders, orders, original_answer, permute
from tests.messages import refused
from tests.permutation.questions import ask

SEQUENCES = (
    "<image> <image> <image> In which order?\nA. 1, 3, 2\nB. 2-1-3\nC. 3, 2, 1\nD. none of these"
)


def test_an_ordering_question_gets_another_right_option() -> None:
    example = ask(SEQUENCES, "B", kind="ordering")
    check_answer(example)
    assert num_orders(example) == 3  # D is no sequence
    right = {permute(example, order).answer for order in all_orders(example, 9, 0)}
    assert right == {"A", "B", "C"}
    written = {"A": (0, 2, 1), "B": (1, 0, 2), "C": (2, 1, 0)}
    for order in orders(example, 3, 5, 1):
        variant = permute(example, order)
        assert variant.messages == example.messages
        # The pictures that the right option lists are those of the original right option.
        assert [variant.images[slot] for slot in written[variant.answer]] == [1, 0, 2]
        assert original_answer(variant, variant.answer) == "2, 1, 3"
        assert original_answer(variant, "D") is None
    assert len({original_answer(permute(example, o), "C") for o in orders(example, 3, 0, 0)}) == 3


def test_two_images_are_a_sequence() -> None:
    example = ask("<image><image> In which order?\nA. 2, 1\nB. 1, 2", "b", kind="ordering")
    assert [permute(example, order).answer for order in all_orders(example, 9, 0)] == ["b", "a"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"question": "<image><image> Which?\nA. 2\nB. 1"}, ["A. 2, 1, 3", "A, B", "kind"]),
        ({"question": "<image><image> Which?\nA. 2, 2\nB. 1, 2"}, ["A. 2, 1, 3", "A, B", "kind"]),
        ({"answer": "D"}, ["'D'", "A. 2, 1, 3", "A, B, C", "kind"]),
        ({"answer": "2, 1, 3"}, ["'2, 1, 3'", "A, B, C", "kind"]),
        ({"question": "<image><image><image> In which order?"}, ["'A'", "sequences: none"]),
        ({"should_change": False}, ["should_change", "true", "kind"]),
    ],
)
def test_bad_ordering_questions(fields: dict[str, Any], names: list[str]) -> None:
    with refused("'q'", "'ordering'", *names):
        check_answer(ask(**{"question": SEQUENCES, "kind": "ordering", **fields}))
