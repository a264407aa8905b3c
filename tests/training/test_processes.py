"""Two processes of one run on the CPU, as torchrun starts them: they share every step, stop together and go on together."""

import json
import os
import signal
from pathlib import Path

import pytest

from perl.lock import locked
from tests.command_line import BY_LENGTH, finish, metrics, rewarded, run, spawn_two, wait_for
from tests.messages import tells

OPTIONS = (
    "--run.trackers --run.checkpoint-every 1 --cold-start.steps 1 --cold-start.batch-size 2 "
    "--permutation.orders 2 --rollout.per-order 2 --rollout.max-new-tokens 6 --train.examples-per-step 2 "
    "--train.tokens-per-micro-batch 128 --eval.examples 0 --filter.max-tries 2 --filter.replay 1"
)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_both_go_on(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    command = ("train", "demo", *rewarded(tmp_path), *OPTIONS.split(), "--run.dir")
    assert run(*command, alone, "--run.seeds", "--train.steps", "0") == 0
    processes = spawn_two(*command, shared, "--run.seeds", "0", "--train.steps", "3")
    folder = shared / "seed-0"
    wait_for(folder, "rl", 1, *processes)
    processes[1].send_signal(signal.SIGTERM)
    done = finish(processes)
    assert [code for code, _ in done] == [130, 130], done
    (one,), (two,) = (metrics(f, "cold_start") for f in (alone, folder))
    assert one["tokens"] == two["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    with locked(shared):
        done = finish(spawn_two("resume", shared))
    # The first process holds the lock for both, and so it is the one that is refused.
    assert [code for code, _ in done] == [2, 2], done
    tells(done[0][1], shared, os.getpid())
    done = finish(spawn_two("resume", shared))
    assert [code for code, _ in done] == [0, 0], done
    rl = metrics(folder, "rl")
    assert [r["step"] for r in rl] == [1, 2, 3]
    # Each process rolls out its half, and the second draws the group that is replayed only if there is one more.
    assert all(r["groups/seen"] == 2 * r["groups/tries"] for r in rl)
    assert json.loads((shared / "summary.json").read_text())["per_seed"][0]["processes"] == 2


FAILING = """
import os
from perl.training.optimizer import Optimizer

step = Optimizer.step

def failing(self, number, *arguments):
    if number == 1 and os.environ["RANK"] == "1":
        raise ValueError("planted")
    return step(self, number, *arguments)

Optimizer.step = failing
"""
"""A reward's file that lets the second RL step fail in the second process, while the first waits for it in a reduction."""


@pytest.mark.slow
def test_a_bug_in_one_process_ends_both_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reward = rewarded(tmp_path, FAILING + BY_LENGTH)
    options = (*OPTIONS.replace("--run.checkpoint-every 1", "").split(), "--filter.replay", "0")
    steps = ("--run.seeds", "--run.seed", "0", "--train.steps", "3")
    processes = spawn_two("train", "demo", *reward, *options, "--run.dir", folder, *steps)
    wait_for(folder, "rl", 1, *processes)
    done = finish(processes)  # Which waits for minutes; the first process would for two hours.
    assert [code for code, _ in done] == [1, 1], done
    tells(done[1][1].splitlines()[-1], "ValueError", "planted", "rl step 2", "-m perl resume")
    tells(done[0][1], "rl step 1")
    assert [row["step"] for row in metrics(folder, "rl")] == [1]
    points = [json.loads(p.read_text())["progress"] for p in folder.glob("*/*/manifest.json")]
    assert ("rl", 1) in [(p["stage"], p["step"]) for p in points]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed = FAILING.replace('raise ValueError("planted")', "os.kill(os.getpid(), 9)")
    reward = rewarded(tmp_path, killed + BY_LENGTH)
    steps = ("--cold-start.steps", "0", "--run.seeds", "--run.seed", "0", "--train.steps", "3")
    processes = spawn_two(
        "train",
        "demo",
        *reward,
        *OPTIONS.split(),
        "--run.dir",
        folder,
        *steps,
        "--filter.replay",
        "0",
    )
    done = finish(processes)
    assert [code for code, _ in done] == [1, -9], done
    assert "Traceback" not in done[0][1]
    (said,) = [line for line in done[0][1].splitlines() if line.startswith("error: ")]
    again = f"torchrun --nproc-per-node 2 -m perl resume {folder}"
    tells(said, "process 1 of 2", f"pid {processes[1].pid}", "rl step 1", again)
