"""Whole runs of tiny models by the command line: what they leave, what they train, and how they are stopped, killed and go on."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perl.config import Config
from perl.training.checks import check_deterministic
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
from tests.messages import refused, tells

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
    assert list((folder / "tensorboard" / "perl-rl").glob("events*"))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoProcessor.from_pretrained(folder / "models" / "final")
    AutoModelForImageTextToText.from_pretrained(folder / "models" / "final")


def test_a_frozen_tower_encodes_an_image_once_a_run_and_the_same_bits_when_it_goes_on(
    short_recipe: Path, tmp_path: Path
) -> None:
    """Six images of six rows, of which a step takes two."""

    def trained(folder: Path, steps: int) -> int | str | None:
        more = (
            "--run.dir",
            folder,
            "--model.freeze-vision",
            *rewarded(tmp_path, ALTERNATING),
            "--train.lr=0.01",
        )
        return run("train", short_recipe, *more, "--train.steps", steps)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert trained(whole, 4) == trained(stopped, 2) == 0
    assert run("resume", stopped, "--train.steps", 4) == 0
    encoded = [[r["throughput/images_encoded"] for r in metrics(f, "rl")] for f in (whole, stopped)]
    assert sum(encoded[0]) == 6 and encoded[0][3:] == [0]
    assert encoded[1][:2] == encoded[0][:2] and sum(encoded[1][2:]) >= 4
    assert untimed(stopped) == untimed(whole) and same_weights(stopped, whole)


def test_a_deterministic_run_switches_pytorch_over_and_gives_a_cpu_s_numbers(
    short_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """import os, pathlib, torch
def f(prompts, **c):
    switch = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    pathlib.Path(__file__).with_name("seen").write_text(str(switch))
    return [float(i % 2) for i in range(len(prompts))]"""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    folders = []
    for more, seen in (
        ("--run.no-deterministic", (False, None)),
        ("--run.deterministic", (True, ":4096:8")),
    ):
        folders.append(tmp_path / more)
        options = (*rewarded(tmp_path, source), "--train.lr=0.01", more, "--run.dir", folders[-1])
        assert run("train", short_recipe, *options) == 0
        assert (tmp_path / "seen").read_text() == str(seen)
        assert not torch.are_deterministic_algorithms_enabled()
    assert untimed(folders[0]) == untimed(folders[1]) and same_weights(*folders)


def test_top_p_is_not_deterministic_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config = replace(config, rollout=replace(config.rollout, top_p=0.9))
    wanted = replace(config, run=replace(config.run, deterministic=True))
    for fine, cuda in ((config, True), (wanted, False)):
        check_deterministic(fine, cuda)
    with refused("run.deterministic", "rollout.top_p = 0.9", "rollout.top_k"):
        check_deterministic(wanted, cuda=True)


LINEAR = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
LINEAR += ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (("--model.dtype", "bfloat16"), lambda name: True),
        (
            ("--model.lora-rank", "2", "--model.freeze-vision"),
            lambda name: name.startswith("model.layers") and name.endswith(LINEAR),
        ),
    ],
    ids=["all in bfloat16", "adapters"],
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
    moved = {n for n in before if not torch.equal(before[n].to(after[n]), after[n])}
    assert moved == {name for name in before if trained(name)}


STOPPER = """
import os, signal
from pathlib import Path

def f(prompts, completions, trainer_state, **columns):
    flag = Path(__file__).with_suffix(".flag")
    if trainer_state.max_steps and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.{})
    return [float(i % 2) for i in range(len(completions))]
"""
"""A reward that sends this process a signal the first time that a step calls it."""


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in metrics(folder)]


@pytest.mark.parametrize(("name", "again"), [("SIGTERM", "resume"), ("SIGINT", "train")])
def test_a_signal_stops_after_a_checkpoint_and_the_run_goes_on(
    name: str, again: str, short_recipe: Path, two_tokens: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `resume`, or by `train --resume`, which says which of its options do not hold."""
    folder, number = short_recipe.parent / "run", signal.Signals[name]
    reward = rewarded(folder.parent, STOPPER.format(name))
    train = ("train", short_recipe, "--resume", "--train.steps", "2", *reward)
    before = signal.getsignal(number)
    assert run(*train) == 130
    assert signal.getsignal(number) is before
    tells(capsys.readouterr().err.splitlines()[-1], "rl step 1", f"perl-rl resume {folder}")
    assert steps(folder) == [1]
    assert (folder / "checkpoints" / "step-1" / "manifest.json").exists()
    assert run(*(("resume", folder) if again == "resume" else (*train, "--train.lr", "1"))) == 0
    said = capsys.readouterr().err
    if again == "train":
        tells(said, folder / "config.toml", "train.lr")
    else:
        assert "config.toml" not in said
    assert steps(folder) == [1, 2]
    assert (folder / "models" / "final" / "weights").exists()


def test_a_second_signal_stops_at_once(
    short_recipe: Path, two_tokens: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rewards are computed in a thread; the main thread takes one signal at a time.
    kill = "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3)"
    tried = "if not trainer_state.max_steps: return [1.0] * len(completions)"
    head = f"import os, signal, time\ndef f(completions, trainer_state):\n    {tried}\n"
    twice = f"{head}    {kill}\n    {kill}\n    time.sleep(9)"
    reward = rewarded(short_recipe.parent, twice)
    assert run("train", short_recipe, *reward) == 130
    folder = short_recipe.parent / "run"
    tells(capsys.readouterr().err.splitlines()[-1], "stopped", "rl step 1", folder)
    assert not folder.exists()


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


def test_what_a_run_leaves_is_evaluated_asked_and_trained_from(
    short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint of a LoRA run and its adapter are its final model, and another run goes on from it."""
    root = short_recipe.parent / "run"
    reward = rewarded(root.parent, ALTERNATING)
    lora = ("--model.lora-rank", "2", "--model.freeze-vision", "--train.lr", "0.5")
    assert run("train", short_recipe, *reward, *lora, "--eval.examples", "2") == 0
    numbers = []
    models = (root, root / "checkpoints" / "step-1", root / "models" / "final" / "adapter")
    more = ("--data", root.parent / "test.jsonl", "--max-new-tokens", "4", "--eval.examples", "2")
    for model in models:
        assert run("evaluate", model, *more, "--output", root / "numbers.json") == 0
        numbers.append(json.loads((root / "numbers.json").read_text()))
    assert numbers[0] == numbers[1] == numbers[2]
    asked = ("--example", "0", "--max-new-tokens", "4")
    capsys.readouterr()
    assert run("generate", models[1], *asked) == 0
    tells(capsys.readouterr().out, "answer: A")
    other = root.parent / "other"
    options = ("--model.path", models[1], "--run.dir", other, "--train.lr", "0")
    assert run("train", short_recipe, *reward, *options) == 0
    assert same_weights(other, root)
