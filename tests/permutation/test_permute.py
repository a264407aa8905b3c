"""Permuting: the picture that an answer names stays the same picture, or the example is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import (
    LETTERS,
    Consistency,
    check_answer,
    check_moves,
    letter_slots,
    named_images,
    orders,
    original_answer,
    permute,
)
from perl.types import Example, Message
from tests.messages import refused
from tests.permutation.questions import ODD, ask, kinds, lettered, lettered_questions

MODES: tuple[Consistency, ...] = ("slots", "references")


@st.composite
def consistent(draw: st.DrawFn) -> tuple[Example, Any]:
    """A question over labelled slots, or with options that name one image each, and a way to keep it consistent.

    Where texts follow, it names images besides.
    """
    mode = draw(st.sampled_from(MODES))
    count = draw(st.integers(2, 6))
    said = "all this"
    if mode == "references":
        said = " ".join(f"image {draw(st.integers(1, count))}" for _ in range(2))
    if draw(st.booleans()):
        question = f"{lettered(count).question} Is {said} alike?"
    else:
        listed = draw(st.permutations(range(1, count + 1)))
        options = "\n".join(f"{k}. Image {n}" for k, n in zip(LETTERS, listed, strict=False))
        question = f"{'<image>' * count} Given {said}, which?\n{options}"
    answer = draw(st.sampled_from([*LETTERS[:count], "2", "Image 1"]))
    return ask(question, answer, kind=draw(kinds(count))), mode


@given(lettered_questions().map(lambda e: (e, "slots")) | consistent(), st.integers(0, 5))
def test_the_answer_follows_its_pictures_and_back(drawn: tuple[Example, Any], seed: int) -> None:
    example, text = drawn
    count = len(example.images)
    named = named_images(example.answer, count, letter_slots(example))
    assert named
    for order in orders(example, 4, seed, 0):
        variant = permute(example, order, text)
        # Letters are read off the text that the model sees.
        shown = replace(
            example, images=variant.images, question=variant.messages, answer=variant.answer
        )
        now = named_images(variant.answer, count, letter_slots(shown))
        assert [variant.images[s] for s in now or ()] == [example.images[s] for s in named]
        assert original_answer(variant, variant.answer) == example.answer
        back = permute(shown, [order.index(image) for image in range(count)], text)
        before = (example.images, example.messages, example.answer)
        assert (back.images, back.messages, back.answer) == before


@given(st.text(max_size=40) | ODD, st.permutations(range(4)))
def test_any_model_output_is_survived(text: str, order: list[int]) -> None:
    result = original_answer(permute(lettered(4), order), text)
    assert (result is None) == (named_images(text, 4, range(4)) is None)
    for options in ("", "\nA. Image 2\nB. Image 1\nC. Image 3\nD. Image 4\nE. none"):
        asked = ask(f"<image><image><image><image> Which?{options}", kind="none")
        for mode in MODES:
            original_answer(permute(asked, order, mode), text)


def test_the_example_of_the_types_swaps() -> None:
    variant = permute(lettered(2, "B", images=("cat", "dog")), (1, 0))
    assert (variant.images, variant.answer) == (("dog", "cat"), "A")
    assert variant.messages == variant.example.messages  # slots: the text stays
    with refused("'q'", "(0, 1)", "3 images", error=ValueError):
        permute(lettered(3), (0, 1))


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        ("A", "C"), ("b", "a"), ("(C)", "(B)"), ("Image 2", "Image 1"), ("image 3.", "image 2."), ("1", "3"),
        ("A, C", "C, B"), ("1, 3, 2", "3, 2, 1"), ("A and B", "C and A"), ("[2, 1]", "[1, 3]"), (" B ", " A "),
        ("the second image", "the first image"), ("See image 1, then image 2", "See image 3, then image 1"),
        ("IMAGE 2 AND IMAGE 3", "IMAGE 1 AND IMAGE 2"), ("1 AND 3", "3 AND 2"), ("Option b.", "Option a."),
        ("3 → 1 < 2", "2 → 3 < 1"), ("B & C; A", "A & B; C"), ("Third PICTURE", "Second PICTURE"), ("[image_1]", "[image_3]"),
    ],
)  # fmt: skip
def test_every_shape_of_answer(answer: str, after: str) -> None:
    order = (1, 2, 0)  # the first image now stands third
    variant = permute(lettered(3, answer), order)
    assert variant.answer == after
    assert original_answer(variant, after) == answer


@pytest.mark.parametrize(
    ("answer", "slots"),
    [
        ("C, A", (2, 0)), ("B. Image 2", (1,)), ("(b) the second image", (1,)), ("B. Image 1", None), ("D. Image 4", None),
        ("Images 1 and 3", (0, 2)), ("image 2, 2 dogs", (1,)), ("image 2 (A)", None), ("A" + " " * 399, (0,)), ("A" + " " * 400, None),
    ],
)  # fmt: skip
def test_what_an_answer_names(answer: str, slots: tuple[int, ...] | None) -> None:
    assert named_images(answer, 3, range(3)) == slots


@pytest.mark.parametrize(
    "answer",
    [
        "D",
        "4",
        "0",
        "Image 9",
        "A, D",
        "yes",
        "AB",
        "the dog",
        "second (Image 2)",
        "Image 2 (left)",
    ],
)
def test_an_answer_that_names_no_image_is_an_error(answer: str) -> None:
    example = lettered(3, answer)
    for check in (lambda: permute(example, (1, 0, 2)), lambda: check_answer(example)):
        with refused("'q'", f"'{answer}'", "3 images", "A to C", "1 to 3", "should_change"):
            check()
    assert original_answer(permute(lettered(3), (1, 0, 2)), answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "1 (the first image)",
        "the first image (1)",
        "1, the first image",
        "Image 2 and the other one",
    ],
)
def test_a_name_beside_another_that_is_not_read_is_an_error(answer: str) -> None:
    with refused("'q'", "3 images", "should_change"):
        check_answer(lettered(3, answer))
    assert original_answer(permute(lettered(3), (1, 0, 2)), answer) is None


def test_a_question_without_an_answer_stays_without() -> None:
    example = lettered(3, "")
    check_answer(example)
    moved = permute(example, (1, 0, 2))
    assert moved.answer == "" and original_answer(moved, "A") == "B"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A. <image> B. <image> Which image shows a dog?", "B"),
        ("A. <image> B. <image> Which image shows a dog?", "(b)"),
        ("<image> (A) <image> (B) Which images show a dog?", "B and B"),
        ("<image> <image> Which has a dog?", "Image 2"),
        ("<image> <image> Which has a dog?", "image B"),
        ("<image> <image> Which has a dog?", "It is the second picture."),
        ("<image> <image> Which shows a dog? A. Image 1 B. Image 2", "B. Image 2"),
    ],
)
def test_an_answer_that_names_an_image_may_not_stay(question: str, answer: str) -> None:
    example = ask(question, answer, should_change=False)
    for check in (lambda: check_moves(example, "slots"), lambda: permute(example, (1, 0))):
        with refused("'q'", "should_change", "true", "image 2", "kind"):
            check()
    check_answer(replace(example, should_change=True))
    check_answer(replace(example, kind="none"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A <image> B <image> C <image>", "yes"),
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
    example = ask(question, answer, should_change=False)
    check_answer(example)
    check_moves(example, "slots")
    variant = permute(example, (1, 0, 2)[: len(example.images)])
    assert variant.answer == answer
    assert original_answer(variant, "anything") == "anything"


def test_an_answer_is_not_judged_where_its_image_stays() -> None:
    question = "A. <image> B. <image> C. <image> Which is the map?"
    check_moves(ask(question, "A", kind="first_fixed", should_change=False), "slots")
    check_answer(lettered(3, "forty-two", kind="none"))
    check_answer(lettered(1, "forty-two"))
    assert permute(lettered(1, "forty-two"), (0,)).answer == "forty-two"
    assert original_answer(permute(lettered(2), (1, 0)), None) is None


SYSTEM = Message("system", "Hi")


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
        ("all", "<image>\n(B)\n<image>\n(C)\n<image>\n(A)", (2, 0, 1)),
        (
            "all",
            "<image>\n(B) <image>\n(C) <image>\n(A) ",
            (0, 1, 2),
        ),  # the next one's, but for the last
        ("all", "<image> image b\n<image> image a\n<image> image c", (1, 0, 2)),
        ("all", "<image> b\n<image> a\n<image> c", (0, 1, 2)),
        ("all", "Look: <image>\nA. see <image>\nB. see <image>", (1, 2)),
        ("all", "Look: <image> and <image>\nA. see <image>\nB. <image><image>", (2,)),
        ("all", "<image> C) red <image> B) green <image> A) blue", (0, 1, 2)),
        (
            "all",
            "<image> (A) <image> (B) <image> (C)",
            (0, 1, 2),
        ),  # those of all slots, not of the last two
        ("all", "A <image> B <image> <image>", (0, 1, 2)),
        ("all", "<image> <image> (A) <image> (B)", (0, 1, 2)),
        ("all", "A <image> <image> B <image>", (0, 1, 2)),  # whose is the one between?
        ("all", "A <image> and <image> B <image>", (0, 2)),
        ("all", "<image> (A) <image> <image> (B)", (0, 1, 2)),
        ("all", "<image> (A) <image> and <image> (B)", (0, 2)),
        ("all", "I <image> see <image> <image>", (0, 1, 2)),
        ("all", (SYSTEM, Message("user", "A)<image> B)<image> C)<image>")), (0, 1, 2)),
    ],
)
def test_what_letters_name(kind: str, question: Any, slots: tuple[int, ...]) -> None:
    assert letter_slots(replace(lettered(3, kind=kind), question=question)) == slots


@pytest.mark.parametrize(
    ("question", "answer", "unclear"),
    [
        ("<image> Image 1: <image>", "2", "Image 1"),
        ("<image> Image 1: <image>\nWhich?\nA. a dog\nB. Image 2", "B", "Image 1"),
        ("<image> Image 1: <image>\nWhich?\nA. a dog\nB. a cat", "B", None),
        ("<image> Option A: <image>", "A", "Option A"),
        ("A <image> <image> B <image>", "C", "A"),
        ("Image 2: <image> Image 3: <image> <image>", "2", "Image 2"),
        ("<image> Option A: <image>\nWhich?\nA. Image 1\nB. Image 2", "A", None),
        ("<image> Image 3: <image>", "2", None),
        ("Image 2: <image> Image 1: <image>", "2", None),
    ],
)
def test_what_may_be_a_label_or_not(question: str, answer: str, unclear: str | None) -> None:
    """Answers that count images are refused beside it."""
    if unclear:
        with refused("'q'", f"'{unclear}'", "kind"):
            check_answer(ask(question, answer))
    else:
        check_answer(ask(question, answer))


def test_letters_of_options_follow_their_pictures() -> None:
    question = "<image> Which is alike? <image> <image>"
    variant = permute(ask(question, "A", kind="first_fixed"), (0, 2, 1))
    assert variant.answer == "B"
    assert original_answer(variant, "B") == "A"
    assert original_answer(variant, "Image 2") == "Image 3"
    with refused("'C'", "3 images", "A to B", "1 to 3"):
        permute(ask(question, "C", kind="first_fixed"), (0, 2, 1))


@pytest.mark.parametrize(
    ("question", "answer", "after", "answer_after"),
    [
        ("Describe the change from image 1 to image 2.\n<image><image>", None, "Describe the change from image 2 to image 1.\n<image><image>", None),
        ("Describe image 1.\n<image><image>", None, "Describe image 2.\n<image><image>", None),
        ("<image> Image 1\n<image> Image 2\nDescribe image 2.", None, "<image> Image 1\n<image> Image 2\nDescribe image 1.", None),
        ("<image> (Image 1)\n<image> (Image 2)\nDescribe image 2.", None, "<image> (Image 1)\n<image> (Image 2)\nDescribe image 1.", None),
        ("**Image 1**: <image> **Image 2**: <image> image 2?", None, "**Image 1**: <image> **Image 2**: <image> image 1?", None),
        ("Image 1 is <image>, image 2 is <image>", None, "Image 1 is <image>, image 2 is <image>", None),
        ("I <image> see <image> in image 1", "2", "I <image> see <image> in image 2", "1"),
        ("Query: <image> Image 1: <image> Image 2: <image> As <image_3>?", None,
         "Query: <image> Image 1: <image> Image 2: <image> As <image_2>?", None),
        ("<image><image> Is the first or the second image dark?", None, "<image><image> Is the second or the first image dark?", None),
        ("Say if the odd one is image 1.\n<image><image>", None, "Say if the odd one is image 2.\n<image><image>", None),
        ("<image><image> In image 1, 2 dogs play", None, "<image><image> In image 2, 2 dogs play", None),
        ("<image><image> Does image two have a dog?", None, "<image><image> Does image one have a dog?", None),
        ("<image>" * 9 + " The picture I took", None, "<image>" * 9 + " The picture I took", None),
        ("<image> <image> In the images 2 dogs play", None, "<image> <image> In the images 2 dogs play", None),
        ("<image> <image> What is in the second image?", None, "<image> <image> What is in the first image?", None),
        ("A <image> B <image> Is image A or image B darker?", "A", "A <image> B <image> Is image B or image A darker?", "B"),
        ("Image A: <image> Image B: <image> Which is like image B?", "A", "Image A: <image> Image B: <image> Which is like image A?", "B"),
        ("Image 1: <image> Image 2: <image> Image 3 - <image> Is image 1 like the 3rd image?", "Image 2",
         "Image 1: <image> Image 2: <image> Image 3 - <image> Is image 3 like the 2nd image?", "Image 1"),
    ],
)  # fmt: skip
def test_what_is_rewritten(
    question: str, answer: str | None, after: str, answer_after: str | None
) -> None:
    """Labels stay with their slots, mentions follow their images; None: an answer that stays."""
    example = ask(question, answer or "a dog", should_change=answer is not None)
    order = (*range(1, len(example.images)), 0)
    variant = permute(example, order, "references")
    assert variant.messages[0].content == after
    assert variant.answer == (answer_after or "a dog")
    assert variant.images == order


@pytest.mark.parametrize("text", MODES)
def test_numbers_count_what_they_label(text: Consistency) -> None:
    """The query has no number, so "Image 1" is the second of all."""
    question = "Query: <image>\nImage 1: <image>\nImage 2: <image>\nWhich is like the query?"
    asked = ask(question, "Image 1", kind="first_fixed")
    variant = permute(asked, (0, 2, 1), text)
    assert variant.messages == asked.messages
    assert variant.answer == "Image 2"
    assert original_answer(variant, "2") == "1"
    options = ask(question + "\nA. Image 2\nB. Image 1", "A", kind="first_fixed")
    assert letter_slots(options) == (2, 1)
    assert permute(options, (0, 2, 1), text).answer == {"slots": "B", "references": "A"}[text]


ARTICLES = ["The", "this", "that", "each", "every", "a", "an", "one", "any"]
UNFOLLOWED = (
    "first one", "second ones", "3rd one", "first|/", "the last", "the second| is", "the first| of the", "the 2nd| of all",
    "twenty-first image", "ninety second| frame", "ultimate image", "penultimate photo", "last but| one", "next to| last",
    "second to| last", "first few", "last several", "first couple", "last pair", "former", "latter", "left image",
    "left-most image", "leftmost image", "rightmost pic", "right-hand image", "left-hand image", "middle frame",
    "previous image", "preceding image", "image III", "image IV", "image VI", "image VIII", "image IX", "image-II", "image b",
    "panel h", "image (2)", "image [3]", "image\n2",
)  # fmt: skip
NUMBERED = "Query: <image> Image 1: <image> Image 2: <image>"


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("the second to last image", "the second"), ("the twenty-first image", "twenty-first image"),
        ("the first, but not image 2", "the first"), ("every second image", "second image"),
        ("image 1, 2 or 3", "image 1, 2"), ("the second image from the left", "second image"),
        ("image II and image b", "image II"), ("image A, which has no letter", "image A"),
        ("In image 1 and 2 dogs", "image 1 and 2"), ("In images one and 2 dogs", "images one"), ("the second images", "second images"), ("image 1-3", "image 1-3"), ("Every second image: <image> <image>", "second image"),
        *((f"{article} image 2 dogs play: <image> <image>", "image 2") for article in ARTICLES),
        ("in image two dogs play", "image two"),
        ("images 3-1", "images 3-1"), ("the first 1 image", "the first 1"), ("Is it like image 1: <image> or <image>?", "image 1"),
        ("Compare image 1 and image 2: <image><image>", "image 2"),
        ("Query <image> Image 1 <image> Image 2 <image>", "Image 1"), (f"{NUMBERED} Is it like <image_1>?", "<image_1>"),
        (f"{NUMBERED} Is it like image 3?", "image 3"),
        *((words.replace("|", ""), words.partition("|")[0]) for words in UNFOLLOWED),
    ],
)  # fmt: skip
def test_what_cannot_be_rewritten_is_refused(question: str, words: str) -> None:
    if "<image>" not in question:
        question = f"<image><image><image> Look: {question}"
    with refused("'q'", f"'{' '.join(words.split())}", "Image 2", "kind"):
        check_moves(ask(question, "yes", should_change=False), "references")


def test_an_image_cannot_follow_to_a_slot_without_a_name() -> None:
    for question, answer in (("See <image> A: <image> B: <image>", "A"), (NUMBERED, "Image 1")):
        with refused("'q'", f"'{answer}'", "3 images", "label", "kind"):
            check_moves(ask(question, answer), "slots")
    with refused("'q'", "slot 1", "number", "kind"):
        asked = ask(f"{NUMBERED} What does image 1 show?", "yes", should_change=False)
        check_moves(asked, "references")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("<image><image> Is image 2 brighter than image 1?", None),
        ("<image><image><image> Which is like the first image?", "B"),
        ("A <image> B <image> Which is unlike image A?", "B"),
    ],
)
def test_slots_refuse_a_text_that_names_an_image_that_moves(
    question: str, answer: str | None
) -> None:
    example = ask(question, answer or "yes", should_change=answer is not None)
    with refused("'q'", "image 1" if answer else "image 2", "permutation.text", "kind"):
        check_moves(example, "slots")
    check_moves(example, "references")
    if len(example.images) == 3:  # It stays where the first is fixed.
        check_moves(replace(example, kind="first_fixed"), "slots")
    if answer is None:  # Whoever writes blocks knows what the text says of them.
        check_moves(replace(example, kind="blocks:1,2"), "slots")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("<image><image> Is the left image larger than the other?", "left image"),
        ("<image><image> Is the first one larger than the other?", "first one"),
        ("<image><image><image> Is it larger than the middle one?", "middle one"),
        ("<image><image> Is the former larger than the latter?", "former"),
        ("<image><image> Is it larger than image II?", "image II"),
        ("A: <image> B: <image> Is A larger than B?", "A"),
        ("A: <image> B: <image> Is (A) larger than (B)?", "(A)"),
        ("A: <image> B: <image> C: <image> Are A, B alike?", "A, B"),
        ("A: <image> B: <image> Which is larger, A or B?", None),
        ("A: <image> B: <image> A dog is in both. Is this so of A, B?", None),
        ("A: <image> B: <image> Do both show vitamin B?", None),
        ("A: <image> B: <image> Answer with B if so.", None),
        ("<image><image> Which is larger?\nA. the first one\nB. none", None),
    ],
)
def test_words_that_may_name_an_image_that_moves_are_refused(
    question: str, words: str | None
) -> None:
    example = ask(question, "yes", should_change=False)
    if words is None:
        return check_moves(example, "slots")
    for mode in MODES:
        with refused("'q'", f"'{words}'", "kind"):
            check_moves(example, mode)
    check_moves(
        replace(example, kind=f"blocks:{len(example.images) - 1},{len(example.images)}"), "slots"
    )


def test_words_that_may_name_an_image_that_stays_are_no_matter() -> None:
    for words in ("the first one", "the left image", "the first"):
        question = f"<image><image><image> Which is as large as {words}?"
        check_moves(ask(question, "B", kind="first_fixed"), "slots")
        with refused(
            "'q'", f"'{words.removeprefix('the ')}'" if " " in words[4:] else "'the first'"
        ):
            check_moves(ask(question, "2"), "slots")


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        ("3, 0, 1", "1, 3, 0"),
        ("[10:30, 11:15, 0.5]", "[0.5, 10:30, 11:15]"),
        ("left; first | a dog", "a dog; left | first"),
        ("100,200,300,", None),
        ("Image 1: dog, Image 2: cat, Image 3: fox", None),
        ("1. dog\n2. cat\n3. fox", None),
        ("(a) dog, (b) cat, (c) fox", None),
        ("the first a dog, the second a cat, the last a fox", None),
        ("The left does, the middle does, the right does not", None),
        ("1,200", None),
    ],
)
def test_values_move_if_they_do_not_name_their_images(answer: str, after: str | None) -> None:
    count = 2 if answer == "1,200" else 3
    example = ask("<image>" * count + " For each image in turn, what is it?", answer)
    if after is None:
        with refused("'q'", f"{count} images", "kind"):
            check_moves(example, "slots")
    else:
        assert permute(example, (2, 0, 1)).answer == after


def test_a_set_that_is_not_written_in_ascending_order_keeps_its_sequence() -> None:
    """It may be the sequence of what is asked for."""
    for question, answer, after in (
        ("<image><image><image> Which images show the king and his wife?", "3, 1", "3, 2"),
        ("<image><image><image> Which images show a dog?", "1, 3", "2, 3"),
        ("A. <image> B. <image> C. <image> Which images show a dog?", "C, A", "C, B"),
        (
            f"{'<image>' * 3} Which images show a dog?\nA. Image 1\nB. Image 2\nC. Image 3",
            "C, A",
            "C, B",
        ),
    ):
        variant = permute(ask(question, answer), (1, 0, 2))
        assert variant.answer == after
        assert original_answer(variant, after) == ", ".join(sorted(answer.split(", ")))


@pytest.mark.parametrize(
    ("question", "kind", "answer", "follows"),
    [
        # What is said of each image in turn cannot stay.
        ("### For each image in turn, name the animal.", "all", "dog, cat, fox", False),
        ("### What do the three images show, in order?", "all", "dog, cat, fox", False),
        # Ranks or a sequence?
        ("### Number the images by size.", "all", "3, 1, 2", True),
        ("### At which position should each image be?", "all", "3, 1, 2", True),
        ("## ## Match each image above with one below.", "last:2", "3, 4", True),
        # The first image, which stays, or the first candidate?
        ("### Which candidate is like the query?", "first_fixed", "1", True),
        ("### Which candidate is like the query?", "first_fixed", "Image 1", True),
        (
            "### Which candidate is like it?\nA. candidate 1\nB. candidate 2",
            "first_fixed",
            "A",
            True,
        ),
        # Labels that do not begin with A.
        ("B: # C: # Which shows a dog?", "all", "B", True),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    question: str, kind: str, answer: str, follows: bool
) -> None:
    example = ask(question.replace("#", "<image>"), answer, kind=kind, should_change=follows)
    for mode in MODES:
        with refused("'q'", "kind"):
            check_moves(example, mode)
