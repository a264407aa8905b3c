"""A run that is given more steps goes on as one that had them from the start, or says what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perl.config import Config
from perl.files import RunFolder
from perl.recipe import plan, read_config, save_config
from perl.training.saving.extend import extend, resize
from tests.command_line import ALTERNATING, metrics, rewarded, run, untimed
from tests.messages import refused, tells
from tests.training.two_tokens import config_of, saved, train_in

STEPS = (
    "train = { steps = STEPS, updates_per_batch = 2, warmup_steps = 2 }\nrun.checkpoint_every = 0\n"
)
STAGES = """
[[stages]]
name = "easy"
kind = "rl"
train.steps = 2
[[stages]]
name = "hard"
kind = "rl"
train.steps = STEPS
loss.kl_coef = 0.01
filter = { zero_variance = true, reuse_overflow = true, replay = 2 }
"""


def trained(folder: Path, config: Config, resume: bool = False) -> Path:
    """A run folder as the command line would leave it."""
    root = folder / "run"
    if not resume:
        root.mkdir(parents=True)
        save_config(config, root / "config.toml")
        RunFolder(root).make_parts()
    train_in(root, read_config(root / "config.toml"), resume=True)
    return root


def weights(root: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(root / "models" / name / "weights")


@pytest.mark.parametrize(
    "more", [STEPS, STAGES + "train.schedule = 'constant'"], ids=["rl", "stages"]
)
def test_a_finished_run_goes_on_as_if_it_had_not_ended(
    more: str, tmp_path: Path, two_tokens: None
) -> None:
    def config(steps: int) -> Config:
        keys = "eval = { examples = 2, max_orders = 2 }\n" + more.replace("STEPS", str(steps))
        return config_of(tmp_path, keys)

    whole = trained(tmp_path / "whole", config(5))
    root = trained(tmp_path / "short", config(3))
    first = metrics(root, "evaluate")[-1]
    assert extend(RunFolder(root), 5) and not (root / "summary.json").exists()
    stage = plan(config(5))[-1].name
    assert saved(root)[-1] == (stage, 3)
    trained(tmp_path / "short", config(5), resume=True)
    assert plan(read_config(root / "config.toml"))[-1].steps == 5
    rows, expected = untimed(root), untimed(whole)
    # Its evaluation after the third step stays.
    [extra] = [row for row in rows if row not in expected]
    assert (extra["at"], extra["step"], extra["greedy"]) == (
        "after",
        first["step"],
        first["greedy"],
    )
    assert [row for row in rows if row != extra] == expected
    assert all(torch.equal(weights(root)[name], w) for name, w in weights(whole).items())
    summaries = [json.loads((r / "summary.json").read_text()) for r in (root, whole)]
    assert summaries[0]["greedy_after"] == summaries[1]["greedy_after"]


def test_what_a_schedule_makes_of_more_steps_is_told(tmp_path: Path, two_tokens: None) -> None:
    """Of 4 updates at 0.01 the last has a quarter of it; the fifth of 8 has half."""
    keys = STEPS.replace("STEPS", "2").replace("warmup_steps = 2", "schedule = 'linear'")
    root = trained(tmp_path, config_of(tmp_path, keys + "permutation.rate_schedule = 'cosine'"))
    said = extend(RunFolder(root), 4)
    tells(said[1], "train.schedule = linear", 2, "0.0025", "0.005", 4)
    tells(said[2], "permutation.rate_schedule = cosine", 2, 4)
    # One that has not come as far as that is the run of so many steps.
    assert len(extend(RunFolder(root), 2)) == 3


@pytest.mark.parametrize(
    ("more", "steps", "names"),
    [
        (STEPS, 1, ["train.steps = 1", "rl", 2]),
        (
            STEPS
            + "[[stages]]\nname = 'easy'\nkind = 'rl'\n[[stages]]\nname = 'end'\nkind = 'cold_start'",
            9,
            ["train.steps = 9", "end", "cold_start"],
        ),
        (STEPS, -1, ["train.steps = -1"]),
    ],
    ids=["fewer than were taken", "no RL at the end", "less than none"],
)
def test_what_cannot_be(
    more: str, steps: int, names: list[Any], tmp_path: Path, two_tokens: None
) -> None:
    root = trained(tmp_path, config_of(tmp_path, more.replace("STEPS", "2")))
    before = saved(root), (root / "config.toml").read_text()
    with refused(*names):
        extend(RunFolder(root), steps)
    assert (saved(root), (root / "config.toml").read_text()) == before


def test_sizes_change_in_every_stage_and_seed_and_nothing_else_does(
    tmp_path: Path, two_tokens: None
) -> None:
    """A row of 9 tokens takes one of the batch's completions where one of 4096 takes all."""
    own = "train = { steps = 1, tokens_per_micro_batch = 4000 }"
    stages = f"[[stages]]\nname = 'a'\nkind = 'rl'\n{own}\n[[stages]]\nname = 'b'\nkind = 'rl'"
    root = trained(tmp_path, config_of(tmp_path, f"run.seeds = [0, 3]\ntrain.steps = 1\n{stages}"))
    sizes = {"train.tokens_per_micro_batch": 900, "rollout.kv_cache_tokens": 1400}
    (first, second) = resize(RunFolder(root), sizes)
    tells(first, "train.tokens_per_micro_batch = 900")
    tells(second, "rollout.kv_cache_tokens = 1400")
    for folder in (root, root / "seed-0", root / "seed-3"):
        a, b = plan(read_config(folder / "config.toml"))
        for stage, steps in ((a, 1), (b, 1)):
            train = stage.config.train
            assert (train.steps, train.tokens_per_micro_batch) == (steps, 900)
            assert stage.config.rollout.kv_cache_tokens == 1400
    before = (root / "config.toml").read_text() + "# a note\n"
    (root / "config.toml").write_text(before)
    assert resize(RunFolder(root), {}) == []
    with refused("rollout.kv_cache_tokens = 1", "rollout.max_new_tokens"):
        resize(RunFolder(root), {"rollout.kv_cache_tokens": 1})
    assert (root / "config.toml").read_text() == before


def test_a_run_goes_on_with_another_sharding(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything has changed where so many processes cannot; without one what says how goes with it."""
    root = trained(tmp_path, config_of(tmp_path, "train.steps = 1"))
    monkeypatch.setattr("perl.training.parallel.mesh.check_model", lambda _: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    first = {"train.sharding": "fsdp", "train.shards": 2, "train.shard_vision": True}
    before = (root / "config.toml").read_text()
    with refused("train.shards = 3", 4):
        resize(RunFolder(root), {**first, "train.shards": 3})
    assert (root / "config.toml").read_text() == before
    assert len(resize(RunFolder(root), first)) == 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    with refused("train.sharding = fsdp", "--train.sharding none"):
        resize(RunFolder(root), {"rollout.kv_cache_tokens": 5000})
    (shards, vision, sharding) = resize(RunFolder(root), {"train.sharding": "none"})
    tells(shards, "train.shards = 0")
    tells(vision, "train.shard_vision = False")
    tells(sharding, "train.sharding = none")
    train = read_config(root / "config.toml").train
    assert (train.sharding, train.shards, train.shard_vision) == ("none", 0, False)


def test_every_seed_gets_them(tmp_path: Path, two_tokens: None) -> None:
    root = trained(tmp_path, config_of(tmp_path, "run.seeds = [0, 3]\ntrain.steps = 1"))
    extend(RunFolder(root), 2)
    trained(tmp_path, Config(), resume=True)
    for seed in ("seed-0", "seed-3"):
        assert [row["step"] for row in metrics(root / seed, "rl")] == [1, 2]
        assert read_config(root / seed / "config.toml").train.steps == 2


def test_by_the_command_line(
    short_recipe: Path, two_tokens: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = short_recipe.parent / "run"
    train = ("train", short_recipe, *rewarded(root.parent, ALTERNATING))
    assert run(*train, "--train.steps", 1) == 0
    sizes = ("--rollout.kv-cache-tokens", 5000, "--model.gradient-checkpointing", 0.5)
    assert run("resume", root, "--train.steps", 2, *sizes) == 0
    tells(capsys.readouterr().err, "rl", 1, 2, "rollout.kv_cache_tokens = 5000")
    config = read_config(root / "config.toml")
    assert config.rollout.kv_cache_tokens == 5000
    assert config.model.gradient_checkpointing == 0.5
    # What the recipe says was not asked for.
    text = short_recipe.read_text().replace("steps = ", "steps = 7")
    short_recipe.write_text(text)
    assert run(*train, "--resume") == 0
    tells(capsys.readouterr().err, "train.steps")
    assert run(*train, "--resume", "--train.steps=3", "--train.lr", 1, *sizes[:1], 6000) == 0
    said = capsys.readouterr().err
    tells(said, "train.lr")
    assert "train.steps," not in said
    assert read_config(root / "config.toml").rollout.kv_cache_tokens == 6000
    assert [row["step"] for row in metrics(root, "rl")] == [1, 2, 3]
    for more in ("--train.steps", "--train.lr"):
        assert run("resume", root, more, 1) == 2
