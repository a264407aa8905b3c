"""Passes over the data as steps, for a whole run and for its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perl.config import Config, DataConfig, StageConfig, TrainConfig
from perl.data.streams import with_steps
from perl.recipe import load_recipe, merged, plan
from tests.messages import refused

ROW = {"question": "?", "images": [], "answer": "A"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Ten rows."""
    (tmp_path / "ten.jsonl").write_text((json.dumps(ROW) + "\n") * 10)
    return str(tmp_path / "ten.jsonl")


def config_of(source: str, *stages: StageConfig, epochs: float = 0.0, **data: Any) -> Config:
    train = TrainConfig(steps=0, epochs=epochs, examples_per_step=4)
    return Config(data=DataConfig(train=source, **data), train=train, stages=stages)


@pytest.mark.parametrize(
    ("epochs", "mix", "steps"),
    [(2, (), 5), (1, (), 3), (0.1, (), 1), (2, ("bundled:digits*0.5",), 8)],
)
def test_as_many_steps_as_draw_each_row(
    source: str, epochs: float, mix: tuple[str, ...], steps: int
) -> None:
    train = with_steps(config_of(source, epochs=epochs, mix=mix)).train
    assert (train.steps, train.epochs) == (steps, 0)
    plain = Config()
    assert with_steps(plain) is plain


def test_stages_have_their_own(source: str) -> None:
    stages = [
        StageConfig(name="a", kind="rl", set={"train": {"epochs": 1.0, "lr": 1.0}}),
        StageConfig(name="b", kind="rl", set={"train": {"steps": 7}}),
        StageConfig(name="c", kind="rl"),
    ]
    config = with_steps(config_of(source, *stages, epochs=4.0))
    assert [stage.steps for stage in plan(config)] == [3, 7, 10]
    assert merged(config, config.stages[0]).train.lr == 1.0
    first = StageConfig(name="f", kind="filter")
    with refused("stage c", "train.epochs", "train.steps"):
        with_steps(config_of(source, first, stages[2], epochs=4.0))
    with refused("bundled:digits", "train.epochs", "train.steps"):
        with_steps(config_of("bundled:digits", epochs=1.0))


def test_what_is_given_alone_takes_the_place_of_the_other(tmp_path: Path) -> None:
    def read(text: str) -> TrainConfig:
        (tmp_path / "r.toml").write_text(text)
        return load_recipe(str(tmp_path / "r.toml")).train

    assert (read("[train]\nepochs = 2.0").steps, read("[train]\nsteps = 2").epochs) == (0, 0)
    with refused("train.epochs = 2", "train.steps = 3"):
        read("[train]\nepochs = 2.0\nsteps = 3")
