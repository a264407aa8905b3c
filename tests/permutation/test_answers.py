"""Answers to questions with options in words, and outputs that give a letter, a text, or both."""

from __future__ import annotations

import pytest

from perl.permutation import (
    LETTERS,
    Consistency,
    check_moves,
    letter_slots,
    option_lines,
    original_answer,
    permute,
)
from perl.types import Example
from tests.messages import refused
from tests.permutation.questions import ask

TWO, THREE = "<image><image> Which?\n", "<image><image><image> Which?\n"
FOX = THREE + "A. Image 2\nB. Image 3\nC. Image 1"


@pytest.mark.parametrize(
    ("question", "answer", "order", "slots", "references"),
    [
        (TWO + "A. Image 2\nB. Image 1\nC. None of the above", "A", (1, 0), "B", "A"),
        (TWO + "A. Image 2\nB. Image 1\nC. None of the above", "C", (1, 0), None, "C"),
        (TWO + "A. Image 1 only\nB. Image 2 only\nC. Both\nD. Neither", "A", (1, 0), "B", "A"),
        (THREE + "A. Images 1 and 2\nB. Images 1 and 3\nC. Images 2 and 3", "A", (1, 0, 2), "A", "A"),
        (THREE + "A. Images 1 and 2\nB. Images 1 and 3\nC. Images 2 and 3", "A", (2, 0, 1), "C", "A"),
        (THREE + "A. red\nB. blue", "A", (1, 0, 2), None, "A"),
        (TWO + "A. Image 1 has dogs\nB. Image 2 has cats", "A", (1, 0), None, "A"),
        (TWO + "A. Image 1 is like image 2 then\nB. Red", "A", (1, 0), None, "A"),
        (THREE + "A. 2\nB. 3\nC. 1", "B", (2, 0, 1), "C", "B"),
        (THREE + "A. Two\nB. (three).\nC. ONE", "B", (2, 0, 1), "C", "B"),
        (TWO + "A. Left of Image 1\nB. Right of Image 1\nC. left of image 2", "A", (1, 0), "C", "A"),
        (TWO + "A. Image 1\nB. Image 2\nC. the left image", "A", (1, 0), None, None),
        (FOX, "OPTION B AND c", (2, 0, 1), "OPTION C AND a", "OPTION B AND c"),
        (FOX, "B, A", (2, 0, 1), "C, B", "B, A"),
        (FOX, "(B), (c) & Choice A.", (2, 0, 1), "(C), (a) & Choice B.", "(B), (c) & Choice A."),
        (FOX, "B — THE THIRD IMAGE", (2, 0, 1), "C — THE First IMAGE", "B — THE First IMAGE"),
        (TWO + "CHOICE A. IMAGE 2\nCHOICE B. THE FIRST PHOTO", "A", (1, 0), "B", "A"),
        (TWO + "A.Image 2\nB.Image 1", "A", (1, 0), "B", "A"),
        (TWO + "(a) Image 2 (b) Image 1", "a", (1, 0), "b", "a"),
        (TWO + "A. Second\nB. First", "A", (1, 0), "B", "A"),
        (TWO + "A) 2\nB) 1", "A) 2", (1, 0), "B) 1", "A) 1"),
        (TWO + "A. Image 1\nB. Image 2\nC. Image 1", "B", (1, 0), None, "B"),
        (TWO + "A. Image 1\nB. Image 2\nC. Image 1", "A", (1, 0), None, "A"),
        (TWO + "A. 2\nB. 1\nC. both", "A", (1, 0), None, None),
        (TWO + "1. Image 2\n2. Image 1", "1", (1, 0), None, None),
        (TWO + "A. Image 2\nB. Image 1\nAnswer with (A) or (B).", "A", (1, 0), "B", "A"),
        (TWO + "A. Image 2\nB. Image 1", "A. Image 1", (1, 0), None, None),
        (TWO + "A. Image 2\nB. Image 1", "B. the first image", (1, 0), "A. the second image", "B. the second image"),
        (TWO, "A. Image 2", (1, 0), None, None),
        (TWO, "B, the second image", (1, 0), "A, the first image", "A, the first image"),
        (TWO, "Image 2 (A)", (1, 0), None, None),
        (TWO, "the second to last image", (1, 0), None, None),
        ("A. <image> B. <image>\nWhich?\nA. Image B\nB. Image A", "A", (1, 0), None, None),
        ("Query <image> Image 1 <image> Image 2 <image>", "Image 1", (0, 2, 1), None, None),
    ],
)  # fmt: skip
def test_answers_with_options(
    question: str, answer: str, order: tuple[int, ...], slots: str | None, references: str | None
) -> None:
    example = ask(question, answer)
    for mode, wanted in (("slots", slots), ("references", references)):
        if wanted is None:
            with refused("'q'"):
                check_moves(example, mode)
        else:
            assert permute(example, order, mode).answer == wanted


@pytest.mark.parametrize(
    ("text", "options"),
    [
        *((text, ["red", "blue"]) for text in (
            "A. red\nB. blue", "A. red\nB. blue\nThink first.", "Which? A. red B. blue", "Which? (a) red; (b) blue, ", "[A] red [B] blue",
            "A) red,\nB) blue;", "A.red\nB.blue", "a. red\nb. blue", "A: red\nB:blue", "A:) red\nB:) blue", "A red\nB blue", "A | red\nB | blue",
            "A - red\nB - blue", "A – red\nB – blue", "> **A.** red\n> **B.** blue", "OPTION A: red\nChoice B: blue", "A.\nred\nB.\nblue",
            "A. red\nB. blue\nD. green", "A. one\nB. two\nA) red\nB) blue", "A) red\nB) blue\nC. five", "A. green\nA. red\nB. blue",
            "A. <image>\nB. <image>\nC. <image>\nA. red\nB. blue",
        )),
        ("A. one\nB. two\nC. three\nA) red\nB) blue", ["one", "two", "three"]), ("A. <image>\nB. <image>", ["<image>", "<image>"]),
        *((text, []) for text in (
            "A. red", "B. red\nC. blue", "A. and\nB. OR", "a red\nb blue", "so a. red or b. blue", "(A red\n(B blue", "A. red\nB) blue",
        )),
        ("A. x\nB. " + "y" * 500 + "y\n", ["x", "y" * 500]), ("A. x\nB. " + "y" * 499 + "\nz", ["x", "y" * 499]),
    ],
)  # fmt: skip
def test_what_the_options_are(text: str, options: list[str]) -> None:
    assert option_lines(text) == dict(zip("ABC", options, strict=False))


def test_there_are_as_many_options_as_letters() -> None:
    text = "".join(f"{letter}. like {letter}\n" for letter in LETTERS)
    assert list(option_lines(f"{text}B. again")) == list(LETTERS)


def test_bare_numbers_that_are_no_images_stay() -> None:
    example = ask(TWO + "A. 2\nB. 1", "A", should_change=False)
    assert letter_slots(example) == ()
    assert letter_slots(ask(TWO + "A. Image 2\nB. 1\nC. both")) == (1,)
    for mode in ("slots", "references"):
        variant = permute(example, (1, 0), mode)
        assert (variant.messages, variant.answer) == (example.messages, "A")


def test_an_option_that_names_a_moving_image_does_not_stay() -> None:
    example = ask(TWO + "A. Image 2\nB. Image 1", "A", should_change=False)
    with refused("'q'", "option 'A'", "image 2", "should_change", "permutation.text"):
        check_moves(example, "slots")
    assert permute(example, (1, 0), "references").answer == "A"


NEITHER = TWO + "A. Image 2\nB. Image 1\nC. Neither"


def test_options_follow_their_images_and_the_letter_stays() -> None:
    asked = ask(FOX, "B")
    assert letter_slots(asked) == (1, 2, 0)
    variant = permute(asked, (2, 0, 1), "references")
    assert variant.messages[0].content.endswith("A. Image 3\nB. Image 1\nC. Image 2")
    assert variant.answer == "B"
    # Slots: the text stays, so another letter names the picture.
    moved = permute(asked, (2, 0, 1))
    assert moved.messages == asked.messages
    assert moved.answer == "C"


@pytest.mark.parametrize(
    ("example", "order", "mode", "originals"),
    [
        # By number the same answer moves, and with it both ways of giving it.
        (ask(FOX, "B"), (2, 0, 1), "references", {"B": "B", "Image 1": "Image 3"}),
        (ask(FOX, "B"), (2, 0, 1), "slots", {"C": "B", "C, A": "B, C"}),
        (ask(NEITHER), (1, 0), "slots", {"B. Image 1": "A", "B": "A", "A. Image 1": None, "C": "C"}),
        (ask(NEITHER), (1, 0), "references", {"A. Image 1": "A", "A. Image 2": None, "C. neither": "C"}),
        (ask(THREE + "A. Images 1 and 2\nB. Images 2 and 3", "Image 3"), (1, 0, 2), "references", {"B": "B"}),
        (ask(THREE + "A. Images 1 and 2\nB. Images 2 and 3\nC. Image 3", "C", kind="blocks:1,2"), (1, 0, 2), "slots",
         {"B": "image 1 and 3"}),
    ],
)  # fmt: skip
def test_outputs_that_give_letter_or_text(
    example: Example, order: tuple[int, ...], mode: Consistency, originals: dict[str, str | None]
) -> None:
    variant = permute(example, order, mode)
    assert {output: original_answer(variant, output) for output in originals} == originals
