"""The permutation experiment: its runs differ in what they should, and its tables say what was measured."""

from __future__ import annotations

import importlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.messages import refused

FOLDER = Path(__file__).parents[2] / "docs" / "experiments"
with pytest.MonkeyPatch.context() as patch:
    # The scripts find each other as they do when they are run.
    patch.syspath_prepend(FOLDER)
    experiment = importlib.import_module("permutation")
    report = importlib.import_module("permutation_report")


def rows() -> list[dict[str, Any]]:
    """Two seeds whose numbers are known: an arm of k orders is 0.1 k above the start of its seed."""
    found = []
    for start, seed in product(report.STARTS, (0, 1)):
        base = {"start": start, "seed": seed, "first_slot_right": 0.3, "greedy_accuracy": 0.5}
        base |= {"consistency": 0.4, "first_slot": 0.5, "greedy_first_slot": 0.3}
        found.append(base | {"accuracy": 0.1 * seed})
        for orders, drop in product(report.ORDERS, (False, True)):
            arm = {"orders": orders, "drop": drop, "signal": 0.6}
            found.append(base | arm | {"accuracy": 0.1 * seed + 0.1 * orders})
    return found


def test_tables_have_means_with_intervals_and_paired_differences() -> None:
    table = report.table(rows(), "fair").splitlines()
    assert table[0].startswith("| fair start, 2 seeds,")
    # Two values 10 apart: the interval of two is 12.706 standard errors, which are 5.
    assert table[2] == (
        "| before RL |  | 5.0 ± 63.5 | 50.0 ± 0.0 | 40.0 ± 0.0 | 20.0 ± 0.0 | 0.0 ± 0.0 |  |"
    )
    assert table[3].startswith("| plain GRPO | all groups | 15.0 ± 63.5 |")
    assert len(table) == 2 + 1 + 8
    paired = report.differences(rows(), "biased").splitlines()
    assert paired[2].startswith("| n_s = 1 | all groups | +10.0 ± 0.0 |")
    assert paired[-2].startswith("| n_s = 3 | zero-variance groups dropped | +30.0 ± 0.0 |")
    assert paired[-1].startswith("| any | either | +20.0 ± 0.0 |")


def test_the_picture_shows_means_seeds_and_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each start a line of panels, of each filter a curve over the orders."""
    figures: list[Any] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure)
    )
    found = rows()
    for row in found:
        row["consistency"] += 0.2 * (row["start"] == "biased")
        row["accuracy"] += 0.05 * row.get("drop", False)
    report.draw(found, tmp_path)
    (figure,) = figures
    axes = dict(
        zip(
            product(report.STARTS, ("accuracy", "consistency", "excess", "signal")),
            figure.axes,
            strict=True,
        )
    )
    for start, shift in (("fair", 0), ("biased", 20)):
        one = axes[start, "accuracy"]
        (before,) = (line for line in one.lines if line.get_label() == "before RL")
        assert list(before.get_ydata()) == pytest.approx([5, 5])  # Of 0 and 10.
        means = [container.lines[0] for container in one.containers]
        for drop, line in enumerate(means):
            assert list(line.get_ydata()) == pytest.approx(
                [10 * o + 5 + 5 * drop for o in report.ORDERS]
            )
        # The seeds, 10 apart, around them.
        points = [list(line.get_ydata()) for line in one.lines if line.get_marker() == "."]
        assert points == [
            pytest.approx([10 * o + 5 * drop, 10 * o + 10 + 5 * drop])
            for drop in (0, 1)
            for o in report.ORDERS
        ]
        for measure, value in (("consistency", 40 + shift), ("excess", 20), ("signal", 60)):
            for container in axes[start, measure].containers:
                assert list(container.lines[0].get_ydata()) == pytest.approx([value] * 4)
        labels = [container.get_label() for container in one.containers]
        assert labels == list(report.FILTERS.values())


def test_arms_sample_equally_often_and_differ_in_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perl.cli import parse

    asked: list[list[str]] = []
    monkeypatch.setattr(experiment, "call", asked.append)
    arms = [experiment.Arm("biased", o, d, 3) for o, d in product(experiment.ORDERS, (False, True))]
    for arm in arms:
        experiment.reinforce(tmp_path, arm, 40)
    trained = [a for a in asked if "train" in a]
    assert len(trained) == len(arms) == len({arm.name for arm in arms})
    seen = set()
    for arguments, arm in zip(trained, arms, strict=True):
        config = parse("train", arguments[3:]).config
        assert config.permutation.orders * config.rollout.per_order == experiment.ROLLOUTS
        assert (config.permutation.orders, config.filter.zero_variance) == (arm.orders, arm.drop)
        assert (config.filter.max_tries, config.data.first_slot, config.run.seed) == (1, 0.6, 3)
        seen.add((config.train, config.loss, config.data, config.model, config.rollout.temperature))
    assert len(seen) == 1


def test_results_are_collected_as_far_as_they_go(tmp_path: Path) -> None:
    for name in ("fair-start-seed1", "fair-orders2-drop-seed1"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "measured.json").write_text('{"accuracy": 0.5}')
        (folder / "summary.json").write_text('{"seconds": 7.0}')
        row = {"stage": "rl", "groups/kept": 3, "groups/seen": 12}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "fair-orders3-drop-seed1").mkdir()  # not measured yet
    experiment.write_results(tmp_path, tmp_path / "results.json")
    one, two = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert one | {"signal": 0.25, "rollouts": 144, "orders": 2, "drop": True} == one
    assert two == {"start": "fair", "seed": 1, "accuracy": 0.5}


def test_a_run_that_fails_says_why() -> None:
    with refused("nothing", "went wrong", error=SystemExit):
        experiment.call(["-c", "import sys; sys.exit('it went wrong')", "nothing"])
