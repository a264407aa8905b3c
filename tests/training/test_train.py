"""Whole runs of a tiny recipe: every stage, every option of the loop, and a failed step that is done again."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line import json_lines, metrics, rewarded, run, untimed

SHORT = {
    "run.seeds": "",
    "run.trackers": "",
    "run.checkpoint-every": "2",
    "run.save-rollouts-every": "2",
    "cold-start.steps": "3",
    "cold-start.batch-size": "4",
    "permutation.orders": "2",
    "rollout.per-order": "2",
    "rollout.max-new-tokens": "6",
    "train.steps": "4",
    "train.examples-per-step": "4",
    "train.tokens-per-micro-batch": "128",
    "eval.examples": "3",
    "eval.max-orders": "2",
}

Train = Callable[..., int | str | None]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs `perl-rl train` for some seconds, into a folder, with changes; returns the exit code."""
    reward = rewarded(tmp_path)

    def run_it(folder: Path, *more: str, **changes: str) -> int | str | None:
        options = SHORT | {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
        flat = [part for k, v in options.items() for part in (f"--{k}", *v.split())]
        return run("train", "demo", "--run.dir", folder, *reward, *flat, *more)

    return run_it


def test_a_run_leaves_everything(tmp_path: Path, train: Train) -> None:
    folder = tmp_path / "run"
    assert train(folder, run__trackers="tensorboard", eval__every="2") == 0
    assert [r["step"] for r in metrics(folder, "cold_start")] == [1, 2, 3]
    rl = metrics(folder, "rl")
    assert [r["step"] for r in rl] == [1, 2, 3, 4]
    names = ("loss", "kl", "entropy", "grad_norm", "clip_fraction")
    assert all(math.isfinite(r[name]) for r in rl for name in names)
    assert all(r["grad_norm"] > 0 and r["groups/kept"] > 0 for r in rl)
    assert [r["at"] for r in metrics(folder, "evaluate")] == ["before", "step", "after"]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("accuracy", "greedy", "consistency"):
        for at in ("before", "after"):
            assert 0 <= summary[f"{name}_{at}"] <= 1
    assert summary["seconds"] > 0 and summary["peak_rss_bytes"] > 2**20
    kept = json_lines(folder / "rollouts.jsonl")
    assert {r["stage"] for r in kept} == {"rl", "evaluate"}
    assert any(r.get("advantage") for r in kept)
    assert all((folder / name).exists() for r in kept for name in r["images"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert list((folder / "perl-rl").glob("events*"))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoProcessor.from_pretrained(folder / "models" / "final")
    AutoModelForImageTextToText.from_pretrained(folder / "models" / "final")


def test_training_changes_what_is_trained(tmp_path: Path, train: Train) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    changes = {"cold_start__steps": "0", "eval__examples": "0", "train__lr": "1e-2"}
    assert train(folder, "--model.freeze-vision", **changes) == 0
    before = load_file(folder / "models" / "initial" / "model.safetensors")
    after = load_file(folder / "models" / "final" / "model.safetensors")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and not any(n.startswith("model.visual") for n in moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__updates_per_batch": "2", "loss__preset": "dapo"},
        {"loss__preset": "gspo", "loss__kl_coef": "0.02", "train__schedule": "cosine"},
        {"loss__preset": "dr_grpo", "train__updates_per_batch": "3"},
        {
            "model__path": "tiny-qwen3-vl",
            "data__tasks": "which count same first odd single",
            "data__max_images": "6",
        },
        {"model__lora_rank": "4", "cold_start__steps": "0"},
        {"model__lora_rank": "4", "eval__examples": "0"},
        {"model__dtype": "bfloat16", "loss__entropy_coef": "0.01"},
        {"permutation__text": "references", "permutation__rate": "0.5", "data__tasks": "same"},
        {"permutation__draw": "released", "permutation__condition": "original"},
        {"advantage__over": "order+group", "advantage__scale": "batch"},
    ],
    ids=lambda c: "-".join(f"{k.split('__')[1]}={v.split()[0]}" for k, v in c.items()),
)
def test_options_of_the_loop(changes: dict[str, str], tmp_path: Path, train: Train) -> None:
    folder = tmp_path / "run"
    assert train(folder, train__steps="2", **changes) == 0
    rl = metrics(folder, "rl")
    assert len(rl) == 2
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rl)
    if int(changes.get("train__updates_per_batch", 1)) > 1:
        assert any(r["ratio_max"] != 1 for r in rl)


def test_seeds_are_runs_of_their_own(tmp_path: Path, train: Train) -> None:
    folder = tmp_path / "run"
    assert train(folder, run__seeds="0 3", train__steps="1", cold_start__steps="1") == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == [0, 3]
    mean = sum(s["accuracy_after"] for s in summary["per_seed"]) / 2
    assert summary["accuracy_after"] == pytest.approx(mean, abs=1e-6)
    one, other = (metrics(folder / f"seed-{s}", "cold_start")[0]["loss"] for s in (0, 3))
    assert one != other


def test_the_reference_of_lora_does_not_move_with_the_tower(tmp_path: Path) -> None:
    """LoRA leaves the tower trainable unless it is frozen: adapters off is then no reference."""
    from perl.distributed import StopSignal
    from perl.files import RunFolder
    from perl.model.packed.pack import pack
    from perl.recipe import load_recipe
    from perl.report.progress import Display
    from perl.training.reinforce import PolicyStep, segments_of
    from perl.training.session import Session

    config = load_recipe("demo")
    config = replace(
        config,
        run=replace(config.run, seeds=(), trackers=()),
        model=replace(config.model, lora_rank=4),
        cold_start=replace(config.cold_start, steps=0),
        rollout=replace(config.rollout, max_new_tokens=4, per_order=2),
        train=replace(config.train, lr=1e-2, warmup_steps=0, examples_per_step=2),
    )
    folder = RunFolder(tmp_path / "run")
    folder.create(overwrite=False)
    folder.make_parts()
    with StopSignal() as stop:
        session = Session(config, folder, Display(enabled=False), stop)
    step = PolicyStep(session)
    groups = session.components.collector.roll_out(session.stream().draw(2), seed=0)
    groups = [replace(g, advantages=np.linspace(-1, 1, len(g.rollouts))) for g in groups]
    (batch,) = pack([s for g in groups for s in segments_of(g, "permuted")], 10_000)
    before = step.reference(batch)
    for number in range(3):
        step(number, groups)
    assert torch.equal(step.reference(batch), before)
    assert not torch.allclose(session.components.head.logprobs(batch).logprobs, before, atol=1e-3)


FAILS_ONCE = """
from pathlib import Path

from perl.types import UserError

FOLDER = Path(__file__).parent

def f(prompts, completions, **columns):
    record, after = FOLDER / "broken" / "metrics.jsonl", FOLDER / "fail_after"
    if after.exists() and record.exists():
        if len(record.read_text().splitlines()) == int(after.read_text()):
            after.unlink()
            raise UserError("the judge is down")
    return [len(c.split()) % 3 / 2 for c in completions]
"""


def test_a_step_that_failed_is_done_again_with_the_groups_it_had_taken(
    tmp_path: Path, train: Train
) -> None:
    """Overflow that a failed step took is in the checkpoint that rescues the run."""
    rewarded(tmp_path, FAILS_ONCE)
    options = {
        "cold_start__steps": "0",
        "eval__examples": "0",
        "train__steps": "6",
        "filter__max_tries": "3",
        "filter__replay": "1",
        "run__checkpoint_every": "0",
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, "--filter.reuse-overflow", **options) == 0
    reused = [r["step"] for r in metrics(whole, "rl") if r["groups/reused"] and r["groups/tries"]]
    (tmp_path / "fail_after").write_text(str(reused[0] - 1))
    assert train(broken, "--filter.reuse-overflow", **options) == 2
    assert len(metrics(broken)) == reused[0] - 1
    assert run("resume", broken) == 0
    assert untimed(broken) == untimed(whole)
