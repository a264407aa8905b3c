"""The commands: what each refuses in one line, what it leaves alone, and how a run is stopped and goes on."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from perl import cli
from perl import files as hub
from perl.cli import COMMANDS
from tests.command_line import ErrorOf, metrics, rewarded, run

STOPPER = """
import os, signal
from pathlib import Path

def f(prompts, completions, **columns):
    flag = Path(__file__).with_suffix(".flag")
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.{})
    return [float(i % 2) for i in range(len(completions))]
"""
"""A reward that sends this process a signal the first time it is called."""


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in metrics(folder)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "no command; give one of train, resume,"),
        (["trian"], "unknown command trian: did you mean train?"),
        (["xyz"], "unknown command xyz: choose one of train, resume,"),
        (["--traim"], "unknown command --traim"),
        (["train"], "perl-rl train needs a recipe first"),
        (["train", "--train.steps", "3", "demo"], "perl-rl train needs a recipe first"),
        (["resume"], "perl-rl resume needs a run first"),
        (["report"], "perl-rl report needs a run first"),
        (["evaluate"], "perl-rl evaluate needs a model first"),
        (["generate", "--prompt", "x"], "perl-rl generate needs a model first"),
        (["doctor", "--x"], "perl-rl doctor: Unrecognized options: --x"),
        (["generate", "m", "--prompts", "x"], "--prompts, x; did you mean --prompt?"),
        (["resume", "/nowhere"], "/nowhere is no run folder: it has no config.toml"),
        (["report", "/nowhere"], "/nowhere is no run folder"),
        (["evaluate", "/tmp"], "/tmp is neither a run folder (no config.toml) nor a model folder"),
        (["generate", "/no/such/model", "--prompt", "x"], "there is no such folder"),
    ],
)
def test_commands_that_make_no_sense(arguments: list[str], match: str, error_of: ErrorOf) -> None:
    assert match in error_of(*arguments)


def test_help_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert run("config", "--list") == 0
    assert capsys.readouterr().out.split() == ["demo", "perl-3b-1gpu", "perl-7b", "perl-released"]
    for name in COMMANDS:
        assert run(name, "--help") == 0
        assert "usage" in capsys.readouterr().out


def test_debug_shows_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "demoo", "--debug") == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith(
        "error: unknown recipe demoo: did you mean demo?\n"
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m perl config demo | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "needs --prompt, with --images, or --example"),
        (["--prompt", "x", "--images", "9.png"], "there is no image file"),
        (["--prompt", "<image> x"], "1 <image> slots but 0 images"),
        (["--prompt", "<image> <image> x", "--images", "0.png"], "2 <image> slots but 1 images"),
        (["--prompt", "<image> x", "--images", "0.png", "1.png"], "1 <image> slots but 2 images"),
        (["--prompt", "x", "--n", "0"], "--n 0: must be greater than or equal to 1"),
        (
            ["--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens 0: must be greater than or equal to 1",
        ),
        (
            ["--prompt", "x", "--temperature", "-1"],
            "--temperature -1.0: must be greater than or equal to 0",
        ),
        (["--prompt", "x", "--seed", "-1"], "--seed -1: must be greater than or equal to 0"),
        (["--prompt", "x", "--example", "0"], "not both"),
        (["--example", "-1"], "--example -1: must be greater than or equal to 0"),
    ],
)
def test_generate_refuses(
    options: list[str],
    match: str,
    short_recipe: Path,
    tiny_folder: Callable[[str], Path],
    error_of: ErrorOf,
) -> None:
    beside = [str(short_recipe.parent / o) if o.endswith(".png") else o for o in options]
    assert match in error_of("generate", tiny_folder("tiny-qwen2.5-vl"), *beside)


def test_a_run_is_evaluated_asked_and_reported(
    short_recipe: Path, error_of: ErrorOf, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_recipe.parent / "run"
    assert run("train", short_recipe, "--train.steps", "0") == 0
    unfinished = folder.with_name("unfinished")
    unfinished.mkdir()
    shutil.copy(folder / "config.toml", unfinished)
    assert "has no finished model yet" in error_of("evaluate", unfinished)
    wrong = {
        ("--eval.examples", "0"): "eval.examples = 0: must be 1 or more",
        ("--eval.max-orders", "0"): "eval.max_orders = 0: must be",
        ("--max-new-tokens", "0"): "rollout.max_new_tokens = 0: must be",
        ("--output", "/no/folder/x.json"): "there is no folder to write it to",
        ("--data", "/no/data.jsonl"): "there is no data file or folder",
    }
    for options, match in wrong.items():
        assert match in error_of("evaluate", folder, *options)
    assert "the data has only 6 examples" in error_of("generate", folder, "--example", "6")
    numbers = folder.parent / "numbers.json"
    assert run("evaluate", folder, "--eval.examples", "2", "--output", numbers) == 0
    assert json.loads(numbers.read_text())["examples"] == 2
    assert run("generate", folder, "--example", "1", "--max-new-tokens", "2", "--n", "2") == 0
    assert run("report", folder) == 0
    assert capsys.readouterr().out.rstrip().endswith("report.html")


def test_folders_that_are_no_runs(short_recipe: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.toml").write_text("title = 'a site of mine'")
    (tmp_path / "file").write_text("x")
    train = ("train", short_recipe, "--overwrite", "--run.dir")
    assert "is no run folder, so --overwrite leaves it alone" in error_of(*train, other)
    assert len(list(other.iterdir())) == 2
    assert "is a file; choose another --run.dir" in error_of(*train, tmp_path / "file")
    assert "Not a directory" in error_of(*train, tmp_path / "file" / "run")
    assert "File name too long" in error_of(*train, tmp_path / ("x" * 300))
    assert "run.dir is empty" in error_of(*train, "")


def test_train_resume_goes_on_in_the_folder(
    short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_recipe.parent / "run"
    reward = rewarded(folder.parent, STOPPER.format("SIGINT"))
    command = ("train", short_recipe, "--resume", "--train.steps", "3", *reward)
    assert run(*command) == 130
    assert steps(folder) == [1]
    capsys.readouterr()
    assert run(*command, "--train.lr", "1") == 0
    assert "not used: train.lr" in capsys.readouterr().err
    assert steps(folder) == [1, 2, 3]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_after_a_checkpoint_and_resume_goes_on(
    name: str, short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_recipe.parent / "run"
    before = signal.getsignal(getattr(signal, name))
    reward = rewarded(folder.parent, STOPPER.format(name))
    assert run("train", short_recipe, "--train.steps", "2", *reward) == 130
    assert signal.getsignal(getattr(signal, name)) is before
    said = capsys.readouterr().err
    assert said.rstrip().endswith(f"stopped after rl step 1; go on with perl-rl resume {folder}")
    assert steps(folder) == [1]
    assert (folder / "checkpoints" / "000001" / "manifest.json").exists()
    assert run("resume", folder) == 0
    assert steps(folder) == [1, 2]
    assert (folder / "models" / "final" / "config.json").exists()


def test_a_second_signal_stops_at_once(
    short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rewards are computed in a thread; the main thread takes one signal at a time.
    kill = "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3)"
    twice = f"import os, signal, time\ndef f(**columns):\n    {kill}\n    {kill}\n    time.sleep(9)"
    reward = rewarded(short_recipe.parent, twice)
    assert run("train", short_recipe, *reward) == 130
    assert "stopped at once" in capsys.readouterr().err.splitlines()[-1]


def test_without_network_the_hub_is_given_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error_of: ErrorOf
) -> None:
    from huggingface_hub import constants

    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    hub.offline_if_unreachable.cache_clear()
    said = error_of("generate", "some-org/some-model", "--prompt", "x")
    assert "model.path = some-org/some-model: no model can be read there" in said
    assert asked == [(("huggingface.co", 443), 5.0)] and constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("problem", "match"),
    [
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"),
            "sklearn is not installed; pip install 'perl-rl[train]'",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "out of GPU memory: lower train.tokens_per_micro_batch",
        ),
    ],
    ids=["package", "memory"],
)
def test_what_the_machine_lacks_is_one_line(
    problem: Exception, match: str, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run", Mock(side_effect=problem))
    assert error_of("train", "demo").startswith(match)
