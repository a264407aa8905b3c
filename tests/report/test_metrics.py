"""Numbers made from a run's records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from perl.report.metrics import (
    RunLog,
    curve_of,
    headline,
    mean,
    read_run,
    smoothed,
    spread,
    stage_bytes,
    stage_seconds,
    step_medians,
)


def log(**parts: Any) -> RunLog:
    return RunLog("run", Path(), **parts)


def test_mean_leaves_out_what_is_missing() -> None:
    assert mean([1.0, None, math.nan, 3.0]) == 2
    assert math.isnan(mean([]))


def test_a_curve_has_the_last_finite_value_of_each_step() -> None:
    rows = [{"step": 2, "kl": 0.5, "entropy": 9}, {"step": 1, "kl": 3}, {"step": 2, "kl": 0.25}]
    rows += [{"step": 3, "kl": v} for v in (math.nan, math.inf, "1", True, None)]
    assert list(curve_of([*rows, {"kl": 1}], "kl").items()) == [(1, 3), (2, 0.25)]


def test_smoothing_is_centred() -> None:
    line = {float(i): 2.0 * i for i in range(40)}
    assert [smoothed(line)[i] for i in (0.0, 1.0, 20.0, 39.0)] == [2.0, 3.0, 40.0, 76.0]
    bent = {float(i): float(i * i) for i in range(20)}
    # One neighbour on either side from 8 values on: (16 + 25 + 36) / 3.
    assert smoothed(bent)[5.0] == pytest.approx(77 / 3)
    few = dict(list(bent.items())[:7])
    assert smoothed(few) == few
    assert smoothed(dict(list(bent.items())[:8]))[7.0] == (36 + 49) / 2


def test_spread_is_over_the_curves_that_have_the_step() -> None:
    found = spread([{2: 1.0, 1: 0.0}, {1: 1.0, 3: 7.0}, {1: 5.0}])
    assert list(found.items()) == [(1, (2, 0, 5)), (2, (1, 1, 1)), (3, (7, 7, 7))]


def test_rows_go_to_their_stage(tmp_path: Path) -> None:
    stages = ("cold_start", "rl", "evaluate", "filter", "rl")
    rows = [{"stage": stage, "step": i} for i, stage in enumerate(stages)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text('{"seconds": 7}')
    run = read_run(tmp_path)
    parts = (run.cold_start, run.rl, run.evaluations)
    assert [[row["step"] for row in part] for part in parts] == [[0], [1, 4], [2]]
    assert (run.name, run.last_step, run.summary, run.notes) == (
        tmp_path.name, 4, {"seconds": 7}, [],
    )  # fmt: skip


def test_the_headline_is_the_summarys_else_the_last_evaluations() -> None:
    evaluations = [
        {"at": at, "accuracy": a, "greedy": a + 0.1, "consistency": a + 0.2}
        for at, a in (("before", 0.1), ("before", 0.2), ("step", 0.9), ("after", 0.5))
    ]
    rl = [
        {"time/elapsed": t, "memory/peak_rss_bytes": 10 * t} for t in (30.0, 50.0, 40.0, math.nan)
    ]
    measured = {
        "accuracy_before": 0.2, "accuracy_after": 0.5, "greedy_before": pytest.approx(0.3),
        "greedy_after": 0.6, "consistency_before": 0.4, "consistency_after": 0.7,
        "seconds": 50, "peak_rss_bytes": 500,
    }  # fmt: skip
    assert headline(log(rl=rl, evaluations=evaluations)) == measured
    summary = {"accuracy_after": 0.55, "seconds": 60, "greedy_before": None, "other": 1}
    found = headline(log(rl=rl, evaluations=evaluations, summary=summary))
    assert found == measured | {"accuracy_after": 0.55, "seconds": 60}
    assert headline(log()) == {}


def test_medians_of_steps_and_most_memory_of_stages() -> None:
    name = "throughput/tokens_per_second_per_gpu"
    rows = [
        {"time/step": 3.0, name: 10.0, "mfu/update": 0.5, "memory/update/rss_bytes": 9},
        {"time/step": 1.0, name: 30.0, "mfu/update": math.nan, "memory/update/rss_bytes": 7},
        {
            "time/step": 8.0,
            name: 20.0,
            "memory/update/device_bytes": 5,
            "memory/peak_rss_bytes": 99,
        },
    ]
    medians = {"step": 3.0, "tokens_per_second_per_gpu": 20.0, "mfu/update": 0.5}
    assert step_medians(rows) == medians and step_medians([{"step": 1}]) == {}
    assert stage_bytes(rows) == {"update/rss_bytes": 9, "update/device_bytes": 5}


def test_seconds_of_stages_are_means_over_the_runs() -> None:
    one = log(summary={"seconds_by_stage": {"rollout": 10, "update": 4, "idle": 0}})
    step = {"time/rollout": 2, "time/update": 5, "time/step": 8, "time/elapsed": 100}
    other = log(cold_start=[{"time/step": 3}, {"time/step": 1}], rl=[step, step])
    # Halves of 10 + 4, 4 + 10, 3 + 1 and twice 8 - 2 - 5; the longest first.
    assert list(stage_seconds([one, other]).items()) == [
        ("rollout", 7), ("update", 7), ("cold_start", 2), ("other", 1),
    ]  # fmt: skip
