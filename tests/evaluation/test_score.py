"""`perl-rl score`: completions that are there already, each in its own order of the images."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.files import RunFolder
from perl.permutation import permute
from perl.report.gallery import Gallery
from perl.types import EncodedImage, EncodedPrompt, Message, Rollout
from tests.command_line import ErrorOf, json_lines, run
from tests.messages import tells

Row = dict[str, Any]
Files = Callable[..., tuple[str, str]]

ROWS: list[Row] = [
    {"id": "dog", "images": 3, "question": "A. <image> B. <image> C. <image> Which shows a dog?", "answer": "B", "kind": "all"},
    {"id": 7, "images": 4, "question": "<image> <image> <image> <image> Which images show a bicycle?", "answer": "2, 4", "kind": "all"},
    {"images": 2, "question": "<image><image> How many of them show a bus?", "answer": "1", "kind": "all", "should_change": False},
    {"id": "chat", "images": 2, "question": [{"role": "user", "content": "A <image> B <image> Which is a cat?"}], "answer": "A", "kind": "all"},
    {"id": "taken", "images": 3, "question": "<image> <image> <image> In which order were they taken? A. 1, 3, 2 B. 2, 1, 3", "answer": "A", "kind": "ordering"},
    {"id": "only", "images": 1, "question": "<image> What is it?", "answer": "", "kind": "none"},
    {"id": "scene", "images": 3, "question": "<image> What is behind it? A. <image> B. <image>", "answer": "A", "kind": "first_fixed"},
    {"id": "stays", "images": 2, "question": "A <image> B <image> Which is a cat?", "answer": "A"},
    {"id": "named", "images": 2, "question": "<image> <image> Does image 2 show a dog?", "answer": "yes", "kind": "all", "should_change": False},
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Writes data.jsonl, whose pictures are as many of 1.png, 2.png, ... as a row says, and completions.jsonl. The k-th
    picture has the grey value k."""
    monkeypatch.chdir(tmp_path)
    for k in range(1, 5):
        Image.new("L", (2, 2), k).save(f"{k}.png")

    def write(*completions: Row, rows: list[Row] = ROWS) -> tuple[str, str]:
        named = [{**r, "images": [f"{k}.png" for k in range(1, r["images"] + 1)]} for r in rows]
        for name, lines in (("data.jsonl", named), ("completions.jsonl", completions)):
            Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "data.jsonl", "completions.jsonl"

    return write


def thought(answer: str) -> str:
    return f"<think> look </think> \\boxed{{{answer}}}"


def scored(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[Row]:
    assert run("score", *arguments, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def line(id: object, order: list[int], accuracy: Any, form: float, answer: Any, gold: Any) -> Row:
    rewards = {"accuracy": accuracy, "format": form}
    return {"id": id, "order": order, "rewards": rewards, "answer": answer, "gold": gold}


CASES: list[tuple[Row, Row]] = [
    ({"id": "dog", "completion": thought("B")}, line("dog", [1, 2, 3], 1.0, 1.0, "B", "B")),
    # Slot 1 shows image 2, the dog.
    (
        {"id": "dog", "completion": thought("A"), "order": [2, 3, 1]},
        line("dog", [2, 3, 1], 1.0, 1.0, "A", "A"),
    ),
    (
        {"id": "dog", "completion": "\\boxed{B}", "order": [2, 3, 1]},
        line("dog", [2, 3, 1], 0.0, 0.0, "B", "A"),
    ),
    (
        {"id": "dog", "completion": "It is B.", "order": None},
        line("dog", [1, 2, 3], 0.0, 0.0, None, "B"),
    ),
    # Image 2 stands in slot 1, image 4 in slot 4.
    (
        {"id": 7, "completion": thought("1, 4"), "order": [2, 1, 3, 4]},
        line(7, [2, 1, 3, 4], 1.0, 1.0, "1, 4", "1, 4"),
    ),
    # Which images are a set: in any sequence.
    (
        {"id": 7, "completion": thought("4 and 1"), "order": [2, 1, 3, 4]},
        line(7, [2, 1, 3, 4], 1.0, 1.0, "4 and 1", "1, 4"),
    ),
    (
        {"id": "7", "completion": thought("2, 4"), "order": [2, 1, 3, 4]},
        line("7", [2, 1, 3, 4], 0.0, 1.0, "2, 4", "1, 4"),
    ),
    # A row without an id goes by its place, from 0; its count stays.
    (
        {"id": "row-000002", "completion": thought("1"), "order": [2, 1]},
        line("row-000002", [2, 1], 1.0, 1.0, "1", "1"),
    ),
    (
        {"id": "chat", "completion": thought("B"), "order": [2, 1]},
        line("chat", [2, 1], 1.0, 1.0, "B", "B"),
    ),
    # Read as 2, 1, 3 they show images 1, 3, 2.
    (
        {"id": "taken", "completion": thought("B"), "order": [3, 1, 2]},
        line("taken", [3, 1, 2], 1.0, 1.0, "B", "B"),
    ),
    ({"id": "only", "completion": thought("x")}, line("only", [1], None, 1.0, "x", None)),
    (
        {"id": "scene", "completion": thought("B"), "order": [1, 3, 2]},
        line("scene", [1, 3, 2], 1.0, 1.0, "B", "B"),
    ),
    (
        {"id": "stays", "completion": "", "order": [1, 2]},
        line("stays", [1, 2], 0.0, 0.0, None, "A"),
    ),
]


def test_a_line_for_each_completion_in_its_order(files: Files, capsys: Any) -> None:
    names = files(*(given for given, _ in CASES))
    assert scored(capsys, *names) == [expected for _, expected in CASES]


def test_standard_input_weights_and_a_file(
    files: Files, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weighted sum is over the functions that gave something."""
    data, completions = files(*(given for given, _ in CASES))
    stdin = SimpleNamespace(buffer=io.BytesIO(Path(completions).read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    words = ("--functions", "accuracy", "format", "--weights", 0.5, 0.25, "--output", "out.jsonl")
    printed = scored(capsys, data, "-", *words)
    assert [row["reward"] for row in printed] == [
        *(0.75, 0.75, 0.0, 0.0, 0.75, 0.75, 0.25, 0.75, 0.75, 0.75),
        *(0.25, 0.75, 0.0),
    ]
    assert json_lines(Path("out.jsonl")) == printed
    assert [{k: v for k, v in row.items() if k != "reward"} for row in printed] == [
        expected for _, expected in CASES
    ]


def test_the_text_may_follow_its_images(files: Files, capsys: Any, error_of: ErrorOf) -> None:
    names = files({"id": "named", "completion": thought("yes"), "order": [2, 1]})
    assert scored(capsys, *names, "--text", "references") == [
        line("named", [2, 1], 1.0, 1.0, "yes", "yes")
    ]
    said = error_of("score", *names)
    tells(said, "completions.jsonl line 1", "[2, 1]", "'named'", "permutation.text")


FUNCTIONS = """
def f(completions, images, answer, **columns):
    if any("fail" in text for text in completions):
        raise ValueError("quota-42")
    scores = [image[0].getpixel((0, 0))[0] / 2 for image in images]
    return [None if "skip" in text else score for text, score in zip(completions, scores)]

def parts(solution_str, ground_truth, **more):
    return {"score": len(solution_str), "right": solution_str == ground_truth}

def tokens(completions, completion_ids):
    return [0.0 for _ in completions]

def short(completions):
    return [1.0]
"""


def test_functions_of_ones_own(files: Files, capsys: Any) -> None:
    """Pictures are decoded for one that takes them, in the order shown; a fault costs one score, and is told."""
    Path("mine.py").write_text(FUNCTIONS)
    texts = ("A", "fail", "skip")
    names = files(*({"id": "dog", "completion": t, "order": [2, 3, 1]} for t in texts))
    rows = scored(capsys, *names, "--functions", "mine.py:f", "mine.py:parts", "choice")
    numbers = [[*row["rewards"].values(), row["answer"]] for row in rows]
    assert list(rows[0]["rewards"]) == ["f", "parts", "parts/right", "choice"]
    assert numbers == [[1.0, 1.0, 1.0, 1.0, "A"], [None, 4.0, 0.0, 0.0, None], [None, 4.0, 0.0, 0.0, None]]  # fmt: skip
    assert [list(row.get("faults", {})) for row in rows] == [[], ["f"], []]
    tells(rows[1]["faults"]["f"], "ValueError", "quota-42")


def test_a_function_that_fails_on_all_completions(files: Files, error_of: ErrorOf) -> None:
    """Whose tokens it would be given is not known."""
    Path("mine.py").write_text(FUNCTIONS)
    names = files(*({"id": "dog", "completion": text} for text in "AB"))
    functions = ("--functions", "choice", "mine.py:tokens", "--output", "out.jsonl")
    tells(error_of("score", *names, *functions), "'tokens'", "completion_ids", "'dog'")
    assert not Path("out.jsonl").exists()


def test_no_picture_is_decoded_for_functions_that_see_none(
    files: Files, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.data.pictures.to_rgb", lambda image: pytest.fail("decoded"))
    Path("mine.py").write_text(FUNCTIONS)
    names = files({"id": "dog", "completion": "A"})
    (row,) = scored(capsys, *names, "--functions", "choice", "mine.py:parts")
    assert row["rewards"]["choice"] == 0.0


def test_the_table(files: Files, capsys: Any) -> None:
    """Means over what was scored, what was not and why, and which rows have no completion."""
    wrong = [{"id": "dog", "completion": thought("C")}] * 20
    names = files(*(given for given, _ in CASES), *wrong)
    assert run("score", *names, "--weights", 1, 0) == 0
    out = capsys.readouterr().out
    found = {
        m[1]: m[2].split()
        for m in re.finditer(r"^ (accuracy|format|weighted sum) +(.*)$", out, re.M)
    }
    assert found == {
        "accuracy": ["0.25", "32", "1"],
        "format": ["0.9091", "33", "0"],
        "weighted sum": ["0.25", "32", "1"],
    }
    assert "dog 2 3 1 B A 0 0 0" in [" ".join(row.split()) for row in out.splitlines()]
    tells(out, "13 more", "2 of the 33", "1 of the 9", "accuracy: 1", "--output")


def record(stage: str, id: str, order: tuple[int, ...], text: str, asked: str = "Box it.") -> None:
    """Add a rollout to the run's record, as a run does."""
    folder = RunFolder(Path("run"))
    folder.images.mkdir(parents=True, exist_ok=True)
    data = load_examples("data.jsonl", DataConfig(), "train", 0)
    variant = permute(next(e for e in map(data.__getitem__, range(8)) if e.id == id), order)
    content = f"{variant.messages[0].content}\n{asked}"
    variant = replace(variant, asked=(Message("user", content),))
    pictures = tuple(EncodedImage(str(i), np.zeros(1), (1, 1, 1), 1) for i in order)  # type: ignore[arg-type]
    none = np.zeros(0)
    prompt = EncodedPrompt(none, none, 0, pictures, -1)
    rollout = Rollout(variant, prompt, none, none, text, True)
    Gallery(folder).keep_rollouts(stage, 1, [(rollout, 0.0, {})])


def test_the_record_of_a_run(files: Files, capsys: Any, error_of: ErrorOf) -> None:
    """Its orders count from 0. What was asked must be in the data, so that other data with the same ids are noticed."""
    data, _ = files()
    record("rl", "dog", (1, 2, 0), thought("A"))
    record("evaluate", "chat", (1, 0), thought("A"))
    rollouts = Path("run/rollouts.jsonl")
    both = [
        line("dog", [2, 3, 1], 1.0, 1.0, "A", "A"),
        line("chat", [2, 1], 0.0, 1.0, "A", "B"),
    ]
    assert scored(capsys, data, rollouts) == both
    assert scored(capsys, data, rollouts, "--stage", "evaluate") == both[1:]
    other = [{**ROWS[0], "question": "A. <image> B. <image> C. <image> Which shows a cow?"}]
    files(rows=other)
    told = error_of("score", data, rollouts, "--stage", "rl")
    tells(told, f"{rollouts} line 1", "data.jsonl line 1", "--text", "--stage")
    tells(error_of("score", data, rollouts), f"{rollouts} line 2", "'chat'")


DOG = {"id": "dog", "completion": "A"}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**DOG, "id": "cow"}, ["'cow'", "data.jsonl", "'dog'"]),
        ({**DOG, "id": "row-000000"}, ["'row-000000'"]),  # It has an id of its own.
        ({**DOG, "id": None}, ["id", "missing"]),
        ({**DOG, "id": True}, ["'True'"]),
        ({**DOG, "id": 1.0}, ["id", "1.0"]),
        ({"id": "dog"}, ["completion", "missing"]),
        ({**DOG, "completion": ["A"]}, ["completion", "['A']", "list"]),
        ({**DOG, "order": [1, 2]}, ["[1, 2]", "3", "'dog'"]),
        ({**DOG, "order": [0, 1, 2]}, ["[0, 1, 2]", "'dog'"]),
        ({**DOG, "order": [1, 2, 2]}, ["[1, 2, 2]", "'dog'"]),
        ({**DOG, "order": [1, 2, 3, 4]}, ["[1, 2, 3, 4]", "'dog'"]),
        ({**DOG, "order": [True, 2, 3]}, ["order", "list"]),
        ({**DOG, "order": "2 3 1"}, ["order", "2 3 1", "[2, 1]"]),
        ({**DOG, "orders": [2, 3, 1]}, ["orders", "order"]),
        ({**DOG, "id": "scene", "order": [2, 1, 3]}, ["[2, 1, 3]", "2", "1", "'first_fixed'", "'scene'"]),
        ({**DOG, "id": "taken", "order": [2, 1, 3]}, ["[2, 1, 3]", "'ordering'", "'taken'"]),
        ({**DOG, "id": "stays", "order": [2, 1]}, ["[2, 1]", "'none'", "'stays'", "perl-rl label"]),
    ],
)  # fmt: skip
def test_a_faulty_completion_is_named(
    row: Row, names: list[str], files: Files, error_of: ErrorOf
) -> None:
    """By file and line, before anything is written."""
    Path("out.jsonl").write_text("kept")
    said = error_of("score", *files(DOG, row, DOG), "--output", "out.jsonl")
    tells(said, "completions.jsonl line 2", *names)
    assert Path("out.jsonl").read_text() == "kept"


def test_faulty_files_and_options(files: Files, error_of: ErrorOf) -> None:
    data, completions = files(DOG)
    tells(error_of("score"), "perl-rl score", "DATA")
    tells(error_of("score", data), "COMPLETIONS", "-")
    tells(error_of("score", data, "none.jsonl"), "none.jsonl")
    tells(error_of("score", "bundled:digits", completions), "bundled:digits")
    tells(error_of("score", data, completions, "--output", data), "--output", data)
    tells(error_of("score", data, completions, "--output", completions), "--output", completions)
    tells(error_of("score", data, completions, "--stage", "rl"), completions, "stage rl")
    tells(error_of("score", data, completions, "--functions", "acuracy"), "'acuracy'", "'accuracy'")
    tells(error_of("score", data, completions, "--weights", 1), "1", "2", "accuracy, format")
    tells(error_of("score", data, completions, "--timeout", -1), "--timeout -1.0")
    options = ("--functions", "length_penalty(longest=9, buffer=1)")
    tells(error_of("score", data, completions, *options), "completion_length", "unit")
    Path("mine.py").write_text(FUNCTIONS)
    files(DOG, DOG)
    options = ("--functions", "mine.py:short", "--output", "out.jsonl")
    tells(error_of("score", data, completions, *options), "'short'", "1 values", "2 completions")
    assert not Path("out.jsonl").exists()
    for broken, place in (('{"id": "dog"', "line 2"), ("[1]", "line 2")):
        Path(completions).write_text(f"{json.dumps(DOG)}\n{broken}\n")
        tells(error_of("score", data, completions), f"{completions} {place}")
    with Path(data).open("a") as file:  # What no completion answers may be faulty.
        file.write('{"id":\n{"id": "empty"}\n')
    Path(completions).write_text(f"{json.dumps(DOG)}\n")
    assert run("score", data, completions) == 0
    for number, id in ((1, f"row-{len(ROWS):06d}"), (2, "empty")):
        Path(completions).write_text(json.dumps({**DOG, "id": id}))
        tells(error_of("score", data, completions), f"data.jsonl line {len(ROWS) + number}")
    Path(completions).write_text("")
    tells(error_of("score", data, completions), completions)
    files(DOG, rows=[ROWS[0], ROWS[3], ROWS[0]])
    tells(error_of("score", data, completions), "data.jsonl line 1", "data.jsonl line 3", "'dog'")
