"""Options in columns of their own: asked unless the question lists them, the gold as the question names it, or the row refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.config import DataConfig
from perl.data.columns import choose_layout, read_row
from perl.data.dataset import load_examples
from perl.data.questions.golds import first_index
from perl.data.questions.options import read_options
from perl.permutation import permute
from perl.types import Example, Message
from tests.messages import refused
from tests.pictures import encoded

ASKED = "<image> <image> What do both show?"
PETS = ["a cat", "a dog"]
SHOWN = f"{ASKED}\nA. a cat\nB. a dog"
SIZES = ["two", "three", "one"]


def read(row: dict[str, Any], **config: Any) -> Example:
    row = {"images": ["0.png", "1.png"], "question": ASKED, **row}
    return read_row(row, choose_layout(DataConfig(**config), row, "here"), "here")


@pytest.mark.parametrize(
    "columns",
    [
        {"options": PETS},
        {"choices": PETS},
        {"options": tuple(PETS), "choices": None},
        {"options": {"A": "a cat", "B": "a dog", "C": None, "D": float("nan"), "E": ""}},
        {"options": {"a": "a cat", "b": " a dog "}},
        {"options": {"0": "a cat", "1": "a dog"}},
        {"options": {"label": ["1", "2"], "text": PETS}},
        {"options": ["(A) a cat", "(B) a dog"]},
        {"options": ["a: a cat", "b: a dog"]},
        {"options": "A. a cat\nB. a dog"},
        # as JSON, Python, numpy and pandas write them
        {"options": json.dumps(PETS)},
        {"options": json.dumps({"A": "a cat", "B": "a dog"})},
        {"options": str(PETS)},
        {"options": str(np.array(PETS))},
        {"options": repr(np.array(PETS, dtype=object))},
        # MMBench's
        {"A": "a cat", "B": "a dog", "C": float("nan"), "D": ""},
    ],
    ids=str,
)  # fmt: skip
def test_options_are_asked_in_whatever_they_are_kept(columns: dict[str, Any]) -> None:
    example = read({"answer": "B", **columns})
    assert (example.question, example.answer) == (SHOWN, "B")
    # Unlabelled rows keep their images.
    assert (example.kind, example.should_change) == ("none", False)
    # Rewards have had them as the data have them.
    assert {key: example.extra[key] for key in columns} == columns


@pytest.mark.parametrize(
    "columns",
    [{"options": []}, {"options": "[]"}, {"choices": None}, {"options": ""}, {"A": "a cat"}, {"A": 3, "B": [1, 2]},
     {"A": "0.png", "B": "1.png"}],
)  # fmt: skip
def test_no_options(columns: dict[str, Any]) -> None:
    example = read({"answer": "both", **columns})
    assert (example.question, example.answer) == (ASKED, "both")


@pytest.mark.parametrize(
    ("question", "options", "gold", "asked", "answer"),
    [
        # The text lists them by letter.
        ("{} A. a cat B. a dog", PETS, "a dog", "", "B"),
        ("{}\n(a) A Cat\n(b) a  dog\nAnswer with a letter.", PETS, "B", "", "B"),
        ("{} A - a cat, B - a dog", PETS, "A", "", "A"),
        # by number: what names them there is right
        ("{} (1) a cat (2) a dog", PETS, "B", "", "2"),
        ("{} 1. a cat 2. a dog", PETS, 1, "", "1"),
        # by themselves
        ("{} Answer yes or no.", ["yes", "no"], "B", "", "no"),
        ("{} Options: 'a cat', 'a dog'.", PETS, "a dog", "", "a dog"),
        # Letters that name what carries them say nothing.
        ("{}", ["A", "B"], "B", "", "B"),
        # in any sequence
        ("{} (B) a dog (A) a cat", PETS, "a dog", "", "B"),
        # Abbreviations are no letters, and numbers are shown as they are.
        ("{}", ["U.S.", "E.U."], "U.S.", "\nA. U.S.\nB. E.U.", "A"),
        ("{}", [2.0, 2.5], 2.0, "\nA. 2\nB. 2.5", "A"),
        # It mentions them, or a part of them, and lists none.
        ("{} Is a cat here, and is a dog?", PETS, "B", "\nA. a cat\nB. a dog", "B"),
        ("{} A. a catfish B. a dog", PETS, "B", "\nA. a cat\nB. a dog", "B"),
        ("{} Yes or no, not?", ["Yes", "no, not yet"], "A", "\nA. Yes\nB. no, not yet", "A"),
        ("{}\n", ["one", "two\nlines"], "A", "\nA. one\nB. two\nlines", "A"),
        # Options name images: their numbers are slots.
        ("{}", ["Image 1", "Image 2"], "Image 2", "\nA. Image 1\nB. Image 2", "B"),
    ],
)  # fmt: skip
def test_what_the_question_lists_is_not_asked_twice(
    question: str, options: list[str], gold: Any, asked: str, answer: str
) -> None:
    row = {"question": question.format(ASKED), "options": options, "answer": gold}
    example = read(row)
    assert (example.question, example.answer) == (row["question"].rstrip("\n") + asked, answer)


def test_options_that_are_images_have_their_slots() -> None:
    pictured = ["<image>", "<image>"]
    listed = "A. <image> B. <image> Which?"
    assert read({"question": listed, "options": pictured, "answer": "B"}).question == listed
    assert read({"options": pictured, "answer": "B"}).question == ASKED
    asked = "Which?\nA. <image>\nB. <image>"
    assert read({"question": "Which?", "options": pictured, "answer": "B"}).question == asked
    own = read({"images": ["0.png"] * 4, "options": pictured, "answer": "B"})
    assert (own.question, own.answer) == (f"{ASKED}\nA. <image>\nB. <image>", "B")
    numbered = read({"question": "<image 1> Which?", "options": "['<image 2>', 'none']", "answer": "B"})  # fmt: skip
    assert numbered.question == "<image> Which?\nA. <image>\nB. none"


def test_letters_that_images_carry_are_not_asked_again() -> None:
    """So that they follow the images."""
    asked = "A: <image> (B) <image> Which?"
    for options in (["Image A", "Image B"], ["(A)", "picture b."]):
        example = read({"question": asked, "options": options, "answer": options[1], "kind": "all"})
        assert (example.question, example.answer) == (asked, "B")
    for question, options in ((asked, ["Image B", "Image A"]), (ASKED, ["Image A", "Image B"])):
        example = read({"question": question, "options": options, "answer": options[0]})
        lines = f"A. {options[0]}\nB. {options[1]}"
        assert (example.question, example.answer) == (f"{question}\n{lines}", "A")


def test_they_end_the_last_turn_of_a_chat() -> None:
    turns = [("system", "Look."), ("user", ASKED), ("assistant", "Hm"), ("user", "Well?")]
    chat = [{"role": role, "content": text} for role, text in turns]
    example = read({"question": chat, "options": PETS, "answer": "a cat"})
    own = [Message(role, text) for role, text in turns[:3]]
    assert example.messages == (*own, Message("user", "Well?\nA. a cat\nB. a dog"))
    assert example.answer == "A"


def test_a_column_of_another_name() -> None:
    example = read({"candidates": PETS, "answer": "B"}, map=("options=candidates",))
    assert (example.question, example.answer) == (SHOWN, "B")


@pytest.mark.parametrize(
    ("options", "gold", "answer"),
    [
        (PETS, "b", "B"),
        (PETS, " (B). ", "B"),
        (PETS, "<answer>B</answer>", "B"),
        (PETS, r"\boxed{a dog}", "B"),
        (PETS, "A Dog.", "B"),
        (PETS, "B. a dog", "B"),
        (PETS, {"ground_truth": "a dog"}, "B"),
        (PETS, None, ""),
        # Case tells only where it must.
        (["Mg", "mg"], "mg", "B"),
        # a list of them
        (["x", "y", "z"], ["x", "z"], "A, C"),
        (["x", "y", "z"], "A and C", "A, C"),
        (["x", "y", "z"], "AC", "A, C"),
        (["black and white", "red"], "black and white", "A"),
        # in a sentence
        (PETS, r"\text{B}", "B"),
        (PETS, "Option B", "B"),
        (PETS, "The answer is (B).", "B"),
        (PETS, "A dog is in image B", None),
        (PETS, "A or B", None),
        (PETS, "Option C", None),
        # an index that is one by the first option alone
        (PETS, 0, "A"),
        (PETS, "0", "A"),
        (PETS, 2, "B"),
        (PETS, 2.0, "B"),
        # keys of the data are no indices
        ({"1": "a cat", "0": "a dog"}, 1, "A"),
        # numbers among numbers are values
        (["2", "3", "5"], "3", "B"),
        ([2, 3, 5], 3, "B"),
        ([2.0, 3.0, 1.0], 3.0, "B"),
        (["3.0", "1.0", "2.0"], "3", "A"),
        (["three", "two", "one"], "3", "A"),
        (["2", "3", "1"], 2, None),
        # Which?
        (["x", "y", "z"], 1, None),
        (["x", "y", "z"], "2", None),
        (["3 cats", "a dog", "5 cats"], "3", None),
        (["three", "two", "one"], 3, None),
        (["B", "A"], "B", None),
        ({"A": "B", "B": "A"}, "A", None),
        ({"1": "2", "2": "1"}, "1", None),
        (["A. 1", "B. 2"], "1", "A"),
        # none of them
        (PETS, "C", None),
        (PETS, "a mouse", None),
        (PETS, "A. a dog", None),
        (PETS, "3", None),
        (PETS, "A, a mouse", None),
        (["2", "3", "5"], "0", None),
        (["Mg", "mg"], "MG", None),
    ],
)  # fmt: skip
def test_the_gold_is_the_letter_or_the_row_is_refused(
    options: Any, gold: Any, answer: str | None
) -> None:
    row = {"options": options, "answer": gold}
    if answer is not None:
        assert read(row).answer == answer
        return
    with refused("here", "answer", "options"):
        read(row)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"options": ["a cat", "a cat "]}, ["options", "'a cat'"]),
        ({"A": "a cat", "B": "a  cat"}, ["A, B", "'a cat'"]),
        ({"options": {"a": "a cat", "A": "a dog"}}, ["options", "'A'"]),
        ({"options": ["a cat", {"bytes": 1}]}, ["options", "<image>"]),
        ({"options": ["0.png", "1.png"]}, ["options", "'0.png'", "<image>"]),
        ({"options": ["a cat", " "]}, ["options"]),
        ({"options": 3}, ["options", "3"]),
        ({"options": "easy"}, ["options", "easy"]),
        ({"choices": '["a cat", '}, ["choices", "column 11"]),
        ({"options": [f"no {k}" for k in range(27)]}, ["options", "27", "26"]),
        ({"options": PETS, "question": f"{ASKED} A. a dog B. a cat"}, ["options", "a cat"]),
    ],
)  # fmt: skip
def test_options_that_cannot_be_asked(columns: dict[str, Any], names: list[str]) -> None:
    with refused("here", *names):
        read({"answer": "B", **columns})


@pytest.mark.parametrize(
    ("options", "gold", "answer"),
    [(["2", "3", "1"], "1", None), ([2, 3, 1], 1, None), ([2, 3, 1], 3, "B"), ([5, 1, 7], 1, "B")],
)
def test_a_number_among_numbers_may_be_an_index_where_others_are(
    options: list[Any], gold: Any, answer: str | None
) -> None:
    row = {"images": ["0.png", "1.png"], "question": ASKED, "options": options, "answer": gold}
    layout = replace(choose_layout(DataConfig(), row, "here"), first_index=0)
    if answer is not None:
        assert read_row(row, layout, "here").answer == answer
        return
    with refused("here", "answer", "options"):
        read_row(row, layout, "here")


def test_an_option_of_digits_says_nothing_of_where_indices_begin() -> None:
    options = read_options({"options": ["3", "x", "y"]}, "here")
    assert options
    assert first_index([(options, 3), (options, 0)]) == 0
    assert first_index([(options, 1), (options, 3)]) is None


@pytest.mark.parametrize(
    ("golds", "answers"),
    [
        ([1, 0, 2], "BAC"),
        ([2, 1, 3], "BAC"),
        (["2", "1", "3"], "BAC"),
        ([1, 2, 0], "BCA"),
        # Numbers among numbers, or texts, in the rows before say nothing.
        (["B", "1", 0], None),
        ([1, 2, 1], None),
        # 0 says from where: then 3 is none of three.
        ([0, 3, 1], None),
    ],
)  # fmt: skip
def test_indices_count_from_where_the_data_set_counts(
    tmp_path: Path, golds: list[Any], answers: str | None
) -> None:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(encoded((k, 0, 0)))
    row = {"images": ["0.png", "1.png"], "question": ASKED, "options": ["x", "y", "z"]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "answer": gold}) + "\n" for gold in golds))
    data = load_examples(str(file), DataConfig(), "train", 0)
    if answers is None:
        with refused("rows.jsonl line 2", "answer", "options"):
            data[1]
    else:
        assert [data[i].answer for i in range(3)] == list(answers)


@pytest.mark.parametrize(
    ("listed", "answer", "row", "gold"),
    [
        (" A) Image 1 B) Image 2", "Image 2", {}, "B"), (" A) Image 2 B) Image 1", "Image 2", {}, "A"),
        ("\nA. The first image\nB. The second image", "second image.", {}, "B"), ("\nA. Image 1\nB. Image 2", "the second image", {}, "B"), ("\nA. Image 1\nB. Images 1 and 2", "Images 2 and 1", {}, "B"),
        # No option says it, or two do, or it is not the only list, or no image is named.
        ("\nA. Image 1\nB. Image 2", "Image 3", {}, "Image 3"), ("\nA. Image 1\nB. the first image", "first image", {}, "first image"), ("\nA. The first image\nB. The second image", "image 2", {}, "image 2"),
        ("\nA. Image 1\nB. Image 2\n(A) Image 2\n(B) Image 1", "Image 2", {}, "Image 2"), (" A: <image> B: <image>\n(A) Image 2\n(B) Image 1", "Image 2", {}, "Image 2"),
        ("\nA. 2\nB. 1", "2", {}, "2"), ("\nA. a cat\nB. a dog", "a dog", {}, "a dog"), (" Image 1 or Image 2", "Image 2", {}, "Image 2"),
        ("\nA. Image 2\nB. Image 1", "B. Image 1", {}, "B. Image 1"),
        # What the row's own response gives is what is to be answered.
        (" A) Image 1 B) Image 2", "Image 2", {"demonstration": r"So \boxed{image 2}"}, "Image 2"), (" A) Image 1 B) Image 2", "Image 2", {"demonstration": r"So \boxed{B}"}, "B"),
    ],
)  # fmt: skip
def test_an_image_that_an_option_in_the_text_names_is_answered_by_letter(
    listed: str, answer: str, row: dict[str, Any], gold: str
) -> None:
    slots = "" if "<image>" in listed else "<image> <image>"
    assert (
        read({"question": f"{slots} Which is it?{listed}", "answer": answer, **row}).answer == gold
    )


@pytest.mark.parametrize("listed", ["A) Image 1 B) Image 2", "A) Image 2 B) Image 1"])
def test_the_letter_of_an_image_follows_it(listed: str) -> None:
    example = read(
        {"question": f"<image> <image> Which? {listed}", "answer": "Image 2", "kind": "all"}
    )
    right, wrong = ("B", "A") if listed[3:10] == "Image 1" else ("A", "B")
    answers = [permute(example, (1, 0), text).answer for text in ("slots", "references")]
    assert answers == [wrong, right]
