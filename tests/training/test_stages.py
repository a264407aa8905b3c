"""Stages of a run: how they are written, in which sequence they come, and that a run goes on in any of them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from perl.cli import parse
from perl.recipe import (
    filtered_file,
    filtered_sources,
    load_recipe,
    plan,
    points,
    read_config,
    source_key,
    to_toml,
)
from tests.command_line import ErrorOf, json_lines, metrics, run
from tests.messages import refused, tells
from tests.training.two_tokens import config_of, session_of

STAGED = """
data.tasks = ["which"]
train = { lr = 1e-4, steps = 7 }

[[stages]]
name = "warm"
kind = "cold_start"
cold_start.steps = 5

[[stages]]
name = "sift"
kind = "filter"
data.train = "hard.jsonl"
resample.rollouts = 4

[[stages]]
name = "easy"
kind = "rl"
train.steps = 3

[[stages]]
name = "hard"
kind = "rl"
data.train = "hard.jsonl"
data.mix = ["bundled:digits*0.5", "hard.jsonl*2"]
train.lr = 1e-6
loss.kl_coef = 0.0
permutation.rate = 0.5
rollout.max_new_tokens = 64
"""


def written(folder: Path, text: str) -> str:
    path = folder / "staged.toml"
    path.write_text(text)
    return str(path)


def test_each_stage_has_the_common_values_and_its_own(tmp_path: Path) -> None:
    config = load_recipe(written(tmp_path, STAGED))
    warm, sift, easy, hard = plan(config)
    assert [s.name for s in (warm, sift, easy, hard)] == ["warm", "sift", "easy", "hard"]
    assert [s.steps for s in (warm, sift, easy, hard)] == [5, 0, 3, 7]
    assert (easy.first_step, hard.first_step) == (0, 3)
    assert (easy.config.train.lr, hard.config.train.lr) == (1e-4, 1e-6)
    assert (easy.config.permutation.rate, hard.config.permutation.rate) == (1.0, 0.5)
    assert hard.config.data.tasks == ("which",)
    assert points([warm, sift, easy, hard]) == [
        *("warm", "sift", "before", "easy", "after easy", "hard", "after", "done")
    ]


def test_without_stages_there_is_a_cold_start_and_rl() -> None:
    stages = plan(load_recipe("demo"))
    assert [(s.name, s.kind) for s in stages] == [("cold_start", "cold_start"), ("rl", "rl")]
    assert points(stages) == ["cold_start", "before", "rl", "after", "done"]


def test_stages_read_back_from_what_is_saved(tmp_path: Path) -> None:
    config = load_recipe(written(tmp_path, STAGED))
    (tmp_path / "saved.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "saved.toml") == config


def test_the_command_line_holds_in_every_stage(tmp_path: Path) -> None:
    recipe = written(tmp_path, STAGED)
    config = parse("config", [recipe, "--train.steps", "2", "--data.mix"]).config
    assert [s.config.train.steps for s in plan(config)] == [2, 2, 2, 2]
    assert plan(config)[-1].config.train.lr == 1e-6  # not given, so the stage's own
    # Also where it is the value that the recipe has in common.
    config = parse("config", [recipe, "--train.lr=1e-4", "--filter.no-zero-variance"]).config
    assert [s.config.train.lr for s in plan(config)] == [1e-4] * 4


def test_data_behind_a_filter_stage_are_what_the_last_one_left(tmp_path: Path) -> None:
    again = """
[[stages]]
name = "sift-again"
kind = "filter"
data.train = "./hard.jsonl"

[[stages]]
name = "end"
kind = "rl"
"""
    (tmp_path / "hard.jsonl").touch()
    stages = plan(load_recipe(written(tmp_path, STAGED + again)))
    with contextlib.chdir(tmp_path):
        key = source_key("hard.jsonl")
        assert key == source_key("./hard.jsonl") == str(tmp_path / "hard.jsonl")
        left = [filtered_sources(stage, stages, tmp_path) for stage in stages]
    first, second = (filtered_file(tmp_path, name) for name in ("sift", "sift-again"))
    assert left == [{}, {}, {key: first}, {key: first}, {key: first}, {key: second}]


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ('kind = "rl"', ["stage 1", "name ="]),
        ('name = "a"', ["stage a", "kind ="]),
        ('name = "Big"\nkind = "rl"', ["stage Big", "name = 'Big'"]),
        ('name = "after"\nkind = "rl"', ["stage after", "name after"]),
        ('name = "a"\nkind = "rl"\n[[stages]]\nname = "a"\nkind = "rl"', ["stage a", "name a"]),
        ('name = "a"\nkind = "sft"', ["stage a", "kind = 'sft'", "cold_start, filter, rl"]),
        ('name = "a"\nkind = "rl"\nmodel.path = "x"', ["stage a", "model"]),
        ('name = "a"\nkind = "rl"\ntrain.shards = 2', ["stage a", "train.shards"]),
        ('name = "a"\nkind = "rl"\nrollout.engine = "vllm"', ["stage a", "rollout.engine"]),
        ('name = "a"\nkind = "rl"\ntrian.lr = 1', ["stage a", "trian", "train?"]),
        ('name = "a"\nkind = "rl"\ntrain.lrr = 1', ["stage a", "train.lrr", "train.lr?"]),
        ('name = "a"\nkind = "rl"\ntrain.lr = "x"', ["stage a", "train.lr = 'x'"]),
        ('name = "a"\nkind = "rl"\ntrain.lr = -1', ["stage a", "train.lr = -1"]),
    ],
)
def test_stages_that_make_no_sense(tmp_path: Path, stage: str, names: list[str]) -> None:
    with refused(*names):
        load_recipe(written(tmp_path, f"[[stages]]\n{stage}\n"))
    with refused("stages", "[[stages]]"):
        load_recipe(written(tmp_path, '[stages]\nname = "a"\n'))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["perl-7b", "perl-released", "perl-3b-1gpu", "default"])
def test_the_papers_recipes_run_on_a_tiny_model(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything of the recipe but the model, the data and the sizes."""
    small = (
        "--model.path tiny-qwen2.5-vl --data.train bundled:digits --data.eval bundled:digits "
        "--resample.examples 4 --resample.rollouts 2 --resample.histogram uniform --resample.size 0 "
        "--rollout.per-order 2 --rollout.max-new-tokens 4 --train.steps 1 --train.examples-per-step 2 --filter.max-tries 1 "
        "--train.tokens-per-micro-batch 512 --train.sharding none --eval.examples 2 --run.trackers"
    )
    options = (*small.split(), "--run.dir", tmp_path / "run")
    assert run("train", recipe, *options) == 0, capsys.readouterr().err
    assert [r["step"] for r in metrics(tmp_path / "run", "rl")] == [1]
    assert (tmp_path / "run" / "filtered").exists() == (recipe == "perl-7b")


def test_the_documents_example_is_a_recipe(tmp_path: Path) -> None:
    document = Path(__file__).parents[2] / "docs" / "recipe.md"
    (example,) = re.findall(r"```toml\n(.*?)```", document.read_text(), re.DOTALL)
    stages = plan(load_recipe(written(tmp_path, example)))
    assert [s.kind for s in stages] == ["filter", "rl", "rl"]
    assert stages[-1].first_step == 200


@pytest.fixture
def two_files(short_recipe: Path) -> Path:
    """The six rows of a short recipe in two folders, images in sub-folders, and stages over them."""
    folder = short_recipe.parent
    rows = json_lines(folder / "data.jsonl")
    lines = [json.dumps(r | {"images": [f"images/{i}" for i in r["images"]]}) for r in rows]
    for name in ("train", "test", "more"):
        (folder / name / "images").mkdir(parents=True)
        for image in folder.glob("*.png"):
            shutil.copy(image, folder / name / "images")
        (folder / name / "data.jsonl").write_text("\n".join(lines))
    more = f"""
        data = {{ train = "{folder}/train/data.jsonl", eval = "{folder}/test/data.jsonl" }}
        eval = {{ examples = 2, max_orders = 2 }}
        resample = {{ rollouts = 2, histogram = "uniform" }}
        [[stages]]
        name = "sift"
        kind = "filter"
        [[stages]]
        name = "easy"
        kind = "rl"
        rollout.max_new_tokens = 3
        [[stages]]
        name = "hard"
        kind = "rl"
        data.mix = ["{folder}/more/data.jsonl*2"]
        eval.max_orders = 1
    """
    recipe = tomllib.loads(short_recipe.read_text())
    short_recipe.write_text(tomli_w.dumps(recipe | tomllib.loads(more)))
    return short_recipe


def test_a_filter_stage_measures_by_a_reward_of_the_run(
    two_files: Path, tmp_path: Path, two_tokens: None, error_of: ErrorOf
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def whole(prompts, completions, **columns):\n    return [1.0] * len(completions)\n\n"
        "def none(prompts, completions, **columns):\n    return [None] * len(completions)\n"
    )
    own, none = f"{file}:whole", f"{file}:none"
    command = ["train", two_files, "--overwrite", "--train.steps", "0"]
    said = error_of(*command, "--reward.functions", "choice", "format")
    tells(said, "filter.measure = 'accuracy'", "reward.functions", "choice, format")
    said = error_of(*command, "--reward.functions", none, "--reward.weights", "1")
    tells(said, none)
    assert run(*command, "--reward.functions", own, "format", "--filter.measure", "whole") == 0
    (filtered,) = metrics(two_files.parent / "run", "filter")
    assert filtered["filter/accuracy_before"] == 1.0


def test_files_behind_a_filter_keep_their_images(
    two_files: Path, two_tokens: None, error_of: ErrorOf
) -> None:
    """What is filtered has its images beside it; what is not is read from where it was."""
    assert run("train", two_files) == 0
    folder = two_files.parent / "run"
    assert [r["step"] for r in metrics(folder, "rl")] == [1, 2]
    (filtered,) = metrics(folder, "filter")
    assert filtered["filter/measured"] == 6 and filtered["filter/kept"] >= 1
    measured = json_lines(folder / "filtered" / "sift.accuracies.jsonl")
    assert {row["measure"] for row in measured} == {"accuracy"}
    assert all({"max_prompt_tokens", "min_pixels", "max_pixels"} <= row.keys() for row in measured)
    left = filtered_file(folder, "sift")
    images = [image for row in json_lines(left) for image in row["images"]]
    assert images and all((folder / "filtered" / image).exists() for image in images)
    # A new run that would read from the folder does not delete it.
    for key, value in (("train", str(left)), ("mix", [str(left)])):
        recipe = tomllib.loads(two_files.read_text())
        recipe["stages"][2]["data"] = {key: value}
        other = two_files.with_name("other.toml")
        other.write_text(tomli_w.dumps(recipe))
        said = error_of("train", other, "--overwrite")
        tells(said, "--overwrite", f"data.{key} = {left}", "--run.dir")
        assert left.exists()
    # A run that stops before its last evaluation is measured with the last stage's settings all the same.
    assert [r["orders"] for r in metrics(folder) if r.get("at") == "after"] == [1]
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        manifest = checkpoint / "manifest.json"
        state = json.loads(manifest.read_text())
        if state["progress"]["stage"] == "done":
            state["progress"]["stage"] = "after"
            del state["progress"]["results"]["after"]
            manifest.write_text(json.dumps(state))
    assert run("resume", folder) == 0
    assert [r["orders"] for r in metrics(folder) if r.get("at") == "after"] == [1, 1]


@pytest.mark.parametrize(
    ("stage", "changes", "names"),
    [
        (0, {"resample": {"histogram": "papr"}}, ["'papr'", "paper"]),
        (0, {"resample": {"size": 7}}, ["sift", "resample.size = 7", "6"]),
        (0, {"resample": {"orders": 3}}, ["sift", "resample.orders = 3", "resample.rollouts = 2"]),
        (0, {"data": {"train": "bundled:digits"}}, ["sift", "bundled:digits", "resample.examples"]),
        (2, {"data": {"eval": "nope.jsonl"}}, ["nope.jsonl"]),
        (2, {"data": {"mix": ["nope.jsonl*2"]}}, ["nope.jsonl"]),
        (2, {"data": {"mix": ["x*0"]}}, ["data.mix", "'x*0'", "SOURCE*WEIGHT"]),
        (1, {"reward": {"functions": ["acuracy"], "weights": [1.0]}}, ["acuracy", "'accuracy'"]),
        (1, {"loss": {"preset": "gpro"}}, ["loss", "'gpro'"]),
    ],
)
def test_mistakes_of_any_stage_are_found_before_the_first(
    two_files: Path,
    error_of: ErrorOf,
    stage: int,
    changes: dict[str, Any],
    names: list[str],
) -> None:
    recipe = tomllib.loads(two_files.read_text())
    recipe["stages"][stage] |= changes
    two_files.write_text(tomli_w.dumps(recipe))
    tells(error_of("train", two_files), *names)
    assert not (two_files.parent / "run").exists()


def test_a_later_stage_does_not_take_over_what_the_first_one_sets(
    tmp_path: Path, two_tokens: None
) -> None:
    """Planned from the first stage's values, the second would have one order of one rollout, which is refused."""
    stages = """
        permutation.orders = 2
        rollout.per_order = 6
        [[stages]]
        name = "one"
        kind = "rl"
        rollout.per_order = 1
        [[stages]]
        name = "two"
        kind = "rl"
        permutation.orders = 1
    """
    session = session_of(config_of(tmp_path, stages), tmp_path / "run")
    sizes = [(s.config.permutation.orders, s.config.rollout.per_order) for s in session.stages]
    assert sizes == [(2, 1), (1, 6)]
