"""Orders and re-indexed answers: the picture an answer names stays the same picture."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation.orders import is_permuted, rate_at, shares
from perl.permutation.permute import (
    LETTERS,
    all_orders,
    check_answer,
    check_moves,
    letter_slots,
    movable,
    named_images,
    num_orders,
    orders,
    original_answer,
    permute,
    released_orders,
    unpermute_answer,
)
from perl.types import Example, Message, UserError


def make_example(count: int, answer: str = "A", **fields: Any) -> Example:
    """An example whose images are the numbers 0, 1, ..., enough for what is tested here."""
    return Example(
        **{
            "id": "q1",
            "images": tuple(range(count)),
            "question": " ".join(f"{letter} <image>" for letter in LETTERS[:count]),
            "answer": answer,
            **fields,
        }
    )


@st.composite
def kinds(draw: st.DrawFn, count: int) -> str:
    simple = ["all", "first_fixed", "none", f"last:{draw(st.integers(1, count))}"]
    slots = draw(st.permutations(range(1, count + 1)))
    cut = draw(st.integers(1, count))
    blocks = [slots[:cut], slots[cut:]]
    written = "/".join(",".join(map(str, block)) for block in blocks if block)
    return draw(st.sampled_from([*simple, f"blocks:{written}"]))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    count = draw(st.integers(1, 26))
    named = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    style = draw(st.sampled_from(["{L}", "({l})", "Image {n}", "{n}", "image {n}.", "[{L}]"]))
    answer = ", ".join(style.format(L=LETTERS[i], l=LETTERS[i].lower(), n=i + 1) for i in named)
    return make_example(count, answer, kind=draw(kinds(count)))


@given(examples(), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_orders_are_distinct_reproducible_and_of_their_kind(
    example: Example, n: int, seed: int, epoch: int
) -> None:
    got = orders(example, n, seed, epoch)
    count = len(example.images)
    assert got == orders(example, n, seed, epoch)
    assert got[0] == tuple(range(count))
    assert len(got) == len(set(got)) == min(n, num_orders(example))
    home = {slot: b for b, block in enumerate(movable(example.kind, count)) for slot in block}
    for order in got:
        assert sorted(order) == list(range(count))
        for slot, original in enumerate(order):
            assert slot == original or home[slot] == home[original]


@given(examples(), st.integers(0, 5))
def test_the_answer_follows_its_pictures_and_back(example: Example, seed: int) -> None:
    letters = letter_slots(example)
    named = named_images(example.answer, len(example.images), letters)
    assert named is not None
    for order in orders(example, 4, seed, 0):
        variant = permute(example, order)
        now = named_images(variant.answer, len(order), letters)
        assert now is not None
        assert [variant.images[slot] for slot in now] == [example.images[slot] for slot in named]
        assert original_answer(variant, variant.answer) == example.answer
        assert unpermute_answer(variant.answer, order, True) == example.answer


ODD = st.text(alphabet="ſKİı²①٣३ABab12,. ()", max_size=12)
"""Letters and digits that other scripts fold to, or count as, those of ASCII."""


@given(st.text(max_size=40) | ODD, st.permutations(range(4)))
def test_any_model_output_is_survived(text: str, order: list[int]) -> None:
    result = unpermute_answer(text, order, True)
    named = named_images(text, 4, range(4))
    assert (result is None) == (named is None)


def test_the_example_of_the_types_swaps() -> None:
    example = make_example(2, "B", images=("cat", "dog"))
    variant = permute(example, (1, 0))
    assert variant.images == ("dog", "cat")
    assert variant.answer == "A"
    assert variant.messages == example.messages  # slots: the text stays


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        ("A", "C"),
        ("b", "a"),
        ("(C)", "(B)"),
        ("Image 2", "Image 1"),
        ("image 3.", "image 2."),
        ("1", "3"),
        ("A, C", "C, B"),
        ("1, 3, 2", "3, 2, 1"),
        ("A and B", "C and A"),
        ("[2, 1]", "[1, 3]"),
        (" B ", " A "),
    ],
)
def test_every_shape_of_answer(answer: str, after: str) -> None:
    order = (1, 2, 0)  # the first image now stands third
    assert permute(make_example(3, answer), order).answer == after
    assert unpermute_answer(after, order, True) == answer


@pytest.mark.parametrize("answer", ["D", "4", "0", "Image 9", "A, D", "yes", "", "AB", "the dog"])
def test_an_answer_that_names_no_image_is_an_error(answer: str) -> None:
    example = make_example(3, answer)
    match = rf"'q1': answer '{answer}' names none of its 3 images.*should_change to false"
    with pytest.raises(UserError, match=match):
        permute(example, (1, 0, 2))
    with pytest.raises(UserError, match=match):
        check_answer(example)
    assert unpermute_answer(answer, (1, 0, 2), True) is None


def test_an_answer_that_stays_is_left_alone() -> None:
    example = make_example(3, "yes", should_change=False)
    check_answer(example)
    assert permute(example, (2, 1, 0)).answer == "yes"
    assert unpermute_answer("anything", (2, 1, 0), False) == "anything"
    assert unpermute_answer(None, (1, 0), True) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A. <image> B. <image> Which image shows a dog?", "B"),
        ("A. <image> B. <image> Which image shows a dog?", "(b)"),
        ("(A) <image> (B) <image> Which images show a dog?", "A, B"),
        ("<image> <image> Which image shows a dog?", "Image 2"),
        ("<image> <image> Which image shows a dog?", "image B"),
        ("<image> <image> Which image shows a dog?", "It is the second picture."),
        ("<image> <image> Which shows a dog? A. Image 1 B. Image 2", "B. Image 2"),
    ],
)
def test_an_answer_that_names_an_image_may_not_stay(question: str, answer: str) -> None:
    example = make_example(2, answer, question=question, should_change=False)
    match = (
        r"'q1': should_change is false, but answer '.*' names image \d, which may move; set should_"
    )
    for refuse in (check_answer, lambda e: permute(e, (1, 0)), lambda e: check_moves(e, "slots")):
        with pytest.raises(UserError, match=match):
            refuse(example)
    check_answer(dataclasses.replace(example, should_change=True))
    check_answer(dataclasses.replace(example, kind="none"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A. <image> B. <image> How many images show a dog?", "2"),
        ("A. <image> B. <image> Do both images show a dog?", "no"),
        ("Image 1: <image> Image 2: <image> How many images show a dog?", "2"),
        ("<image> <image> Which letter is in both images?", "B"),
        ("A <image> B <image> What is in both images?\nA. a cat\nB. a dog", "B"),
        ("<image> <image> What is in both images?\nA. a cat\nB. a dog", "B"),
        ("<image> <image> Where was the runner in both races?", "second"),
    ],
)
def test_an_answer_that_may_mean_something_else_may_stay(question: str, answer: str) -> None:
    example = make_example(2, answer, question=question, should_change=False)
    check_moves(example, "slots")
    assert permute(example, (1, 0)).answer == answer


def test_an_image_that_keeps_its_place_may_be_named() -> None:
    question = "A. <image> B. <image> C. <image> Which is the map?"
    example = make_example(3, "A", question=question, kind="first_fixed", should_change=False)
    check_moves(example, "slots")


def test_a_text_answer_is_fine_where_nothing_can_move() -> None:
    check_answer(make_example(1, "forty-two"))
    check_answer(make_example(3, "forty-two", kind="none"))
    assert permute(make_example(1, "forty-two"), (0,)).answer == "forty-two"


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no permutation of the 3 images"):
        permute(make_example(3), (0, 1))


@pytest.mark.parametrize(
    ("kind", "question", "slots"),
    [
        ("all", "<image><image><image>", (0, 1, 2)),
        ("first_fixed", "<image> Which is alike? <image> <image>", (1, 2)),
        ("last:2", "<image> then? <image> <image>", (1, 2)),
        ("first_fixed", "A <image> B <image> C <image>", (0, 1, 2)),  # labels decide
        ("first_fixed", "Look: <image> (A) <image> (B): <image>", (1, 2)),
        ("all", "Look: <image>\nA. <image>\nB. <image>", (1, 2)),
        ("all", "B <image> A <image> C <image>", (1, 0, 2)),
        ("all", "I <image> see <image> <image>", (0, 1, 2)),
        (
            "all",
            (Message("system", "Hi"), Message("user", "A)<image> B)<image> C)<image>")),
            (0, 1, 2),
        ),
    ],
)
def test_what_letters_name(kind: str, question: Any, slots: tuple[int, ...]) -> None:
    assert letter_slots(make_example(3, kind=kind, question=question)) == slots


def test_letters_of_options_follow_their_pictures() -> None:
    question = "<image> Which is alike? <image> <image>"
    example = make_example(3, "A", kind="first_fixed", question=question)
    variant = permute(example, (0, 2, 1))
    assert variant.answer == "B"
    assert original_answer(variant, "B") == "A"
    assert original_answer(variant, "Image 2") == "Image 3"
    with pytest.raises(
        UserError, match=r"answer 'C' names none of its 3 images \(A to B or 1 to 3\)"
    ):
        permute(make_example(3, "C", kind="first_fixed", question=question), (0, 2, 1))


def test_a_letter_cannot_follow_to_a_slot_without_one() -> None:
    example = make_example(3, "A", question="See <image> A: <image> B: <image>")
    with pytest.raises(UserError, match="moves to a slot that has no letter"):
        permute(example, (1, 0, 2))


def test_many_images() -> None:
    example = make_example(32, "31", question="<image>" * 32)
    got = orders(example, 50, 0, 0)
    assert len(set(got)) == 50
    assert num_orders(example) == math.factorial(32)
    assert permute(example, got[1]).answer == str(got[1].index(30) + 1)


def test_orders_depend_on_seed_epoch_and_example_alone() -> None:
    one, other = make_example(8), make_example(8, id="q2")
    assert orders(one, 4, 0, 0) == orders(make_example(8, answer="C"), 4, 0, 0)
    different = {tuple(orders(e, 4, s, k)) for e in (one, other) for s in (0, 1) for k in (0, 1)}
    assert len(different) == 8
    code = (
        "from perl.permutation.permute import *; from perl.types import Example;"
        "print(orders(Example('q1', (0,) * 8, '', 'A'), 4, 0, 0))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == str(orders(one, 4, 0, 0))


def test_all_orders_are_all_or_a_sample() -> None:
    assert sorted(all_orders(make_example(4), 24, 0)) == sorted(
        set(all_orders(make_example(4), 24, 0))
    )
    assert len(all_orders(make_example(4), 24, 0)) == 24
    sampled = all_orders(make_example(5), 24, 0)
    assert len(set(sampled)) == 24 and sampled[0] == (0, 1, 2, 3, 4)
    assert all_orders(make_example(3, kind="none"), 24, 0) == [(0, 1, 2)]
    assert all_orders(make_example(2), 1, 0) == [(0, 1)]


def test_orders_are_drawn_evenly() -> None:
    seen = {tuple(orders(make_example(3, id=str(i)), 2, 0, 0)[1]) for i in range(100)}
    assert len(seen) == 5  # every order but the original


def test_no_order_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="n=0"):
        orders(make_example(3), 0, 0, 0)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("some", "unknown kind 'some'; use all, first_fixed"),
        ("", "unknown kind"),
        ("last:0", "needs 1 to 3 images"),
        ("last:4", "needs 1 to 3 images"),
        ("last:x", "unknown kind"),
        ("blocks:", "unknown kind"),
        ("blocks:1,1", "names a slot twice"),
        ("blocks:1,2/2,3", "names a slot twice"),
        ("blocks:0,1", "outside 1..3"),
        ("blocks:1,4", "outside 1..3"),
        ("blocks:1,,2", "unknown kind"),
    ],
)
def test_bad_kinds(kind: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        num_orders(make_example(3, kind=kind))


def test_the_last_of_no_images() -> None:
    with pytest.raises(UserError, match=r"kind 'last:2' .* there are no images"):
        num_orders(make_example(0, kind="last:2", question="Why?"))


@given(ODD, st.permutations(range(3)))
def test_any_output_to_a_question_with_options_is_survived(text: str, order: list[int]) -> None:
    question = "<image><image><image> Which?\nA. Image 2\nB. Image 1\nC. Image 3\nD. none"
    for options in (question, "<image><image><image> Which?"):
        for mode in ("slots", "references"):
            variant = permute(make_example(3, "A", question=options, kind="none"), order, mode)
            original_answer(variant, text)


@st.composite
def mentioning(draw: st.DrawFn) -> tuple[Example, Any]:
    """A question over labelled slots, or with options that name one image each, and a way to keep it consistent.

    Where texts follow, it names images besides.
    """
    mode = draw(st.sampled_from(["slots", "references"]))
    count = draw(st.integers(2, 6))
    said = "all this"
    if mode == "references":
        said = " ".join(f"image {draw(st.integers(1, count))}" for _ in range(2))
    if draw(st.booleans()):
        slots = " ".join(f"{letter} <image>" for letter in LETTERS[:count])
        question = f"{slots} Is {said} alike?"
    else:
        listed = draw(st.permutations(range(1, count + 1)))
        options = "\n".join(f"{k}. Image {n}" for k, n in zip(LETTERS, listed, strict=False))
        question = f"{'<image>' * count} Given {said}, which?\n{options}"
    answer = draw(st.sampled_from([*LETTERS[:count], "2", "Image 1"]))
    return make_example(count, answer, question=question, kind=draw(kinds(count))), mode


@given(mentioning(), st.integers(0, 3))
def test_permuting_back_is_the_identity(drawn: tuple[Example, Any], seed: int) -> None:
    example, text = drawn
    for order in orders(example, 3, seed, 0):
        variant = permute(example, order, text)
        there = dataclasses.replace(
            example, images=variant.images, question=variant.messages, answer=variant.answer
        )
        inverse = tuple(order.index(image) for image in range(len(order)))
        back = permute(there, inverse, text)
        assert (back.images, back.messages, back.answer) == (
            example.images,
            example.messages,
            example.answer,
        )


@given(mentioning(), st.integers(0, 3))
def test_an_answer_names_the_same_picture_in_every_order(
    drawn: tuple[Example, Any], seed: int
) -> None:
    example, text = drawn
    (named,) = named_images(example.answer, len(example.images), letter_slots(example)) or ()
    for order in orders(example, 3, seed, 0):
        variant = permute(example, order, text)
        shown = dataclasses.replace(example, images=variant.images, question=variant.messages)
        # Letters are read off the text that the model sees.
        (now,) = named_images(variant.answer, len(order), letter_slots(shown)) or ()
        assert variant.images[now] == example.images[named]
        assert original_answer(variant, variant.answer) == example.answer


SEQUENCES = (
    "<image> <image> <image> In which order?\nA. 1, 3, 2\nB. 2-1-3\nC. 3, 2, 1\nD. none of these"
)


def test_an_ordering_question_gets_another_right_option() -> None:
    example = make_example(3, "B", question=SEQUENCES, kind="ordering")
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


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"answer": "D"}, "letter of an option such as 'A. 2, 1, 3'.*sequences: A, B, C"),
        ({"answer": "2, 1, 3"}, "letter of an option"),
        ({"answer": "A", "question": "<image><image><image> In which order?"}, "sequences: none"),
        ({"answer": "A", "should_change": False}, "should_change is false"),
    ],
)
def test_bad_ordering_questions(fields: dict[str, Any], match: str) -> None:
    example = make_example(3, **{"question": SEQUENCES, "kind": "ordering", **fields})
    with pytest.raises(UserError, match=match):
        check_answer(example)


def test_the_released_code_has_one_order_per_number_of_images() -> None:
    """The values are those that random.seed(42); random.shuffle gives before every call."""
    for count, order in ((2, (1, 0)), (3, (1, 0, 2)), (4, (2, 1, 3, 0)), (5, (3, 1, 2, 4, 0))):
        example = make_example(count)
        assert released_orders(example) == [tuple(range(count)), order]
    assert released_orders(make_example(3, kind="first_fixed")) == [(0, 1, 2), (0, 2, 1)]
    assert released_orders(make_example(1)) == [(0,)]


def test_the_rate_falls_as_its_schedule_says() -> None:
    assert [rate_at(0.8, "constant", p) for p in (0, 0.5, 1)] == [0.8, 0.8, 0.8]
    assert [rate_at(0.8, "linear", p) for p in (0, 0.5, 1)] == pytest.approx([0.8, 0.4, 0])
    assert [rate_at(1, "cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [rate_at(1, "released", p) for p in (0, 0.97, 0.98)] == [1, 1, 0.05]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_the_coin_is_the_examples_own(one: float, other: float, epoch: int) -> None:
    low, high = sorted((one, other))
    example = make_example(3)
    assert is_permuted(example, low, 0, epoch) <= is_permuted(example, high, 0, epoch)
    assert not is_permuted(example, 0, 0, epoch) and is_permuted(example, 1, 0, epoch)


def test_the_rate_is_the_share_of_examples_that_are_permuted() -> None:
    permuted = [is_permuted(make_example(3, id=str(i)), 0.3, 0, 0) for i in range(2000)]
    assert sum(permuted) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard errors


@given(st.integers(1, 100), st.integers(1, 30))
def test_rollouts_are_shared_out_evenly(total: int, parts: int) -> None:
    got = shares(total, parts)
    assert sum(got) == total and len(got) == parts and max(got) - min(got) <= 1


@pytest.mark.parametrize(
    ("question", "fields"),
    [
        (
            "<image><image> Is image 2 brighter than image 1?",
            {"answer": "yes", "should_change": False},
        ),
        ("<image><image><image> Which is like the first image?", {"answer": "B"}),
        ("A <image> B <image> Which is unlike image A?", {"answer": "B"}),
    ],
)
def test_slots_refuse_a_text_that_names_an_image_that_moves(
    question: str, fields: dict[str, Any]
) -> None:
    count = question.count("<image>")
    example = make_example(count, question=question, **fields)
    with pytest.raises(
        UserError, match=r"its text names image [12], which moves; set permutation.text"
    ):
        check_moves(example, "slots")
    check_moves(example, "references")
    if count == 3:  # It stays where the first is fixed.
        check_moves(dataclasses.replace(example, kind="first_fixed"), "slots")
    blocks = dataclasses.replace(example, kind="blocks:1,2")
    if not example.should_change:
        check_moves(blocks, "slots")  # whoever writes blocks knows what the text says of them
