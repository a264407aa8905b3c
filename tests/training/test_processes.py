"""Two processes of one run on the CPU: they share every step, fail together, stop together and go on together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REWARD = """
import os

def by_length(prompts, completions, **columns):
    return [len(c.split()) % 3 / 2 for c in completions]

calls = 0

def breaks_in_the_second(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 2:
        raise RuntimeError("only here")
    return by_length(prompts, completions)
"""

OPTIONS = (
    "--run.trackers --run.checkpoint-every 1 --cold-start.steps 2 --cold-start.batch-size 4 "
    "--permutation.orders 2 --rollout.per-order 2 --rollout.max-new-tokens 6 --train.examples-per-step 4 "
    "--train.tokens-per-micro-batch 128 --eval.examples 3 --eval.max-orders 2 --filter.max-tries 2"
)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[subprocess.Popen[str]]]:
    """Start `perl-rl` in two processes that know of each other, as torchrun would."""
    (tmp_path / "my_reward.py").write_text(REWARD)

    def start(*arguments: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        return [
            subprocess.Popen(
                [sys.executable, "-m", "perl", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]

    return start


def training(folder: Path, reward: str = "by_length", *more: str) -> list[str]:
    reward_file = folder.parent / "my_reward.py"
    rewards = ["--reward.functions", f"{reward_file}:{reward}", "--reward.weights", "1"]
    return ["train", "demo", "--run.dir", str(folder), *rewards, *OPTIONS.split(), *more]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        outputs = [p.communicate(timeout=150)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == stage]


def test_every_seed_is_shared(tmp_path: Path, launch: Callable[..., Any]) -> None:
    from perl.cli import main

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    with pytest.raises(SystemExit):
        main(training(alone, "by_length", "--run.seeds", "--train.steps", "0"))
    for code, out in finish(
        launch(*training(shared, "by_length", "--run.seeds", "0", "1", "--train.steps", "2"))
    ):
        assert code == 0, out
    for one, two in zip(
        rows(alone, "cold_start"), rows(shared / "seed-0", "cold_start"), strict=True
    ):
        assert one["tokens"] == two["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for seed in ("seed-0", "seed-1"):
        rl = rows(shared / seed, "rl")
        assert len(rl) == 2 and all(r["grad_norm"] > 0 for r in rl)
        # The first process rolled out its half: the optimizer step scored the tokens of both.
        assert all(r["groups/seen"] == 2 * r["groups/tries"] for r in rl)
    assert json.loads((shared / "summary.json").read_text())["per_seed"][0]["processes"] == 2


def test_a_process_without_images(
    tmp_path: Path, launch: Callable[..., Any], short_recipe: Path
) -> None:
    """One process draws questions over pictures, the other texts: its tower has no gradient of its own."""
    data = tmp_path / "data.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for row in lines[1::2]:
        row |= {"question": "Which image shows three ?", "images": []}
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    options = (
        "--train.steps 3 --rollout.per-order 4 --permutation.orders 2 --filter.no-zero-variance "
        f"--reward.weights 1 --reward.functions {tmp_path / 'my_reward.py'}:by_length"
    )
    done = finish(launch("train", str(short_recipe), *options.split()))
    assert [code for code, _ in done] == [0, 0], done
    steps = rows(tmp_path / "run", "rl")
    assert len(steps) == 3 and any(r["grad_norm"] > 0 for r in steps)


def test_one_process_s_mistake_stops_both_and_keeps_the_steps(
    tmp_path: Path, launch: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    done = finish(
        launch(*training(folder, "breaks_in_the_second", "--run.seeds", "--train.steps", "9"))
    )
    assert [code for code, _ in done] == [2, 2], done
    assert "another process of this run stopped" in done[0][1]
    assert "reward function 'breaks_in_the_second' raised RuntimeError: only here" in done[1][1]
    assert list((folder / "checkpoints").iterdir())
    assert rows(folder, "rl")


def test_a_signal_to_one_stops_both_and_both_go_on(
    tmp_path: Path, launch: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    processes = launch(*training(folder, "by_length", "--run.seeds", "--train.steps", "6"))
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and rows(folder, "rl")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    done = finish(processes)
    assert [code for code, _ in done] == [130, 130], done
    assert [code for code, _ in finish(launch("resume", str(folder)))] == [0, 0]
    assert [r["step"] for r in rows(folder, "rl")] == [1, 2, 3, 4, 5, 6]


STAGED = """
[run]
trackers = []
checkpoint_every = 1

[rollout]
per_order = 2
max_new_tokens = 6

[train]
examples_per_step = 4
tokens_per_micro_batch = 128

[filter]
reuse_overflow = true
replay = 1

[eval]
examples = 0

[[stages]]
name = "sift"
kind = "filter"
resample = { examples = 7, rollouts = 2, histogram = "uniform" }

[[stages]]
name = "rl"
kind = "rl"
train.steps = 5
"""


def test_stages_are_shared_and_each_keeps_its_groups(
    tmp_path: Path, launch: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "staged.toml").write_text(STAGED)
    reward = ["--reward.functions", f"{tmp_path / 'my_reward.py'}:by_length"]
    recipe = [str(tmp_path / "staged.toml"), "--run.dir", str(folder), "--reward.weights", "1"]
    processes = launch("train", *recipe, *reward)
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and len(rows(folder, "rl")) > 1):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)
    done = finish(processes)
    assert [code for code, _ in done] == [130, 130], done
    measured = [
        [json.loads(line)["index"] for line in path.read_text().splitlines()]
        for path in sorted((folder / "filtered").glob("sift.accuracies-*.jsonl"))
    ]
    assert measured == [[0, 2, 4, 6], [1, 3, 5]]
    (filtered,) = rows(folder, "filter")
    assert filtered["filter/measured"] == 7
    newest = max((folder / "checkpoints").iterdir())
    kept = {p.name for p in newest.glob("*-[01].safetensors")}
    assert kept == {f"{name}-{rank}.safetensors" for name in ("queue", "buffer") for rank in (0, 1)}
    done = finish(launch("resume", str(folder)))
    assert [code for code, _ in done] == [0, 0], done
    rl = rows(folder, "rl")
    assert [r["step"] for r in rl] == [1, 2, 3, 4, 5]
    assert [r["groups/replayed"] for r in rl] == [0, 1, 1, 1, 1]
