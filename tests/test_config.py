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

from perl.config import Config, part_name
from perl.recipe import check_config, load_recipe, read_config, recipe_names, save_config
from perl.rewards.scorer import Scorer
from perl.types import UserError
from tests.command_line import ErrorOf, run

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
    "rollout.batch_size": (0,),
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
    "train.max_grad_norm": (0.0, math.nan),
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


@pytest.fixture
def refused(recipe: Callable[[str], str], error_of: ErrorOf) -> Callable[..., tuple[str, str]]:
    """What is said of values in a recipe, behind its path, and of the same on the command line."""

    def both(values: dict[str, Any]) -> tuple[str, str]:
        sections: dict[str, dict[str, Any]] = {}
        options: list[object] = []
        for key, value in values.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
            options += [
                f"--{key.replace('_', '-')}",
                *(value if isinstance(value, list) else [value]),
            ]
        path = recipe(tomli_w.dumps(sections))
        said = error_of("train", path)
        assert said.startswith(f"{path}: ")
        return said.removeprefix(f"{path}: "), error_of("train", "demo", *options)

    return both


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in OUT_OF_RANGE.items() for v in vs])
def test_numbers_out_of_range(
    key: str, value: float, refused: Callable[..., tuple[str, str]]
) -> None:
    for said in refused({key: value}):
        assert said.startswith(f"{key} = ") and "must be" in said


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"run.seeds": [0, -1]}, "run.seeds.1 = -1: must be"),
        ({"run.seeds": [1, 1]}, "names one seed twice"),
        ({"train.betas": [0.9, 1.0]}, "train.betas.1 = 1.0: must be less than 1"),
        ({"data.min_images": 5}, "data.min_images = 5 is more than data.max_images = 4"),
        ({"model.max_pixels": 100}, "model.min_pixels = 784 is more than"),
        (
            {"reward.weights": [1.0]},
            "reward.weights = [1.0] for 2 reward.functions (accuracy, format); give one",
        ),
        ({"permutation.orders": 1, "rollout.per_order": 1}, "nothing to be compared with"),
        (
            {"filter.min_accuracy": 0.6, "filter.max_accuracy": 0.5},
            "filter.min_accuracy = 0.6 is more than filter.max_accuracy = 0.5",
        ),
        (
            {"filter.replay": 9, "filter.replay_size": 8},
            "filter.replay = 9 is more than filter.replay_size = 8",
        ),
    ],
)
def test_values_that_do_not_go_together(
    values: dict[str, Any], match: str, refused: Callable[..., tuple[str, str]]
) -> None:
    assert all(match in said for said in refused(values))


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
    assert "is none of reward.functions (box_iou, f); name" in str(said(own[1:], "accuracy"))
    assert said(alike, alike[1]) is None
    assert f"'accuracy' may be any of {', '.join(alike)}; write" in str(said(alike, "accuracy"))
    assert said([*alike, "accuracy"], "accuracy") is None
    assert "is none of reward.functions (box_iou, format); name" in str(said([iou, "format"], "x"))
    assert "names one function twice" in str(said(["format", "format"], "format"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[trian]\nsteps = 1", "unknown key trian; did you mean train?"),
        ("[train]\nstep = 1", "unknown key train.step; did you mean train.steps?"),
        ("[zzz]\na = 1", "unknown key zzz; known here: run, model, data,"),
        ("train = 3", "train is a section; write [train] and its keys below"),
        ("[train]\nsteps = '1'", "train.steps = '1': must be a valid integer"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5: must be a valid integer"),
        ("[train]\nsteps = true", "train.steps = True: must be a valid integer"),
        ("[train.lr]\na = 1", "train.lr = {'a': 1}: must be a valid number"),
        ("[train]\nlr = 2020-01-01", "train.lr = '2020-01-01': must be a valid number"),
        ("[train]\nbetas = [0.9]", "train.betas.1"),
        ("[run]\nseeds = 3", "run.seeds = 3: must be a valid array"),
        ("[data]\noverlong = 'x'", "data.overlong = 'x': must be 'error' or 'drop'"),
        ("[data]\ntrain = ['a']", "data.train = ['a']: must be a valid string"),
        ("[run", "is not valid TOML: Expected ']'"),
        ("[train]\nsteps = 1\nsteps = 2", "is not valid TOML: Cannot overwrite a value"),
    ],
)
def test_broken_recipes(
    text: str, match: str, recipe: Callable[[str], str], error_of: ErrorOf
) -> None:
    path = recipe(text)
    said = error_of("train", path)
    assert path in said and match in said


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("demoo", "unknown recipe demoo: did you mean demo?"),
        ("nothing-like-it", "choose demo, perl-3b-1gpu, perl-7b, perl-released, or give"),
        ("nowhere.toml", "recipe nowhere.toml cannot be read: No such file"),
    ],
)
def test_unknown_recipes(name: str, match: str, error_of: ErrorOf) -> None:
    assert match in error_of("train", name)


def test_a_recipe_that_is_no_text(tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in error_of("train", str(tmp_path / "bytes.toml"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--train.lrr", "5"], "--train.lrr, 5; did you mean --train.lr?"),
        (["--rollout.per_orders", "5"], "did you mean --rollout.per-order?"),
        (["--qqqqqqqq"], "--qqqqqqqq; see --help"),
        (["extra"], "extra; see --help"),
        (["--filter.zero-variance", "True"], "True; switches take none"),
        (["--train.steps", "abc"], "--train.steps: invalid literal for int()"),
        (["--train.steps", "1.5"], "--train.steps: invalid literal for int()"),
        (["--train.steps"], "Missing value for argument '--train.steps'"),
        (["--train.betas", "0.9"], "Missing value for argument '--train.betas'"),
        (["--data.overlong", "x"], "invalid choice 'x' for argument '--data.overlong'"),
    ],
)
def test_wrong_overrides(options: list[str], match: str, error_of: ErrorOf) -> None:
    said = error_of("train", "demo", *options)
    assert said.startswith("perl-rl train: ") and match in said


def test_a_broken_config_in_a_run_folder(tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "config.toml").write_text("[run]\nseeds = 'x'")
    assert "run.seeds" in error_of("resume", str(tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "config.toml")
