"""In every order, text and answer name the pictures that they named before, or the example is refused.

The questions are written from parts, and what a text names is read here by other means than the
code under test: by following the pictures themselves, which are the numbers 0, 1, 2, ...
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl.permutation.permute import (
    Consistency,
    all_orders,
    check_answer,
    check_moves,
    num_orders,
    original_answer,
    permute,
    unpermute_answer,
)
from perl.permutation.references import mentions, rewrite
from perl.types import Example, Message, UserError

MODES: tuple[Consistency, ...] = ("slots", "references")
ORDINALS = ("first", "second", "third", "fourth")
LETTERS = "ABCD"

LAYOUTS = {
    "plain": "<image>",
    "before": "Image {n}: <image>\n",
    "starred": "**Image {n}**: <image> ",
    "after": "<image> Image {n}\n",
    "bracketed": "<image> (Image {n}) ",
    "sentence": "Image {n} is <image>, ",
    "lettered": "{l} <image> ",
    "closed": "({l}) <image>\n",
    "letter after": "<image> ({l})\n",
    "query": "Image {n}: <image>\n",
}
NAMES = (
    "Image {n}",
    "the {o} image",
    "photo #{n}",
    "<image_{n}>",
    "picture number {n}",
    "image {w}",
)
OPTIONS = ("Image {n}", "the {o} picture", "{n}", "{O}", "Image {n} only")
MARKS = ("{l}. ", "{l}) ", "({l}) ", "{l}.", "{l}: ")
ANSWERS = ("{l}", "({l})", "{l}. {t}", "({l}) {t}", "{t}", "{n}", "Image {n}", "The {o} image")


def pictures(count: int) -> Any:
    """The numbers 0, 1, ... are enough of pictures here."""
    return tuple(range(count))


def name(style: str, number: int) -> str:
    ordinal, word = ORDINALS[number - 1], ("one", "two", "three", "four")[number - 1]
    return style.format(n=number, o=ordinal, O=ordinal.capitalize(), w=word)


@dataclass(frozen=True)
class Case:
    """An example, and how its text is to be read."""

    example: Example
    numbered: tuple[int, ...]
    """The slot that each number names."""
    said: int
    """How many images the stem names."""

    def pictures(self, text: str, images: Any) -> tuple[int, ...]:
        """The pictures that a text names, in its sequence. Ordinals count all slots."""
        slots = []
        for tag, word in re.findall(
            r"<image_(\d)>|(\d|first|second|third|fourth|\bone\b|two|three|four)", text.lower()
        ):
            if tag or word in ORDINALS:
                slots.append(int(tag) - 1 if tag else ORDINALS.index(word))
            else:
                number = {"one": 1, "two": 2, "three": 3, "four": 4}.get(word) or int(word)
                slots.append(self.numbered[number - 1])
        return tuple(images[slot] for slot in slots)

    def options(self, text: str) -> dict[str, str]:
        tail = text.partition("OPTIONS\n")[2]
        lines = [re.match(r"\(?([A-D])[.):]+ ?(.*)", line) for line in tail.splitlines()]
        return {line[1]: line[2] for line in lines if line}

    def stem(self, text: str) -> str:
        return text.partition("STEM ")[2].partition(" END")[0]

    def chosen(self, text: str, answer: str, images: Any) -> set[tuple[str, frozenset[int]]]:
        """What an answer chooses by its letter and by its words: one thing, if they agree."""
        out = set()
        letter = re.match(r"\(?([A-D])\b[.)]*", answer)
        rest = answer[letter.end() :] if letter else answer
        options = self.options(text)
        if letter and options:
            said = options[letter[1]]
            out.add(("only" * ("only" in said), frozenset(self.pictures(said, images))))
        elif letter:
            labels = re.findall(r"\(?\b([A-D])\)? <image>|<image> \(([A-D])\)", text)
            free = {"all": 0, "first_fixed": 1, "last:2": len(images) - 2}[self.example.kind]
            slot = (
                [a or b for a, b in labels].index(letter[1])
                if labels
                else free + LETTERS.index(letter[1])
            )
            out.add(("", frozenset({images[slot]})))
        if rest.strip():
            out.add(("only" * ("only" in rest), frozenset(self.pictures(rest, images))))
        return out


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 4))
    layout = draw(st.sampled_from([*LAYOUTS]))
    first = int(layout == "query" and count > 2)
    numbered = tuple(range(first, count))
    slots = ["Query: <image>\n"] * first
    slots += [LAYOUTS[layout].format(n=k + 1, l=LETTERS[k]) for k in range(count - first)]

    def any_name(styles: tuple[str, ...]) -> tuple[str, int]:
        style = draw(st.sampled_from(styles))
        by_slot = "o}" in style.lower() or "<" in style
        number = draw(st.integers(1, count if by_slot else len(numbered)))
        return name(style, number), number

    said = [any_name(NAMES)[0] for _ in range(draw(st.integers(0, 3)))]
    stem = f"STEM Look at {', then see '.join(said)} END" if said else "STEM Look END"
    before = draw(st.booleans())
    shown = "".join(slots)
    text = f"{stem}.\n{shown}\n" if before else f"{shown}\n{stem}?\n"
    answer_style = draw(st.sampled_from(ANSWERS))
    n = draw(st.integers(1, len(numbered)))
    answer = answer_style.format(l=LETTERS[n - 1], n=n, o=ORDINALS[n - 1], t=f"Image {n}")
    if draw(st.booleans()):
        mark = draw(st.sampled_from(MARKS))
        styles = OPTIONS if draw(st.booleans()) else (draw(st.sampled_from(OPTIONS)),)
        lines = []
        for _ in range(draw(st.integers(2, 4))):
            if draw(st.integers(0, 4)) == 0:
                lines.append("None of them")
            elif draw(st.integers(0, 2)) == 0:
                low, high = sorted(draw(st.permutations(range(1, len(numbered) + 1)))[:2])
                lines.append(f"Images {low} and {high}")
            else:
                lines.append(any_name(styles)[0])
        text += "OPTIONS\n" + "\n".join(
            mark.format(l=LETTERS[k]) + line for k, line in enumerate(lines)
        )
        right = draw(st.integers(0, len(lines) - 1))
        answer = answer_style.format(l=LETTERS[right], n=n, o=ORDINALS[n - 1], t=lines[right])
        if draw(st.booleans()):
            text += "\nAnswer with (A) or (B)."
    kind = draw(st.sampled_from(["all", "first_fixed", "last:2"]))
    example = Example("q", pictures(count), text, answer, kind)
    if draw(st.booleans()):
        example = replace(example, question=(Message("system", "Be brief."), Message("user", text)))
    return Case(example, numbered, len(said))


REFUSED = {mode: [0, 0] for mode in MODES}


@given(cases(), st.sampled_from(MODES))
@settings(max_examples=400, deadline=None)
def test_text_and_answer_name_the_same_pictures_or_are_refused(case: Case, mode: Any) -> None:
    example = case.example
    REFUSED[mode][1] += 1
    try:
        check_moves(example, mode)
    except UserError as error:
        assert "\n" not in str(error)
        REFUSED[mode][0] += 1
        return
    if num_orders(example) == 1:
        return
    text = example.messages[-1].content
    wanted = case.chosen(text, example.answer, example.images)
    stays = permute(example, range(len(example.images)), mode)
    for order in all_orders(example, 24, 0):
        variant = permute(example, order, mode)
        now = variant.messages[-1].content
        chosen = case.chosen(now, variant.answer, variant.images)
        assert chosen == wanted
        assert original_answer(variant, variant.answer) == original_answer(stays, example.answer)
        if mode == "references":
            named = case.pictures(case.stem(now), variant.images)
            assert named == case.pictures(case.stem(text), example.images)
            assert len(named) == case.said
        else:
            assert variant.messages == example.messages
        # Answers that count as the same choice in two orders name the same pictures.
        for letter in case.options(now):
            for other in case.options(text):
                if original_answer(variant, letter) == original_answer(stays, other):
                    assert case.chosen(now, letter, variant.images) == case.chosen(
                        text, other, example.images
                    )


def test_many_of_these_questions_are_not_refused() -> None:
    """Where texts stay, those that name an image that moves are refused too, which many of these do."""
    test_text_and_answer_name_the_same_pictures_or_are_refused()
    (slots, of_slots), (references, of_references) = REFUSED["slots"], REFUSED["references"]
    assert references < 0.7 * of_references, REFUSED
    assert of_slots - slots > 100, REFUSED


def ask(question: str, answer: str, **fields: Any) -> Example:
    return Example("q", pictures(question.count("<image>")), question, answer, **fields)


TWO, THREE = "<image><image> Which?\n", "<image><image><image> Which?\n"


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
        (TWO + "A.Image 2\nB.Image 1", "A", (1, 0), "B", "A"),
        (TWO + "(a) Image 2 (b) Image 1", "a", (1, 0), "b", "a"),
        (TWO + "A. Second\nB. First", "A", (1, 0), "B", "A"),
        (TWO + "A) 2\nB) 1", "A) 2", (1, 0), "B) 1", "A) 1"),
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
    for mode, wanted in zip(MODES, (slots, references), strict=True):
        if wanted is None:
            with pytest.raises(UserError, match=r"^example 'q': "):
                check_moves(example, mode)
        else:
            assert permute(example, order, mode).answer == wanted


def test_bare_numbers_that_are_no_images_stay() -> None:
    example = ask(TWO + "A. 2\nB. 1", "A", should_change=False)
    for mode in MODES:
        variant = permute(example, (1, 0), mode)
        assert (variant.messages, variant.answer) == (example.messages, "A")


def test_an_option_that_names_a_moving_image_does_not_stay() -> None:
    example = ask(TWO + "A. Image 2\nB. Image 1", "A", should_change=False)
    with pytest.raises(UserError, match="option 'A' names image 2, which moves"):
        check_moves(example, "slots")
    assert permute(example, (1, 0), "references").answer == "A"


def test_outputs_that_give_letter_and_text() -> None:
    example = ask(TWO + "A. Image 2\nB. Image 1\nC. Neither", "A")
    slots, rewritten = permute(example, (1, 0)), permute(example, (1, 0), "references")
    assert original_answer(slots, "B. Image 1") == original_answer(slots, "B") == "A"
    assert original_answer(rewritten, "A. Image 1") == "A"
    assert original_answer(slots, "A. Image 1") is None
    assert original_answer(rewritten, "A. Image 2") is None
    assert original_answer(slots, "C") == original_answer(rewritten, "C. neither") == "C"
    pairs = permute(
        ask(THREE + "A. Images 1 and 2\nB. Images 2 and 3", "Image 3"), (1, 0, 2), "references"
    )
    assert original_answer(pairs, "B") == "B"
    left = ask(THREE + "A. Images 1 and 2\nB. Images 2 and 3\nC. Image 3", "C", kind="blocks:1,2")
    assert original_answer(permute(left, (1, 0, 2)), "B") == "image 1 and 3"


@pytest.mark.parametrize(
    ("question", "after"),
    [
        ("Describe the change from image 1 to image 2.\n<image><image>", "Describe the change from image 2 to image 1.\n<image><image>"),
        ("Describe image 1.\n<image><image>", "Describe image 2.\n<image><image>"),
        ("<image> Image 1\n<image> Image 2\nDescribe image 2.", "<image> Image 1\n<image> Image 2\nDescribe image 1."),
        ("<image> (Image 1)\n<image> (Image 2)\nDescribe image 2.", "<image> (Image 1)\n<image> (Image 2)\nDescribe image 1."),
        ("**Image 1**: <image> **Image 2**: <image> image 2?", "**Image 1**: <image> **Image 2**: <image> image 1?"),
        ("Image 1 is <image>, image 2 is <image>", "Image 1 is <image>, image 2 is <image>"),
        ("Say if the odd one is image 1.\n<image><image>", "Say if the odd one is image 2.\n<image><image>"),
        ("<image><image> In image 1, 2 dogs play", "<image><image> In image 2, 2 dogs play"),
        ("<image><image> Does image two have a dog?", "<image><image> Does image one have a dog?"),
        ("<image>" * 9 + " The picture I took", "<image>" * 9 + " The picture I took"),
        ("<image> <image> In the images 2 dogs play", "<image> <image> In the images 2 dogs play"),
    ],
)  # fmt: skip
def test_what_is_rewritten(question: str, after: str) -> None:
    example = ask(question, "yes", should_change=False)
    order = (1, 0, *range(2, len(example.images)))
    assert permute(example, order, "references").messages[0].content == after


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the second to last image", "the second"),
        ("the twenty-first image", "twenty-first image"),
        ("Is the first one like the second one?", "first one"),
        ("the first, but not image 2", "the first"),
        ("every second image", "second image"),
        ("image 1, 2 or 3", "image 1, 2"),
        ("the second image from the left", "second image"),
        ("image II and image b", "image II"),
        ("the left picture", "left picture"),
        ("image A, which has no letter", "image A"),
        ("In image 1 and 2 dogs", "image 1 and 2"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(text: str, words: str) -> None:
    example = ask(f"<image><image><image> Look: {text}", "yes", should_change=False)
    with pytest.raises(UserError, match=f"may name an image by '{words}'.*set kind to none"):
        check_moves(example, "references")


@pytest.mark.parametrize(
    "question",
    [
        "Is it like image 1: <image> or <image>?",
        "Compare image 1 and image 2: <image><image>",
        "Query <image> Image 1 <image> Image 2 <image>",
        "Query: <image> Image 1: <image> Image 2: <image> Is it like <image_1>?",
        "Query: <image> Image 1: <image> Image 2: <image> Is it like image 3?",
    ],
)
def test_what_may_be_a_label_is_refused(question: str) -> None:
    with pytest.raises(UserError, match="which cannot be rewritten for certain"):
        check_moves(ask(question, "yes", should_change=False), "references")


@pytest.mark.parametrize(
    "part",
    [
        "first, and ", "A", " ", "\n", "A. x B. y ", "A. x\nB. y\n", "image 1 and ", "image 1, ",
        "the first ", "<image> ", "Image 1: <image> ", "images ", "- ", "(", "A. ", "1. ",
    ],
)  # fmt: skip
def test_a_long_text_is_read_in_linear_time(part: str) -> None:
    text = "A" + part * (100_000 // len(part))
    example = Example("q", pictures(2), text, "A", should_change=False)
    start = time.process_time()
    mentions(text, 5, range(5))
    rewrite(text, 5, (1, 0, 2, 3, 4), range(5))
    unpermute_answer(text, (1, 0), True)
    check_answer(replace(example, should_change=True, kind="none"))
    with suppress(UserError):  # Texts that name images keep them in place.
        original_answer(permute(example, (1, 0)), "A")
    assert time.process_time() - start < 1
