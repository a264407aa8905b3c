"""The lines of docs/errors.md are what the program says: each mistake is made, and its line looked up there."""

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from perl.rollout.opening import fingerprint

ErrorOf = Callable[..., str]
DOCUMENT = (Path(__file__).parents[1] / "docs" / "errors.md").read_text("utf-8").replace("``", "`")


def check(said: str) -> None:
    assert f"| `{said}` |" in DOCUMENT, said


@pytest.fixture
def here(short_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a recipe, to be worked in, so that messages name files as a user's would."""
    for name in ("PERL_LLM_URL", "PERL_LLM_MODEL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(short_recipe.parent)
    short_recipe.rename("recipe.toml")
    shutil.copy("data.jsonl", "train.jsonl")
    return short_recipe.parent


def change_row(**changes: Any) -> None:
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    rows[3] |= changes
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "nonsense"},
        {"kind": "ordering"},
        {
            "question": "<image> <image> What is the order of events? A. 2, 1 B. 1, 2",
            "kind": "ordering",
            "should_change": False,
        },
        {"answer": "E"},
        {"answer": "B", "should_change": False},
    ],
    ids=str,
)
def test_rows(changes: dict[str, Any], here: Path, error_of: ErrorOf) -> None:
    change_row(**changes)
    check(error_of("train", "recipe.toml", "--data.train", "train.jsonl"))


def test_a_text_that_names_an_image_that_moves(here: Path, error_of: ErrorOf) -> None:
    change_row(question="<image> <image> Is image 1 a three ?", answer="yes", should_change=False)
    check(error_of("train", "recipe.toml", "--data.train", "train.jsonl"))


def test_a_text_that_cannot_follow(here: Path, error_of: ErrorOf) -> None:
    change_row(question="Image 1: <image> and this one: <image> Is image 1 a three ?", answer="yes")
    change_row(should_change=False)
    options = ("--data.train", "train.jsonl", "--permutation.text", "references")
    check(error_of("train", "recipe.toml", *options))


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        ([{"name": "a", "kind": "rl", "train": {"lrr": 1}}], ()),
        ([{"name": "a", "kind": "rl", "model": {"path": "x"}}], ()),
        ([{"name": "a", "kind": "sft"}], ()),
        ([{"name": "a", "kind": "rl"}, {"name": "a", "kind": "rl"}], ()),
        ([{"name": "a", "kind": "filter", "data": {"train": "bundled:digits"}}], ()),
        ([{"name": "a", "kind": "filter", "resample": {"size": 7}}], ()),
        ([], ("--data.mix", "k12.jsonl*0")),
        ([], ("--data.mix", "k12.jsonl*2")),
    ],
    ids=str,
)
def test_stages_and_mixes(
    stages: list[dict[str, Any]], options: tuple[str, ...], here: Path, error_of: ErrorOf
) -> None:
    recipe = tomllib.loads(Path("recipe.toml").read_text())
    recipe["data"] |= {"train": "train.jsonl"}
    Path("recipe.toml").write_text(tomli_w.dumps(recipe | ({"stages": stages} if stages else {})))
    check(error_of("train", "recipe.toml", *options))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"step": 1}),
        ("train", {"steps": "1"}),
        ("rollout", {"per_order": 0}),
        ("reward", {"functions": ["accuracy", "format"], "weights": [1.0]}),
    ],
)
def test_recipes(section: str, values: dict[str, Any], here: Path, error_of: ErrorOf) -> None:
    recipe = tomllib.loads(Path("recipe.toml").read_text())
    recipe[section] = {**recipe.get(section, {}), **values}
    Path("recipe.toml").write_text(tomli_w.dumps(recipe))
    check(error_of("train", "recipe.toml"))


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train", "demoo"],
        ["train", "recipe.toml", "--train.lrr", "1"],
        ["train", "recipe.toml", "--train.steps", "abc"],
        ["train", "recipe.toml", "--run.dir", "runs/demo"],
        ["train", "recipe.toml", "--run.dir", "other", "--overwrite"],
    ],
    ids=" ".join,
)
def test_command_lines(words: list[str], here: Path, error_of: ErrorOf) -> None:
    for folder in ("runs/demo", "other"):
        Path(folder).mkdir(parents=True)
        Path(folder, "mine").touch()
    check(error_of(*words))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("acuracy", ""),
        ("box_iou(treshold=0.5)", ""),
        ("box_iou(0.5)", ""),
        ("mine.py:f", "def f(**c): raise RuntimeError('first')"),
        ("mine.py:f", "def f(**c): return [1.0]"),
        ("mine.py:f", "import threading\ndef f(**c): threading.Event().wait(9)"),
        ("mine.py:g", "def f(**c): return [1.0]"),
    ],
)
def test_rewards(name: str, source: str, here: Path, error_of: ErrorOf) -> None:
    Path("mine.py").write_text(source)
    options = ("--reward.functions", name, "--reward.weights", "1", "--reward.timeout", "0.2")
    said = error_of("train", "recipe.toml", *options)
    check(said.replace("= 0.2 s", "= 60 s"))


@pytest.mark.parametrize(
    "words",
    [
        ["label", "bundled:digits"],
        ["label", "train.jsonl", "--labeller", "llm"],
        ["label", "train.jsonl", "--output", "mine.jsonl"],
        ["label", "train.jsonl", "--output", "mine.jsonl", "--overwrite"],
        ["label", "train.jsonl", "--output", "train.jsonl"],
        ["filter", "MODEL", "--data", "bundled:digits"],
        ["filter", "MODEL", "--data", "train.jsonl", "--orders", "11"],
        ["filter", "MODEL", "--data", "train.jsonl", "--histogram", "flat"],
        ["filter", "MODEL", "--data", "train.jsonl", "--accuracies", "mine.jsonl"],
        ["filter", "MODEL", "--data", "train.jsonl", "--rollouts", "4"],
        ["evaluate", "MODEL", "--suite", "blinc"],
        ["evaluate", "MODEL", "--suite", "blink"],
        ["evaluate", "MODEL", "--suite", "mathvision", "--suite-root", "bench", "--output", "out"],
        ["evaluate", "MODEL", "--orders", "2"],
        ["compare", "plain"],
        ["compare", "plain", "bench"],
        ["compare", "plain", "permuted"],
    ],
    ids=" ".join,
)
def test_other_commands(
    words: list[str], here: Path, tiny_folder: Callable[[str], Path], error_of: ErrorOf
) -> None:
    Path("mine.jsonl").write_text('{"mine": 1}\n')
    measured = {"index": 0, "id": "row-0", "accuracy": 0.5, "asked": 10, "orders": 1}
    measured |= {"text": "slots", "temperature": 1.0, "max_new_tokens": 512, "seed": 0}
    measured["weights"] = fingerprint(str(tiny_folder("tiny-qwen2.5-vl")))
    Path("train.accuracies.jsonl").write_text(json.dumps(measured) + "\n")
    Path("bench/mathvision").mkdir(parents=True)
    for folder, count in (("plain", 2), ("permuted", 3)):
        Path(folder).mkdir()
        Path(folder, "settings.json").write_text('{"model": "m"}')
        row = {"task": "", "movable": True, "completion": "", "finished": True, "answer": ""}
        row |= {"order": [0, 1], "score": 1.0}
        lines = [json.dumps(row | {"id": f"val_Jigsaw_{k}"}) + "\n" for k in range(count)]
        Path(folder, "blink.jsonl").write_text("".join(lines))
    os.symlink(tiny_folder("tiny-qwen2.5-vl"), "model")
    check(error_of(*("model" if word == "MODEL" else word for word in words)))


def test_an_endpoint_that_is_down(
    here: Path, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.llm._LONGEST_WAIT", 0.01)
    monkeypatch.setenv("PERL_LLM_URL", "http://localhost:9/v1")
    for model in ("", "judge"):
        monkeypatch.setenv("PERL_LLM_MODEL", model)
        said = error_of("label", "train.jsonl", "--labeller", "llm")
        check(said.replace("localhost:9", "localhost:8000"))
