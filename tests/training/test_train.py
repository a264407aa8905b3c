"""Whole runs of tiny models by the command line: what they leave, what they train, and a process that is killed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import (
    ALTERNATING,
    json_lines,
    metrics,
    rewarded,
    run,
    same_weights,
    spawn,
    untimed,
    wait_for,
)

SHORT = (
    "--run.seeds --run.trackers tensorboard --run.save-rollouts-every 1 --cold-start.steps 1 "
    "--cold-start.batch-size 2 --permutation.orders 2 --rollout.per-order 2 --rollout.max-new-tokens 6 "
    "--train.steps 2 --train.examples-per-step 2 --train.tokens-per-micro-batch 128 "
    "--eval.examples 2 --eval.max-orders 2 --eval.every 1"
)


def test_a_run_leaves_everything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("train", "demo", "--run.dir", folder, *rewarded(tmp_path), *SHORT.split()) == 0
    assert [r["step"] for r in metrics(folder, "cold_start")] == [1]
    assert [r["step"] for r in metrics(folder, "rl")] == [1, 2]
    measured = {r["at"]: r for r in metrics(folder, "evaluate")}
    assert list(measured) == ["before", "step", "after"]
    summary = json.loads((folder / "summary.json").read_text())
    for at in ("before", "after"):
        for name in ("accuracy", "greedy", "consistency"):
            assert summary[f"{name}_{at}"] == measured[at][name]
    assert summary["seconds"] > 0 and summary["peak_rss_bytes"] > 2**20
    kept = json_lines(folder / "rollouts.jsonl")
    assert {r["stage"] for r in kept} == {"rl", "evaluate"}
    assert any(r.get("advantage") for r in kept)
    assert all((folder / name).exists() for r in kept for name in r["images"])
    assert (folder / "report.html").exists()
    assert list((folder / "perl-rl").glob("events*"))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoProcessor.from_pretrained(folder / "models" / "final")
    AutoModelForImageTextToText.from_pretrained(folder / "models" / "final")


LINEAR = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
LINEAR += ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (("--model.freeze-vision",), lambda name: not name.startswith("visual")),
        (("--model.dtype", "bfloat16"), lambda name: True),
        (
            ("--model.lora-rank", "2", "--model.freeze-vision"),
            lambda name: name.startswith("model.layers") and name.endswith(LINEAR),
        ),
        (
            ("--model.lora-rank", "2"),
            lambda name: name.startswith("visual") or name.endswith(LINEAR),
        ),
    ],
    ids=["frozen tower", "all in bfloat16", "adapters", "adapters and tower"],
)
def test_training_changes_what_is_trained_and_nothing_else(
    options: tuple[str, ...],
    trained: Callable[[str], bool],
    short_recipe: Path,
    tiny_folder: Callable[[str], Path],
) -> None:
    reward = rewarded(short_recipe.parent, ALTERNATING)
    more = ("--train.lr", "0.01", "--run.checkpoint-every", "0", "--train.examples-per-step", "1")
    assert run("train", short_recipe, *reward, *more, *options) == 0
    before = load_file(tiny_folder("tiny-qwen2.5-vl") / "model.safetensors")
    after = load_file(short_recipe.parent / "run" / "models" / "final" / "model.safetensors")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {name for name in before if trained(name)}


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


@pytest.mark.slow
def test_a_killed_process_is_gone_on_from(short_recipe: Path) -> None:
    folder = short_recipe.parent
    options = ("--train.steps", "3", "--run.checkpoint-every", "1", "--model.freeze-vision")
    command = ("train", short_recipe, *rewarded(folder, ALTERNATING), *options, "--run.dir")
    assert run(*command, folder / "whole") == 0
    process = spawn(*command, folder / "broken")
    wait_for(folder / "broken", "rl", 1, process)
    process.kill()
    process.wait()
    assert 1 <= len(metrics(folder / "broken")) < 3
    assert run("resume", folder / "broken") == 0
    assert untimed(folder / "broken") == untimed(folder / "whole")
    assert same_weights(folder / "broken", folder / "whole")
