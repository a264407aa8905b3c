"""Bundled questions: right, worked out in known words, fair, and over pictures kept apart."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.pictures import DIGITS, Split, load_collection
from perl.data.tasks import TASKS, BundledTasks, vocabulary, with_noise
from perl.permutation import LETTERS, num_orders, orders, permute
from perl.rewards.answers import accuracy, format_reward
from perl.rewards.reading import extract_answer
from perl.types import Example
from tests.messages import refused

ALL = tuple(TASKS)


def bundled(
    collection: str = "digits", split: Split = "train", seed: int = 0, **settings: Any
) -> BundledTasks:
    return BundledTasks(collection, split, DataConfig(**settings), seed)


@pytest.fixture(scope="module")
def made() -> list[Example]:
    tasks = bundled(tasks=ALL, max_images=6, seed=3)
    return [tasks[i] for i in range(600)]


@pytest.fixture(scope="module")
def label_of() -> dict[bytes, str]:
    """What each picture shows, by its pixels."""
    digits = load_collection("digits")
    return {
        digits.open(key).tobytes(): DIGITS[c]
        for split in ("train", "test")
        for c, keys in enumerate(digits.keys[split])
        for key in keys
    }


def solve(example: Example, shown: list[str]) -> str:
    """The answer by looking at what is shown, independently of how the question was made."""
    words = example.question.split() if isinstance(example.question, str) else []
    ask = words[2 * len(shown) :] if len(shown) > 1 else words[1:]
    counts = Counter(shown)
    if example.task == "which":
        assert counts[ask[3]] == 1
        return LETTERS[shown.index(ask[3])]
    if example.task == "odd":
        (odd,) = [word for word, count in counts.items() if count == 1]
        assert len(counts) == 2
        return LETTERS[shown.index(odd)]
    if example.task == "count":
        return str(counts[ask[4]])
    if example.task == "first":
        values = [DIGITS.index(word) for word in shown]
        assert values.count(min(values)) == 1
        return LETTERS[values.index(min(values))]
    if example.task == "same":
        return "yes" if shown[LETTERS.index(ask[2])] == shown[LETTERS.index(ask[5])] else "no"
    return shown[0]


def test_answers_are_right_in_every_order(made: list[Example], label_of: dict[bytes, str]) -> None:
    for example in made:
        for order in orders(example, 3, 0, 0):
            variant = permute(example, order)
            shown = [label_of[image.tobytes()] for image in variant.images]
            assert solve(example, shown) == variant.answer


def test_worked_answers_get_the_full_reward_and_use_known_words(made: list[Example]) -> None:
    words = set(vocabulary())
    for example in made:
        assert example.demonstration is not None
        assert words.issuperset(f"{example.question} {example.demonstration}".split(" "))
        assert extract_answer(example.demonstration) == example.answer
        assert accuracy([""], [example.demonstration], [example.answer]) == [1.0]
        assert format_reward([""], [example.demonstration]) == [1.0]
        assert example.answer in example.extra["choices"]


def test_worked_answers_go_over_all_images(made: list[Example]) -> None:
    """Their length tells the number of images and nothing about the answer."""
    lengths: dict[tuple[str, int], set[int]] = {}
    for example in made:
        key = example.task, len(example.images)
        lengths.setdefault(key, set()).add(len((example.demonstration or "").split(" ")))
    assert all(len(found) == 1 for found in lengths.values())


def test_vocabulary_is_small_and_without_repetition() -> None:
    words = vocabulary()
    assert len(words) == len(set(words)) < 100
    assert {"<image>", "<think>", "</think>", "\\boxed{", "}", "A", "0", "zero", "?"} <= set(words)
    assert not any(" " in word for word in words)


def test_the_documented_form() -> None:
    example = bundled(min_images=3, max_images=3)[0]
    assert example.id == "digits-train-which-000000"
    assert (example.kind, example.should_change, example.task) == ("all", True, "which")
    words = str(example.question).split()
    assert words[:9] == ["A", "<image>", "B", "<image>", "C", "<image>", "which", "image", "shows"]
    assert words[10:] == ["?"]
    steps = str(example.demonstration).split()
    assert steps[0] == "<think>" and steps[1::4][:3] == ["A", "B", "C"]
    assert set(steps[3:13:4]) == {words[9]}
    assert steps[-4:] == ["</think>", "\\boxed{", example.answer, "}"]


def test_tasks_take_turns_and_say_what_may_move(made: list[Example]) -> None:
    assert [example.task for example in made[:7]] == [*ALL, ALL[0]]
    by_task = {task: [e for e in made if e.task == task] for task in ALL}
    fixed = by_task["count"] + by_task["same"] + by_task["single"]
    assert not any(e.should_change for e in fixed)
    assert {e.kind for e in by_task["single"]} == {"none"}
    for task, counts in (("single", {1}), ("odd", {3, 4, 5, 6}), ("which", {2, 3, 4, 5, 6})):
        assert {len(e.images) for e in by_task[task]} == counts
    for example in by_task["same"]:
        n = len(example.images)
        assert num_orders(example) == 2 * math.factorial(n - 2)


def test_answers_are_balanced() -> None:
    tasks = bundled(tasks=("which", "odd", "first", "same"), min_images=4, max_images=4)
    made = [tasks[i] for i in range(1200)]
    for task, likely in (("which", 4), ("odd", 4), ("first", 4), ("same", 2)):
        counts = Counter(example.answer for example in made if example.task == task)
        assert len(counts) == likely
        assert max(counts.values()) < 1.35 * 300 / likely


def test_examples_depend_on_seed_split_and_number_alone() -> None:
    def texts(**settings: Any) -> list[str]:
        tasks = bundled(max_images=6, **settings)
        return [f"{tasks[i].question} {tasks[i].answer}" for i in range(20)]

    assert texts(seed=1) == texts(seed=1)
    distinct = [texts(seed=1), texts(seed=2), texts(seed=1, split="test")]
    assert all(one != two for one, two in itertools.combinations(distinct, 2))


def test_train_and_test_pictures_are_disjoint() -> None:
    digits = load_collection("digits")
    pixels = {
        split: {digits.open(key).tobytes() for keys in digits.keys[split] for key in keys}
        for split in ("train", "test")
    }
    assert not pixels["train"] & pixels["test"]
    assert sum(map(len, pixels.values())) == 1797
    assert 300 < len(pixels["test"]) < 420
    used = bundled(split="test", tasks=ALL, max_images=6)
    shown = {image.tobytes() for i in range(200) for image in used[i].images}
    assert shown <= pixels["test"]


def test_digit_pictures_are_dark_ink_on_white_paper() -> None:
    digits = load_collection("digits")
    picture = digits.open(digits.keys["train"][0][0])
    assert (picture.mode, picture.size) == ("RGB", (28, 28))
    pixels = np.asarray(picture)
    assert pixels.min() < 60 and pixels.max() == 255 and np.median(pixels) > 128


def test_pictures_of_a_class_differ_within_an_example() -> None:
    tasks = bundled(tasks=("odd",), min_images=6, max_images=6)
    for i in range(50):
        assert len({image.tobytes() for image in tasks[i].images}) == 6


def test_noise_replaces_the_final_answer_by_a_wrong_one(made: list[Example]) -> None:
    rng = random.Random(0)
    for example in made:
        assert with_noise(example, 0.0, rng) == example.demonstration
        noisy = with_noise(example, 1.0, rng)
        answer = extract_answer(noisy)
        assert answer != example.answer and answer in example.extra["choices"]
        steps, *_ = (example.demonstration or "").rpartition("\\boxed{")
        assert noisy.rpartition("\\boxed{")[0] == steps
    share = sum(with_noise(e, 0.4, rng) != e.demonstration for e in made) / len(made)
    assert 0.33 < share < 0.47


def test_noise_on_data_without_choices() -> None:
    images: Any = (0, 0, 0)
    example = Example("q", images, "<image><image><image>", "B", demonstration="so \\boxed{B}")
    found = {with_noise(example, 1.0, random.Random(i)) for i in range(20)}
    assert found == {"so \\boxed{A}", "so \\boxed{C}"}
    word = Example("q", images, "<image><image><image>", "blue", demonstration="so \\boxed{blue}")
    assert with_noise(word, 1.0, random.Random(0)) == "so \\boxed{blue}"
    with refused("example 'q'", "demonstration", "cold_start.steps"):
        with_noise(Example("q", images, "", "B"), 1.0, random.Random(0))


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for c, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (c, i, 0)).save(root / label / f"{i}.png")
    return root


def test_a_folder_is_a_collection(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"Red Fox": 5, "cat": 10, "dog": 2})
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / ".hidden").mkdir()
    source = f"folder:{root}"
    pets = load_collection(source)
    assert pets.labels == ("cat", "dog", "red_fox")
    assert [len(keys) for keys in pets.keys["test"]] == [2, 1, 1]
    assert [len(keys) for keys in pets.keys["train"]] == [8, 1, 4]
    assert {"cat", "dog", "red_fox"} <= set(vocabulary(source))
    tasks, words = bundled(source, tasks=ALL, max_images=6), set(vocabulary(source))
    for example in map(tasks.__getitem__, range(60)):
        assert example.id.startswith("pets-train-")
        assert words.issuperset(f"{example.question} {example.demonstration}".split(" "))


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ({}, ("0 sub-folders", "images")),
        ({"cat": 3}, ("1 sub-folders", "images")),
        ({"cat": 3, "dog": 1}, ("dog", "1 images", "two")),
        ({"cat": 3, "Cat": 3}, ("'cat'", "rename")),
    ],
)
def test_bad_folders(tmp_path: Path, counts: dict[str, int], names: tuple[str, ...]) -> None:
    with refused(f"picture folder {tmp_path}", *names):
        load_collection(f"folder:{make_folder(tmp_path, counts)}")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("digit", ("'digit'", "digits", "folder:PATH")),
        ("folder:", ("'folder:'", "digits", "folder:PATH")),
        ("folder:/no/such/folder", ("/no/such/folder", "path", "folder:")),
    ],
)
def test_unknown_collections(source: str, names: tuple[str, ...]) -> None:
    with refused(*names):
        load_collection(source)


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"cat": 2, "dog": 2})
    for file in root.rglob("*.png"):
        file.write_bytes(b"no picture")
    with refused(root / "cat" / "0.png", "replace"):
        bundled(f"folder:{root}")[0]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tasks": ()}, ("data.tasks", *ALL)),
        ({"tasks": ("whihc",)}, ("'whihc'", "data.tasks", *ALL)),
        ({"min_images": 1}, ("data.min_images=1", "data.max_images=4", 2)),
        ({"min_images": 5}, ("data.min_images=5", "data.max_images=4", 2)),
        ({"max_images": 27}, ("data.max_images=27", 26)),
        ({"tasks": ("odd",), "max_images": 2}, ("odd", "data.max_images", 3)),
    ],
)
def test_bad_settings(settings: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(*names):
        bundled(**settings)


@pytest.mark.parametrize("task", ["which", "odd", "first"])
def test_a_position_bias_of_the_training_questions(task: str) -> None:
    def share_of_first(split: Split) -> float:
        settings: Any = {"tasks": (task,), "min_images": 3, "first_slot": 0.6}
        tasks = bundled(split=split, seed=1, **settings)
        return sum(tasks[i].answer == "A" for i in range(300)) / 300

    assert share_of_first("train") == pytest.approx(0.6, abs=0.12)  # four standard errors
    assert share_of_first("test") == pytest.approx(0.29, abs=0.11)
