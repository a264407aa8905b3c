"""What runs come to: means over seeds, and the table at the end."""

from typing import Any

import pytest

from perl.training.summary import print_summary, summarise_seeds


def summary(seed: int, before: float, after: float, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"{name}_{at}": None
        for name in ("accuracy", "greedy", "consistency")
        for at in ("before", "after")
    }
    values |= {"accuracy_before": before, "accuracy_after": after, "consistency_after": after / 2}
    values |= {"seconds": 10.04, "peak_rss_bytes": 3 * 2**30, "seconds_by_stage": {"rollout": 4.0}}
    same = {"model": "m", "parameters": 3, "device": "cpu", "versions": {}}
    return values | {"seed": seed} | same | more


RUNS = [
    summary(0, 0.25, 0.75),
    summary(3, 0.5, 0.5, peak_rss_bytes=2**29, seconds_by_stage={"update": 9.0, "reward": 0.4}),
]


def test_seeds_are_averaged_and_added_up() -> None:
    found = summarise_seeds(RUNS)
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.375, 0.625)
    assert (found["consistency_before"], found["consistency_after"]) == (None, 0.3125)
    assert (found["seconds"], found["peak_rss_bytes"]) == (20.1, 3 * 2**30)
    assert found["seconds_by_stage"] == {"rollout": 4.0, "update": 9.0, "reward": 0.4}
    assert (found["seeds"], found["per_seed"]) == ([0, 3], RUNS)
    assert (found["model"], found["parameters"]) == ("m", 3)


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """By the first cell of each line of what is printed, the others."""
    said = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in said.splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def test_the_table_has_changes_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summarise_seeds(RUNS), "runs/x")
    rows = table(capsys)
    assert rows["accuracy, T = 1"] == [
        "37.5 (25.0..50.0)",
        "62.5 (50.0..75.0)",
        "+25.0 (0.0..50.0)",
    ]
    assert "accuracy, greedy" not in rows
    assert rows["consistency"] == ["-", "31.2 (25.0..37.5)", "-"]
    assert "20 s in all: update 9 s, rollout 4 s; peak memory 3.00 GiB" in rows
    tagged = {"accuracy_by": "accuracy(tags=True)", "reward_before": 0.5, "reward_after": 1.75}
    judged = {"reward/accuracy_after": 1.0, "reward/judge_before": 0.1, "reward/judge_after": 0.3}
    print_summary(summarise_seeds([RUNS[0] | tagged | judged, RUNS[1] | tagged]), "runs/x")
    rows = table(capsys)
    assert "accuracy, T = 1" not in rows and "reward/accuracy" not in rows
    assert rows["accuracy(tags=True), T = 1"][2] == "+25.0 (0.0..50.0)"
    assert rows["reward, T = 1"] == [
        "0.500 (0.500..0.500)",
        "1.750 (1.750..1.750)",
        "+1.250 (1.250..1.250)",
    ]
    assert rows["reward/judge"] == ["0.100", "0.300", "+0.200"]
    medians = {"step": 120.26, "tokens_per_second_per_gpu": 2000.4, "mfu/step": 0.2321}
    one = RUNS[0] | {"median_step": medians, "device": "cuda:0"}
    print_summary(one | {"peak_flops": {"flops": 989e12, "source": "a datasheet"}}, "runs/x")
    told = "a step, median: 120.3 s, 2000 tokens/s per GPU"
    assert f"{told}, MFU 23.2 % of 989 TFLOP/s (a datasheet)" in table(capsys)
    print_summary(one | {"peak_flops": None}, "runs/x")
    assert told in table(capsys)
    print_summary(RUNS[0], "runs/x")
    rows = table(capsys)
    assert rows["accuracy, T = 1"] == ["25.0", "75.0", "+50.0"]
    print_summary(
        summary(0, 0.1, 0.2)
        | {"accuracy_before": None, "accuracy_after": None}
        | {"consistency_after": None},
        "x",
    )
    assert list(table(capsys)) == ["10 s in all: rollout 4 s; peak memory 3.00 GiB"]
