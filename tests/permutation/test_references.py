"""Mentions of images: what is found, and that a rewritten text goes on naming the same pictures."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import (
    Names,
    check_answer,
    mentions,
    named_images,
    original_answer,
    permute,
)
from perl.permutation.references import write
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


def rewrite(text: str, slots: Sequence[int], letters: Sequence[int] = ()) -> str:
    names = Names(len(slots), letters, range(len(slots)))
    return write(text, mentions(text, names), slots, names)


def slots_in(text: str, count: int, letters: Sequence[int] = ()) -> list[int]:
    return [m.slot for m in mentions(text, Names(count, letters, range(count)))]


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
    assert slots_in(text, count) == slots
    after = rewrite(text, where)
    assert [order[slot] for slot in slots_in(after, count)] == slots
    assert rewrite(after, order) == text


@given(
    st.text(max_size=60) | st.text(alphabet="imagesſKİı²①٣३ 12AB<>", max_size=40),
    st.permutations(range(5)),
)
def test_any_text_is_survived(text: str, order: list[int]) -> None:
    found = mentions(text, Names(5, range(5), range(5)))
    assert rewrite(text, range(5), range(5)) == text
    assert all(0 <= m.start < m.end <= len(text) and 0 <= m.slot < 5 for m in found)
    with suppress(LookupError):
        rewrite(text, order, range(5))


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("Images 1, 2 and 3 differ.", "Images 2, 3 and 1 differ."),
        ("the first and the third image", "the second and the first image"),
        ("The last image is dark.", "The first image is dark."),
        ("Second photo, 2ND photo", "Third photo, 3rd photo"),
        ("Is <image_3> like Image-1?", "Is <image_1> like Image-2?"),
        ("image A or image C", "image B or image A"),
        ("There are 2 dogs and 3 cats in the images.", None),
        ("Image 4 and the fourth image are not there", None),
        (
            "<image_0>, <image_4>, image 0, the 0th image and the 4th, the first nine images, images 1-4",
            None,
        ),
        ("Version 1.2 of figure 2.5", None),
        ("the previous image, the left picture", None),
        ("<image> <image> <image>", None),
    ],
)
def test_what_is_a_mention(text: str, after: str | None) -> None:
    """Each image moves one slot on; None: the text names none."""
    assert rewrite(text, (1, 2, 0), (0, 1, 2)) == (after or text)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("the first two images", [0, 1]),
        ("Last Two Photos", [1, 2]),
        ("the first three images", [0, 1, 2]),
        ("images 1–2", [0, 1]),
        ("pics 1 to 2; photos 2 through 3", [0, 1, 1, 2]),
        ("chart 1, scene B and sample3", [0, 1, 2]),
    ],
)
def test_what_is_named_and_not_rewritten(text: str, slots: list[int]) -> None:
    assert slots_in(text, 3, (0, 1, 2)) == slots
    assert rewrite(text, (0, 1, 2), (0, 1, 2)) == text
    with pytest.raises(LookupError):
        rewrite(text, (1, 2, 0), (0, 1, 2))


def test_numbers_count_from_what_they_start_at() -> None:
    names = Names(3, (), range(3), start=0)
    text = "Is image 0 like images 1 and 2, not image 3?"
    assert [m.slot for m in mentions(text, names)] == [0, 1, 2]
    assert (
        write(text, mentions(text, names), (1, 2, 0), names)
        == "Is image 1 like images 2 and 0, not image 3?"
    )


NOUNS = ["image", "img", "picture", "pic", "photo", "photograph", "figure", "frame", "panel"]
VERBS = [
    "is",
    "are",
    "was",
    "were",
    "has",
    "have",
    "had",
    "do",
    "does",
    "did",
    "show",
    "shows",
    "contain",
    "contains",
    "depict",
    "depicts",
    "look",
    "looks",
    "seem",
    "seems",
    "differ",
    "differs",
    "match",
    "matches",
    "appear",
    "appears",
    "and",
    "or",
    "but",
    "than",
    "to",
    "in",
    "on",
    "at",
    "with",
    "from",
    "of",
    "the",
    "for",
    "that",
    "which",
    "where",
    "by",
    "as",
    "both",
    "together",
    "respectively",
    "could",
    "will",
    "would",
    "only",
    "instead",
    "share",
    "shares",
    "vs",
    "versus",
    "nor",
    "if",
    "like",
    "not",
    "above",
    "below",
    "alike",
    "darker",
    "lighter",
    "brighter",
    "larger",
    "smaller",
    "taller",
    "bigger",
    "similar",
    "different",
]


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("Is {} 2 dark?", [*NOUNS, "fig.", "Image", "PHOTO"]),
        ("{}s 1 and 3", NOUNS),
        ("Image{}2", [" ", " number ", " no. ", " No ", " nr. ", " nr ", "-", "_", "#", " #", " number #", ""]),
        ("images 1{}3", [" and ", ", and ", " or ", " nor ", " vs. ", " vs ", " Versus ", " & ", "&", "/", ", "]),
        ("image 1{}3", [" and ", " or ", "/", " to ", " and image ", ", image ", ", the image "]),
        ("in the image 2 {} it", VERBS),
        ("As {}", ["<image_1>", "<image_2>", "<image-2>", "<image 2>", "<image2>", "<IMAGE_2>", "[image 2]", "[Image_2]"]),
    ],
)  # fmt: skip
def test_every_way_of_writing_a_number(pattern: str, parts: list[str]) -> None:
    """Each image moves one slot on: 1, 2, 3 become 2, 3, 1."""
    for text in map(pattern.format, parts):
        wanted = re.sub("[123]", lambda digit: str(int(digit[0]) % 3 + 1), text)
        assert rewrite(text, (1, 2, 0)) == wanted


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("the {} image", """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
         fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"""),
        ("the {} image", "1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th 13th 14th 15th 16th 17th 18th 19th 20th 21st 22nd 23rd 24th"),
        ("image {}, with", """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
         seventeen eighteen nineteen twenty"""),
        ("image {} is", "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    ],
)  # fmt: skip
def test_every_word_for_a_place(pattern: str, words: str) -> None:
    """Each image moves one slot on, the last one to the first."""
    texts = [pattern.format(word) for word in words.split()]
    on = [*range(1, len(texts)), 0]
    for slot, text in enumerate(texts):
        assert slots_in(text, 26, range(26)) == [slot]
        assert rewrite(text, on, range(len(on))) == texts[on[slot]]


def test_many_images_are_named_by_numbers_where_words_end() -> None:
    assert rewrite("the first image", [20, *range(31)]) == "the 21st image"
    assert rewrite("the second image", [0, 11, *range(1, 31)]) == "the twelfth image"
    assert rewrite("the 2nd image", [0, 12, *range(1, 31)]) == "the 13th image"


@pytest.mark.parametrize(
    "part",
    [
        "first, and ", "A", " ", "\n", "A. x B. y ", "A. x\nB. y\n", "image 1 and ", "image 1, ",
        "the first ", "<image> ", "Image 1: <image> ", "images ", "- ", "(", "A. ", "1. ",
    ],
)  # fmt: skip
def test_a_long_text_is_read_in_linear_time(part: str) -> None:
    """Four times the text takes about four times as long; what is quadratic would take sixteen times."""

    def seconds(length: int) -> float:
        text = "A" + part * (length // len(part))
        example = Example("q", (0, 1), text, "A", should_change=False)  # type: ignore[arg-type]
        start = time.process_time()
        rewrite(text, (1, 0, 2, 3, 4), range(5))
        named_images(text, 2, range(2))
        check_answer(replace(example, should_change=True, kind="none"))
        with suppress(UserError):  # Texts that name images keep them in place.
            original_answer(permute(example, (1, 0)), "A")
        return time.process_time() - start

    assert any(
        seconds(100_000) < 10 * seconds(25_000) for _ in range(5)
    )  # A busy machine may mislead once.
