"""The best checkpoint by an evaluation stays and is exported, and a stage ends where nothing gets better."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perl.recipe import save_config
from perl.rollout.opening import config_of as opened
from perl.training.checks import check_setup
from perl.types import Interrupted
from tests.command_line import metrics, untimed
from tests.messages import refused
from tests.training.two_tokens import config_of, saved, train_in, weights_in

BEST = """
run = { keep_best = "greedy", keep_checkpoints = 1 }
train.steps = 5
eval = { examples = 1, every = 1, patience = PATIENCE }
"""


def scored(values: Sequence[float | Exception | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations of a run come to these numbers, by the steps before them, or to an error."""
    left = iter(values)

    def aggregate(_: Any) -> dict[str, Any]:
        if isinstance(value := next(left), Exception):
            raise value
        return {"greedy": value, "by_task": {}}

    monkeypatch.setattr("perl.training.measure.aggregate", aggregate)


def lying(folder: Path) -> set[str]:
    return {p.name for p in (folder / "checkpoints").iterdir()}


def test_the_best_checkpoint_stays_and_is_exported(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equal one that comes later is not better, and one without a number is none."""
    scored([0.2, 0.3, 0.5, None, 0.5, 0.4], monkeypatch)
    folder = tmp_path / "run"
    config = config_of(tmp_path, BEST.replace("PATIENCE", "0"))
    summary = train_in(folder, config)
    save_config(config, folder / "config.toml")
    assert lying(folder) == {"step-2", "step-5", "best"} and saved(folder)[-1] == ("done", 0)
    best = folder / "checkpoints" / "best"
    assert os.readlink(best) == "step-2"
    assert summary["best"] == {"by": "greedy", "step": 2, "value": 0.5}
    kept, exported = weights_in(best), load_file(folder / "models/best/weights")
    last = load_file(folder / "models" / "final" / "weights")
    assert all(torch.equal(kept[name], exported[name]) for name in kept)
    assert not torch.equal(last["head_weight"], exported["head_weight"])
    assert opened(str(best)).model.path == str(best)


def test_a_stage_ends_when_its_evaluations_get_no_better(
    tmp_path: Path,
    two_tokens: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped by a signal after the first that is no better, the run knows it when it goes on."""
    config, folder = config_of(tmp_path, BEST.replace("PATIENCE", "2")), tmp_path / "run"
    values = [0.2, 0.3, 0.3, 0.1, 0.1]
    scored(values, monkeypatch)
    train_in(tmp_path / "whole", config)
    measured, number = iter(values), 0

    def stopping(results: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"greedy": next(measured), "by_task": {}}

    monkeypatch.setattr("perl.training.measure.aggregate", stopping)
    with pytest.raises(Interrupted):
        train_in(folder, config)
    assert saved(folder)[-1] == ("rl", 2)
    train_in(folder, config, resume=True)
    assert [r["step"] for r in metrics(folder, "rl")] == [1, 2, 3]
    assert [(r["at"], r["step"]) for r in metrics(folder, "evaluate")] == [
        *(("before", 0), ("step", 1), ("step", 2), ("step", 3), ("after", 3))
    ]
    assert untimed(folder) == untimed(tmp_path / "whole")
    assert lying(folder) == lying(tmp_path / "whole") == {"step-1", "step-3", "best"}
    manifest = json.loads((folder / "checkpoints" / "step-3" / "manifest.json").read_text())
    assert manifest["progress"]["taken"] == {"cold_start": 0, "rl": 3}
    # A finished run stays finished.
    train_in(folder, config, resume=True)
    assert len(metrics(folder, "rl")) == 3


def test_each_stage_has_patience_of_its_own(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = """
        [[stages]]
        name = "easy"
        kind = "rl"
        [[stages]]
        name = "hard"
        kind = "rl"
    """
    config = config_of(tmp_path, BEST.replace("PATIENCE", "2") + stages)
    scored([0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], monkeypatch)
    train_in(tmp_path / "run", config)
    places = [(r["name"], r["step"]) for r in metrics(tmp_path / "run", "rl")]
    # Steps are counted on from those that were taken.
    assert places == [("easy", 1), ("easy", 2), ("hard", 3), ("hard", 4)]
    assert lying(tmp_path / "run") == {"step-0", "step-4", "best"}
    # An evaluation that failed is made again once, also where it ends the stage.
    scored([0.9, 0.1, ValueError("planted"), 0.1, 0.1, 0.1, 0.1, 0.1], monkeypatch)
    with pytest.raises(ValueError, match="planted"):
        train_in(tmp_path / "broken", config)
    train_in(tmp_path / "broken", config, resume=True)
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (
            "eval = { examples = 1, every = 1, patience = 1 }",
            ["eval.patience = 1", "run.keep_best"],
        ),
        ('run.keep_best = "grady"\neval = { examples = 1, every = 1 }', ["grady", "greedy"]),
        (
            'run.keep_best = "reward/none"\neval = { examples = 1, every = 1 }',
            ["reward/none", "greedy_reward/share_of_b"],
        ),
        ('run.keep_best = "greedy"\neval.examples = 1', ["run.keep_best = greedy", "eval.every"]),
        ('run.keep_best = "greedy"\neval.every = 1', ["run.keep_best = greedy", "eval.examples"]),
        (
            'run.keep_best = "greedy"\ndata.eval = ""\neval = { examples = 1, every = 1 }',
            ["run.keep_best = greedy", "data.eval"],
        ),
    ],
)
def test_what_cannot_be_the_best(more: str, names: list[str], tmp_path: Path) -> None:
    with refused(*names):
        check_setup(config_of(tmp_path, more))


def test_a_number_that_evaluations_lack_is_refused_by_the_first(
    tmp_path: Path, two_tokens: None
) -> None:
    more = BEST.replace("PATIENCE", "0").replace("greedy", "reward/none")
    with refused("run.keep_best = reward/none", "greedy_reward"):
        train_in(tmp_path / "run", config_of(tmp_path, more))
