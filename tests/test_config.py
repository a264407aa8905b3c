"""Recipes and overrides: every key is known, typed and within a range that makes sense, wherever it was written."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from perl.config import Config, StageConfig, TrainConfig, part_name
from perl.paths import with_absolute_paths
from perl.recipe import check_config, load_recipe, read_config, recipe_names, save_config
from perl.rewards.scorer import Scorer
from perl.types import UserError
from tests.command_line import ErrorOf, run
from tests.messages import refused, tells

OUT_OF_RANGE = {
    "run.seed": (-1, 9999999999),
    "run.log_every": (0,),
    "run.checkpoint_every": (-1,),
    "run.keep_checkpoints": (0, -2),
    "model.lora_rank": (-1,),
    "model.lora_alpha": (0.0,),
    "model.max_pixels": (0,),
    "data.min_images": (0,),
    "data.max_prompt_tokens": (0,),
    "cold_start.steps": (-1,),
    "cold_start.lr": (-0.1, math.inf),
    "cold_start.noise": (-0.1, 1.1, math.nan),
    "permutation.orders": (0,),
    "rollout.per_order": (0,),
    "rollout.temperature": (0.0, -1.0, math.inf),
    "rollout.max_new_tokens": (0,),
    "rollout.kv_cache_tokens": (0,),
    "reward.timeout": (-1.0,),
    "filter.max_tries": (0,),
    "filter.max_accuracy": (1.5,),
    "loss.clip_low": (-0.2,),
    "loss.kl_coef": (-1.0, math.nan),
    "loss.entropy_coef": (math.nan,),
    "train.steps": (-1,),
    "train.examples_per_step": (0,),
    "train.updates_per_batch": (0,),
    "train.tokens_per_micro_batch": (0,),
    "train.lr": (-1e-6, math.nan),
    "train.weight_decay": (-0.1,),
    "train.max_grad_norm": (-0.5, math.nan),
    "eval.max_orders": (0,),
    "eval.samples": (0,),
    "eval.every": (-1,),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    """Writes a recipe and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "recipe.toml").write_text(text)
        return str(tmp_path / "recipe.toml")

    return write


def test_every_bundled_recipe_is_valid_and_names_its_folder() -> None:
    assert "demo" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).run.dir == f"runs/{name}"


def test_a_saved_config_reads_back(tmp_path: Path) -> None:
    config = load_recipe("demo")
    save_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_the_printed_recipe_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "demo", "--train.steps", "7", "--run.seeds") == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    config = read_config(tmp_path / "printed.toml")
    assert config.train.steps == 7 and config.run.seeds == ()
    assert config.model == load_recipe("demo").model


def test_a_file_may_start_from_a_recipe(recipe: Callable[[str], str]) -> None:
    own = 'recipe = "default"\nmodel.path = "m"\ntrain = { epochs = 2 }\nstages = [{ name = "a", kind = "rl" }]'
    config, base = load_recipe(recipe(own)), load_recipe("default")
    assert (config.model.path, base.model.path) == ("m", "")
    assert dataclasses.replace(config.model, path="") == base.model and base.model.lora_rank == 64
    assert (config.train.steps, config.train.epochs, config.train.lr) == (0, 2, base.train.lr)
    assert (config.data, config.eval, len(config.stages)) == (base.data, base.eval, 1)
    for wrong in ("'defualt'", "3", "['demo']"):
        with refused(f"recipe = {wrong}", "default", "perl-7b"):
            load_recipe(recipe(f"recipe = {wrong}"))


def test_a_measure_that_nothing_asks_for_need_not_be_there(recipe: Callable[[str], str]) -> None:
    load_recipe(recipe('[reward]\nfunctions = ["choice", "format"]'))


def test_a_whole_number_may_stand_for_a_real_one(recipe: Callable[[str], str]) -> None:
    assert load_recipe(recipe("[train]\nlr = 1\nbetas = [0, 0.5]")).train.betas == (0.0, 0.5)


def test_every_number_has_a_range() -> None:
    def unbounded(hint: Any, key: str) -> list[str]:
        """Keys of numbers that may be anything."""
        if dataclasses.is_dataclass(hint):
            hints = get_type_hints(hint, include_extras=True)
            return [k for name, h in hints.items() for k in unbounded(h, f"{key}.{name}")]
        if hint in (int, float):
            return [key.removeprefix(".")]
        inner = () if get_origin(hint) in (Annotated, Literal, ClassVar, dict) else get_args(hint)
        return [k for h in inner for k in unbounded(h, key)]

    assert unbounded(Config, "") == ["reward.weights"]
    check_config(Config())


def written(values: dict[str, Any]) -> str:
    """`section.key` -> value as a recipe."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return tomli_w.dumps(sections)


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_numbers_out_of_range(key: str, recipe: Callable[[str], str]) -> None:
    for value in OUT_OF_RANGE[key]:
        path = recipe(written({key: value}))
        with refused(path, f"{key} = {value}"):
            load_recipe(path)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--train.lr", "-1"], ["train.lr = -1.0"]),
        (["--data.workers", "-1"], ["data.workers = -1", "or 'auto'"]),
        (["--loss.kl-coef", "nan"], ["loss.kl_coef = nan", "finite"]),
        (["--run.seeds", "1", "1"], ["run.seeds", "[1, 1]"]),
        (["--train.steps", "1.5"], ["--train.steps = '1.5'", "whole number", "--help"]),
        (["--loss.clip-low", "x"], ["--loss.clip-low = 'x'", "number", "--help"]),
        (["--reward.weights", "1", "x"], ["--reward.weights = '1', 'x'", "--help"]),
    ],
)
def test_the_command_line_is_held_to_the_same(
    options: list[str], names: list[str], error_of: ErrorOf
) -> None:
    tells(error_of("train", "demo", *options), *names)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"run.seeds": [0, -1]}, ["run.seeds.1 = -1"]),
        ({"run.seeds": [1, 1]}, ["run.seeds", "[1, 1]"]),
        ({"run.seeds": [1, 2], "run.seed": 3}, ["run.seed = 3", "run.seeds", "[1, 2]"]),
        ({"train.betas": [0.9, 1.0]}, ["train.betas.1 = 1.0", 1]),
        ({"data.instruction": "think_box"}, ["data.instruction = 'think_box'", "think-box?"]),
        ({"data.instruction": "\\boxed{}"}, ["data.instruction", "think-tags", '""']),
        ({"data.instruction": "Look at <image> well"}, ["data.instruction", "<image>"]),
        ({"data.system": "<image>"}, ["data.system", "<image>"]),
        ({"data.min_images": 5}, ["data.min_images = 5", "data.max_images = 4"]),
        ({"model.max_pixels": 783}, ["model.min_pixels = 784", "model.max_pixels = 783"]),
        (
            {"permutation.orders": 1, "rollout.per_order": 1},
            ["rollout.per_order = 1", "permutation.orders = 1"],
        ),
        (
            {"filter.min_accuracy": 0.6, "filter.max_accuracy": 0.5},
            ["filter.min_accuracy = 0.6", "filter.max_accuracy = 0.5"],
        ),
        (
            {"filter.replay": 9, "filter.replay_size": 8},
            ["filter.replay = 9", "filter.replay_size = 8"],
        ),
        (
            {"filter.replay": 1, "permutation.condition": "original"},
            [
                "permutation.condition = original",
                "filter.replay = 0",
                "filter.reuse_overflow = false",
            ],
        ),
        (
            {"permutation.draw": "released", "permutation.orders": 3},
            ["permutation.draw = released", "permutation.orders = 3", "permutation.orders = 2"],
        ),
        (
            {"advantage.over": "order", "rollout.per_order": 1},
            ["advantage.over = order", "rollout.per_order = 1", 2],
        ),
        (
            {"resample.orders": 5, "resample.rollouts": 4},
            ["resample.orders = 5", "resample.rollouts = 4"],
        ),
    ],
)
def test_values_that_do_not_go_together(
    values: dict[str, Any], names: list[object], recipe: Callable[[str], str]
) -> None:
    path = recipe(written(values))
    with refused(path, *names):
        load_recipe(path)


def test_the_closest_values_that_go_together_are_taken(recipe: Callable[[str], str]) -> None:
    """What the refusals stop at: equal bounds, two orders, two completions an order or in all."""
    for values in (
        {"data": {"min_images": 4}, "model": {"max_pixels": 784}},
        {"filter": {"min_accuracy": 0.5, "max_accuracy": 0.5, "replay": 8, "replay_size": 8}},
        {"permutation": {"orders": 1}, "rollout": {"per_order": 2}},
        {"permutation": {"orders": 2, "draw": "released"}, "rollout": {"per_order": 1}},
        {"advantage": {"over": "order"}, "rollout": {"per_order": 2}},
        {"resample": {"orders": 4, "rollouts": 4}, "permutation": {"condition": "original"}},
        {"run": {"seeds": [1, 2]}},
    ):
        load_recipe(recipe(tomli_w.dumps(values)))


SPECS = ("accuracy", "accuracy(tags=True)", "accuracy(unordered=True)", "format", "choice")
SPECS += ("box_iou(threshold=0.5)", "perl.rewards.answers:format_reward")


@given(st.lists(st.sampled_from(SPECS), min_size=1, unique=True))
def test_a_reward_is_found_by_what_is_written(specs: list[str]) -> None:
    names = Scorer(specs, [1.0] * len(specs)).names
    assert tuple(part_name(specs, spec) for spec in specs) == names
    assert tuple(part_name(specs, name) for name in names) == names
    assert part_name(specs, "nothing") is None
    if "accuracy" not in specs and sum(s.startswith("accuracy(") for s in specs) == 2:
        assert part_name(specs, "accuracy") is None


@pytest.mark.parametrize("key", ["measure", "group_weight_of"])
def test_names_of_rewards(key: str, recipe: Callable[[str], str]) -> None:
    """By the plain name or as written; not by a name that several have."""

    def said(functions: list[str], name: str) -> str | None:
        one = key == "measure"
        used = "" if one else f'group_weight = "exp"\ngroup_weight_of = "{name}"\n'
        band = f'[filter]\nmin_accuracy = 0.1\nmeasure = "{name}"\n' if one else ""
        weights = [1.0] * len(functions)
        path = recipe(f"[reward]\nfunctions = {functions}\nweights = {weights}\n{used}{band}")
        try:
            load_recipe(path)
        except UserError as error:
            return str(error)
        return None

    iou = "box_iou(threshold=0.5)"
    assert said([iou, "format"], iou) is None and said([iou, "format"], "box_iou") is None
    alike = ["accuracy(tags=True)", "accuracy(unordered=True)"]
    own = ["accuracy(tags=True)", "box_iou(column='a:b')", "mine.py:f(scale=2)"]
    assert [said(own, name) for name in ("accuracy", "box_iou", "f")] == [None] * 3
    owner = f"{'filter' if key == 'measure' else 'reward'}.{key}"
    tells(said(own[1:], "accuracy"), f"{owner} = 'accuracy'", "reward.functions", "box_iou, f")
    assert said(alike, alike[1]) is None
    tells(said(alike, "accuracy"), f"{owner} = 'accuracy'", ", ".join(alike))
    assert said([*alike, "accuracy"], "accuracy") is None
    tells(said([iou, "format"], "x"), f"{owner} = 'x'", "reward.functions", "box_iou, format")
    tells(said(["format", "format"], "format"), "reward.functions", "format, format")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[trian]\nsteps = 1", ["trian", "train"]),
        ("[train]\nstep = 1", ["train.step", "train.steps"]),
        ("[train]\nqqqq = 1", ["train.qqqq", *(f.name for f in dataclasses.fields(TrainConfig))]),
        ("[zzz]\na = 1", ["zzz", *(f.name for f in dataclasses.fields(Config))]),
        ("train = 3", ["train", "[train]"]),
        ("[train]\nsteps = '1'", ["train.steps = '1'", "integer"]),
        ("[train]\nsteps = 1.5", ["train.steps = 1.5", "integer"]),
        ("[train]\nsteps = true", ["train.steps = True", "integer"]),
        ("[train.lr]\na = 1", ["train.lr = {'a': 1}", "number"]),
        ("[train]\nlr = 2020-01-01", ["train.lr = '2020-01-01'", "number"]),
        ("[train]\nlr = inf", ["train.lr = inf", "finite"]),
        ("[train]\nbetas = [0.9]", ["train.betas.1"]),
        ("[run]\nseeds = 3", ["run.seeds = 3", "array"]),
        ("[data]\noverlong = 'x'", ["data.overlong = 'x'", "'error'", "'drop'"]),
        ("[data]\ntrain = ['a']", ["data.train = ['a']", "string"]),
        ("[run", ["TOML"]),
        ("[train]\nsteps = 1\nsteps = 2", ["TOML"]),
    ],
)
def test_broken_recipes(
    text: str, names: list[str], recipe: Callable[[str], str], error_of: ErrorOf
) -> None:
    path = recipe(text)
    tells(error_of("train", path), path, *names)


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("data.train", "d/a.jsonl", "HERE/d/a.jsonl"),
        ("data.train", "d/a.jsonl:train", "HERE/d/a.jsonl:train"),
        ("data.train", "d/*.jsonl,b.jsonl", "HERE/d/*.jsonl,HERE/b.jsonl"),
        ("data.train", "*.jsonl", "HERE/*.jsonl"),
        ("data.train", "a,b", "HERE/a,b"),
        ("data.train", "org/name:test", "org/name:test"),
        ("data.train", "/d/a.jsonl", "/d/a.jsonl"),
        ("data.train", "bundled:folder:d", "bundled:folder:HERE/d"),
        ("data.train", "bundled:digits", "bundled:digits"),
        ("data.train", "d/*.jsonl,b.jsonl", "HERE/d/*.jsonl,HERE/b.jsonl"),
        ("data.eval", "split:0.05", "split:0.05"),
        ("data.eval", "", ""),
        ("data.mix", ("d/a.jsonl*0.5", "org/name*2"), ("HERE/d/a.jsonl*0.5", "org/name*2")),
        ("data.image_root", "d", "HERE/d"),
        ("model.path", "d", "HERE/d"),
        ("model.path", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        # A folder may have the name of a function.
        (
            "reward.functions",
            ("d", "r.py:f(a=1, b='d')", "mine:g"),
            ("d", "HERE/r.py:f(a=1, b='d')", "mine:g"),
        ),
    ],
)
def test_paths_that_are_there_become_absolute(
    key: str, given: Any, kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the common sections and in a stage's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("d/a.jsonl", "b.jsonl", "a,b", "r.py", "mine", "split", "bundled"):
        (tmp_path / name).touch()
    section, name = key.split(".")
    own = dataclasses.replace(getattr(Config(), section), **{name: given})
    stage = StageConfig(name="s", kind="rl", set={section: {name: given}, "train": {"steps": 1}})
    found = with_absolute_paths(dataclasses.replace(Config(), **{section: own}, stages=(stage,)))
    for value in (getattr(getattr(found, section), name), found.stages[0].set[section][name]):
        assert str(value).replace(str(tmp_path), "HERE") == str(kept)
    assert found.stages[0].set["train"] == {"steps": 1}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["demoo"], ["demoo", "demo"]),
        (["nothing-like-it"], ["nothing-like-it", ", ".join(recipe_names()), ".toml"]),
        (["nowhere.toml"], ["nowhere.toml"]),
        (["demo", "--train.lrr", "5"], ["--train.lrr", "--train.lr"]),
        (["demo", "--rollout.per_orders", "5"], ["--rollout.per_orders", "--rollout.per-order"]),
        (["demo", "--qqqqqqqq"], ["--qqqqqqqq", "--help"]),
        (["demo", "extra"], ["extra", "--help"]),
        (["demo", "--filter.zero-variance", "True"], ["True", "--section.key", "--section.no-key"]),
        (["demo", "--stages", "x"], ["--stages", "[[stages]]"]),
        (["demo", "--train.steps", "abc"], ["--train.steps", "'abc'"]),
        (["demo", "--train.steps", "1.5"], ["--train.steps", "'1.5'"]),
        (["demo", "--train.steps"], ["--train.steps"]),
        (["demo", "--train.betas", "0.9"], ["--train.betas"]),
        (["demo", "--data.overlong", "x"], ["--data.overlong", "'x'"]),
    ],
)
def test_wrong_arguments(arguments: list[str], names: list[str], error_of: ErrorOf) -> None:
    tells(error_of("train", *arguments), *names)


def test_a_recipe_that_is_no_text(tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    tells(error_of("train", tmp_path / "bytes.toml"), tmp_path / "bytes.toml", "UTF-8")


def test_a_broken_config_in_a_run_folder(tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "config.toml").write_text("[run]\nseeds = 'x'")
    assert "run.seeds" in error_of("resume", str(tmp_path))
    shutil.rmtree(tmp_path)
    with refused(tmp_path / "config.toml"):
        read_config(tmp_path / "config.toml")


@pytest.mark.parametrize(("written", "share"), [("true", 1.0), ("false", 0.0), ("0.5", 0.5)])
def test_checkpointing_may_be_written_as_all_layers_or_none(
    written: str, share: float, tmp_path: Path
) -> None:
    """As recipes and old runs have it."""
    file = tmp_path / "old.toml"
    file.write_text(f"model.gradient_checkpointing = {written}")
    found = load_recipe(str(file)).model.gradient_checkpointing
    assert found == share and isinstance(found, float)
