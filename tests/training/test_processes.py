"""Two processes of one run on the CPU, as torchrun starts them: they share every step, stop together and go on together."""

import json
import signal
from pathlib import Path

import pytest

from tests.command_line import finish, metrics, rewarded, run, spawn_two, wait_for

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
    done = finish(spawn_two("resume", shared))
    assert [code for code, _ in done] == [0, 0], done
    rl = metrics(folder, "rl")
    assert [r["step"] for r in rl] == [1, 2, 3]
    # The first process rolls out its half, and the second draws the group that is replayed only if there is one more.
    assert all(r["groups/seen"] == r["groups/tries"] for r in rl)
    assert json.loads((shared / "summary.json").read_text())["per_seed"][0]["processes"] == 2
