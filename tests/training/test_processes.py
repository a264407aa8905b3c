"""Two processes of one run on the CPU: they share every step, fail together, stop together and go on together."""

import json
import signal
from pathlib import Path

import pytest
import tomli_w

from tests.command_line import (
    BY_LENGTH,
    finish,
    json_lines,
    metrics,
    rewarded,
    run,
    spawn_two,
    wait_for,
)

pytestmark = pytest.mark.slow

BREAKS_IN_THE_SECOND = """
import os

calls = 0

def f(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 2:
        raise RuntimeError("only here")
    return [len(c.split()) % 3 / 2 for c in completions]
"""

OPTIONS = (
    "--run.trackers --run.checkpoint-every 1 --cold-start.steps 2 --cold-start.batch-size 4 "
    "--permutation.orders 2 --rollout.per-order 2 --rollout.max-new-tokens 6 --train.examples-per-step 4 "
    "--train.tokens-per-micro-batch 128 --eval.examples 3 --eval.max-orders 2 --filter.max-tries 2"
)


def training(folder: Path, *more: str, reward: str = BY_LENGTH) -> list[str]:
    rewards = rewarded(folder.parent, reward)
    return ["train", "demo", "--run.dir", str(folder), *rewards, *OPTIONS.split(), *more]


def test_every_seed_is_shared(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run(*training(alone, "--run.seeds", "--train.steps", "0")) == 0
    command = training(shared, "--run.seeds", "0", "1", "--train.steps", "2")
    for code, out in finish(spawn_two(*command)):
        assert code == 0, out
    steps = (metrics(folder, "cold_start") for folder in (alone, shared / "seed-0"))
    for one, two in zip(*steps, strict=True):
        assert one["tokens"] == two["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for seed in ("seed-0", "seed-1"):
        rl = metrics(shared / seed, "rl")
        assert len(rl) == 2 and all(r["grad_norm"] > 0 for r in rl)
        # The first process rolled out its half: the optimizer step scored the tokens of both.
        assert all(r["groups/seen"] == 2 * r["groups/tries"] for r in rl)
    assert json.loads((shared / "summary.json").read_text())["per_seed"][0]["processes"] == 2


def test_a_process_without_images(tmp_path: Path, short_recipe: Path) -> None:
    """One process draws questions over pictures, the other texts: its tower has no gradient of its own."""
    data = tmp_path / "data.jsonl"
    lines = json_lines(data)
    for row in lines[1::2]:
        row |= {"question": "Which image shows three ?", "images": []}
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    options = (
        "--train.steps 3 --rollout.per-order 4 --permutation.orders 2 --filter.no-zero-variance"
    )
    done = finish(spawn_two("train", short_recipe, *options.split(), *rewarded(tmp_path)))
    assert [code for code, _ in done] == [0, 0], done
    steps = metrics(tmp_path / "run", "rl")
    assert len(steps) == 3 and any(r["grad_norm"] > 0 for r in steps)


def test_one_process_s_mistake_stops_both_and_keeps_the_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = ("--run.seeds", "--train.steps", "9")
    done = finish(spawn_two(*training(folder, *steps, reward=BREAKS_IN_THE_SECOND)))
    assert [code for code, _ in done] == [2, 2], done
    assert "another process of this run stopped" in done[0][1]
    assert "reward function 'f' raised RuntimeError: only here" in done[1][1]
    assert list((folder / "checkpoints").iterdir())
    assert metrics(folder, "rl")


STAGED = {
    "run": {"trackers": [], "checkpoint_every": 1},
    "rollout": {"per_order": 2, "max_new_tokens": 6},
    "train": {"examples_per_step": 4, "tokens_per_micro_batch": 128, "steps": 5},
    "filter": {"reuse_overflow": True, "replay": 1},
    "eval": {"examples": 0},
    "resample": {"examples": 7, "rollouts": 2, "histogram": "uniform"},
    "stages": [{"name": "sift", "kind": "filter"}, {"name": "rl", "kind": "rl"}],
}


def test_a_signal_to_one_stops_both_and_both_go_on_with_their_groups(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "staged.toml").write_text(tomli_w.dumps(STAGED))
    recipe = (tmp_path / "staged.toml", "--run.dir", folder)
    processes = spawn_two("train", *recipe, *rewarded(tmp_path))
    wait_for(folder, "rl", 2, *processes)
    processes[1].send_signal(signal.SIGTERM)
    done = finish(processes)
    assert [code for code, _ in done] == [130, 130], done
    measured = [
        [row["index"] for row in json_lines(path)]
        for path in sorted((folder / "filtered").glob("sift.accuracies-*.jsonl"))
    ]
    assert measured == [[0, 2, 4, 6], [1, 3, 5]]
    (filtered,) = metrics(folder, "filter")
    assert filtered["filter/measured"] == 7
    newest = max((folder / "checkpoints").iterdir())
    kept = {p.name for p in newest.glob("*-[01].safetensors")}
    assert kept == {
        f"{name}-{rank}.safetensors" for name in ("overflow", "buffer") for rank in (0, 1)
    }
    done = finish(spawn_two("resume", folder))
    assert [code for code, _ in done] == [0, 0], done
    rl = metrics(folder, "rl")
    assert [r["step"] for r in rl] == [1, 2, 3, 4, 5]
    assert [r["groups/replayed"] for r in rl] == [0, 1, 1, 1, 1]
