"""Mentions of images: what is found, and that a rewritten text goes on naming the same pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation.permute import check_moves, letter_slots, original_answer, permute
from perl.permutation.references import mentions, rewrite
from perl.types import Example, UserError

STYLES = (
    "Image {n}",
    "the {o} picture",
    "<image_{n}>",
    "[image {n}]",
    "photo #{n}",
    "the {s} frame",
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
SUFFIXED = ("1st", "2nd", "3rd", "4th", "5th", "6th")


def named(style: str, slot: int) -> str:
    return style.format(n=slot + 1, o=ORDINALS[slot], s=SUFFIXED[slot])


@st.composite
def sentences(draw: st.DrawFn) -> tuple[int, list[int], str]:
    """A number of images, the slots that a text mentions, and the text."""
    count = draw(st.integers(2, 6))
    slots = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    styles = [draw(st.sampled_from(STYLES)) for _ in slots]
    words = [named(style, slot) for style, slot in zip(styles, slots, strict=True)]
    return count, slots, "Look at " + ", then see ".join(words) + " for 3 dogs."


@given(sentences(), st.randoms())
def test_every_mention_follows_its_picture_and_back(sentence, random) -> None:
    count, slots, text = sentence
    order = list(range(count))
    random.shuffle(order)
    where = [order.index(image) for image in range(count)]
    assert [m.slot for m in mentions(text, count)] == slots
    after = rewrite(text, count, where)
    assert [order[m.slot] for m in mentions(after, count)] == slots
    assert rewrite(after, count, order) == text


@given(
    st.text(max_size=60) | st.text(alphabet="imagesſKİı²①٣३ 12AB<>", max_size=40),
    st.permutations(range(5)),
)
def test_any_text_is_survived(text: str, order: list[int]) -> None:
    found = mentions(text, 5, range(5))
    assert rewrite(text, 5, range(5), range(5)) == text or any(m.style == "several" for m in found)
    assert all(0 <= m.start < m.end <= len(text) and 0 <= m.slot < 5 for m in found)
    rewrite(text, 5, order, range(5))


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("Images 1, 2 and 3 differ.", "Images 2, 3 and 1 differ."),
        ("the first and the third image", "the second and the first image"),
        ("The last image is dark.", "The first image is dark."),
        ("Second photo, 2ND photo", "Third photo, 3rd photo"),
        ("the first two images", "images 2 and 3"),
        ("images 1-3 and picture 1", "images 1, 2 and 3 and picture 2"),
        ("Is <image_3> like Image-1?", "Is <image_1> like Image-2?"),
        ("image A or image C", "image B or image A"),
        (
            "There are 2 dogs and 3 cats in the images.",
            "There are 2 dogs and 3 cats in the images.",
        ),
        (
            "Image 4 and the fourth image are not there",
            "Image 4 and the fourth image are not there",
        ),
        ("Version 1.2 of figure 2.5", "Version 1.2 of figure 2.5"),
        ("the previous image, the left picture", "the previous image, the left picture"),
        ("<image> <image> <image>", "<image> <image> <image>"),
    ],
)
def test_what_is_a_mention(text: str, after: str) -> None:
    assert rewrite(text, 3, (1, 2, 0), (0, 1, 2)) == after  # each image moves one slot on


def test_many_images_are_named_by_numbers_where_words_end() -> None:
    assert rewrite("the first image", 32, [20, *range(31)]) == "the 21st image"
    assert rewrite("the second image", 32, [0, 11, *range(1, 31)]) == "the twelfth image"
    assert rewrite("the 2nd image", 32, [0, 12, *range(1, 31)]) == "the 13th image"


def example(question: str, answer: str, **fields) -> Example:
    count = question.count("<image>")
    return Example("q", tuple(range(count)), question, answer, **fields)


def test_options_follow_their_images_and_the_letter_stays() -> None:
    asked = example("<image><image><image> Which is red?\nA. Image 2\nB. Image 3\nC. Image 1", "B")
    assert letter_slots(asked) == (1, 2, 0)
    variant = permute(asked, (2, 0, 1), "references")
    assert variant.messages[0].content.endswith("A. Image 3\nB. Image 1\nC. Image 2")
    assert variant.answer == "B"
    assert original_answer(variant, "B") == "B"
    # By number the same answer moves, and with it both ways of giving it.
    assert original_answer(variant, "Image 1") == "Image 3"
    # Slots: the text stays, so another letter names the picture.
    moved = permute(asked, (2, 0, 1))
    assert moved.messages == asked.messages
    assert moved.answer == "C"
    assert original_answer(moved, "C") == "B"


def test_letters_of_labelled_slots_move_in_both_ways() -> None:
    asked = example("A <image> B <image> Is image A or image B darker?", "A")
    variant = permute(asked, (1, 0), "references")
    assert variant.messages[0].content == "A <image> B <image> Is image B or image A darker?"
    plain = example("A <image> B <image> Which is darker?", "A")
    assert variant.answer == permute(plain, (1, 0)).answer == "B"


def test_a_question_about_one_image_stays_about_it() -> None:
    asked = example("<image> <image> What is in the second image?", "a dog", should_change=False)
    variant = permute(asked, (1, 0), "references")
    assert variant.messages[0].content == "<image> <image> What is in the first image?"
    assert variant.images == (1, 0)
    assert variant.answer == "a dog"


def test_an_answer_in_words_names_its_image() -> None:
    asked = example("<image> <image> <image> Which is odd?", "The second image")
    variant = permute(asked, (1, 0, 2))
    assert variant.answer == "The first image"
    assert original_answer(variant, "the first image") == "the second image"


def test_labels_of_slots_stay_with_their_slots() -> None:
    question = "Image 1: <image> Image 2: <image> Image 3 - <image> Is image 1 like the 3rd image?"
    asked = example(question, "Image 2")
    variant = permute(asked, (1, 2, 0), "references")
    assert variant.messages[0].content == (
        "Image 1: <image> Image 2: <image> Image 3 - <image> Is image 3 like the 2nd image?"
    )
    assert variant.answer == "Image 1"
    lettered = example("Image A: <image> Image B: <image> Which is like image B?", "A")
    variant = permute(lettered, (1, 0), "references")
    assert variant.messages[0].content == "Image A: <image> Image B: <image> Which is like image A?"
    assert variant.answer == "B"


@pytest.mark.parametrize("text", ["slots", "references"])
def test_numbers_count_what_they_label(text) -> None:
    """The query has no number, so "Image 1" is the second of all."""
    question = "Query: <image>\nImage 1: <image>\nImage 2: <image>\nWhich is like the query?"
    asked = example(question, "Image 1", kind="first_fixed")
    variant = permute(asked, (0, 2, 1), text)
    assert variant.messages == asked.messages
    assert variant.answer == "Image 2"
    assert original_answer(variant, "2") == "1"
    options = example(question + "\nA. Image 2\nB. Image 1", "A", kind="first_fixed")
    assert letter_slots(options) == (2, 1)
    assert permute(options, (0, 2, 1), text).answer == {"slots": "B", "references": "A"}[text]


def test_an_image_that_would_lose_its_number_is_refused() -> None:
    question = "Query: <image> Image 1: <image> Image 2: <image> What does image 1 show?"
    asked = example(question, "a dog", should_change=False)
    with pytest.raises(UserError, match="moves to slot 1, which is not numbered; number every"):
        check_moves(asked, "references")
    which = "Query: <image> Image 1: <image> Image 2: <image> Which is dark?"
    with pytest.raises(UserError, match="answer 'Image 1' moves to a slot that has no letter"):
        check_moves(replace(asked, question=which, answer="Image 1", should_change=True), "slots")
