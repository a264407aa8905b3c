"""The commands: what each refuses in one line and what it leaves alone."""

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from perl import cli
from perl import files as hub
from perl.cli import COMMANDS, parse
from tests.command_line import ErrorOf, run
from tests.messages import refused, tells


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], list(COMMANDS)),
        (["trian"], ["trian", "train"]),
        (["xyz"], ["xyz", *COMMANDS]),
        (["--traim"], ["--traim"]),
        (["train"], ["data.train", "model.path", "--data.train", "--model.path", "demo"]),
        (["train", "--data.train", "x.jsonl"], ["model.path", "--model.path"]),
        (["train", "--model.path", "m", "--train.steps", "1"], ["data.train", "--data.train"]),
        (["profile"], ["data.train", "model.path"]),
        (["train", "--train.steps", "3", "demo"], ["recipe demo", "RECIPE"]),
        (["resume"], ["perl-rl resume", "RUN"]),
        (["report"], ["perl-rl report", "RUN"]),
        (["evaluate"], ["perl-rl evaluate", "MODEL"]),
        (["generate", "--prompt", "x"], ["perl-rl generate", "MODEL"]),
        (["doctor", "--x"], ["perl-rl doctor", "--x", "--help"]),
        (["generate", "m", "--prompts", "x"], ["--prompts", "--prompt"]),
        (["resume", "/nowhere"], ["/nowhere", "config.toml", "perl-rl train"]),
        (["report", "/nowhere"], ["/nowhere", "config.toml", "metrics.jsonl"]),
        (["evaluate", "/tmp"], ["/tmp", "config.toml", "config.json"]),
        (["generate", "/no/such/model", "--prompt", "x"], ["/no/such/model", "folder"]),
    ],
)
def test_commands_that_make_no_sense(
    arguments: list[str], names: list[str], error_of: ErrorOf
) -> None:
    tells(error_of(*arguments), *names)


def test_help_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert run("config", "--list") == 0
    assert capsys.readouterr().out.split() == [
        "default",
        "demo",
        "perl-3b-1gpu",
        "perl-7b",
        "perl-released",
    ]
    for name in COMMANDS:
        assert run(name, "--help") == 0
        assert "usage" in capsys.readouterr().out


def test_debug_shows_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "demoo", "--debug") == 2
    said = capsys.readouterr().err
    tells(said, "Traceback")
    tells(said.splitlines()[-1], "error", "demoo", "demo")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m perl config demo | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_is_evaluated_asked_and_reported(
    short_recipe: Path, error_of: ErrorOf, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_recipe.parent / "run"
    assert run("train", short_recipe, "--train.steps", "0") == 0
    unfinished = folder.with_name("unfinished")
    unfinished.mkdir()
    shutil.copy(folder / "config.toml", unfinished)
    tells(error_of("evaluate", unfinished), unfinished, "model")
    wrong = {
        ("--eval.examples", "0"): ["eval.examples = 0", 1],
        ("--eval.max-orders", "0"): ["eval.max_orders = 0", 1],
        ("--max-new-tokens", "0"): ["rollout.max_new_tokens = 0", 1],
        ("--output", "/no/folder/x.json"): ["--output /no/folder/x.json", "folder"],
        ("--data", "/no/data.jsonl"): ["/no/data.jsonl", "path"],
    }
    for options, names in wrong.items():
        tells(error_of("evaluate", folder, *options), *names)
    tells(error_of("generate", folder, "--example", "6"), "--example 6", "6 examples")
    numbers = folder.parent / "numbers.json"
    assert run("evaluate", folder, "--eval.examples", "2", "--output", numbers) == 0
    assert json.loads(numbers.read_text())["examples"] == 2
    assert run("generate", folder, "--example", "1", "--max-new-tokens", "2", "--n", "2") == 0
    assert run("report", folder) == 0
    assert capsys.readouterr().out.rstrip().endswith("report.html")


def test_folders_that_are_no_runs(short_recipe: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    other, long = tmp_path / "other", tmp_path / ("x" * 300)
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.toml").write_text("title = 'a site of mine'")
    (tmp_path / "file").write_text("x")
    for folder, names in (
        (other, [f"run.dir = {other}", "--overwrite", "--run.dir"]),
        (tmp_path / "file", [f"run.dir = {tmp_path}/file", "--run.dir"]),
        (tmp_path / "file" / "run", [tmp_path / "file" / "run", "choose"]),
        (long, [long, "choose"]),
        ("", ["run.dir", "--run.dir"]),
    ):
        tells(error_of("train", short_recipe, "--overwrite", "--run.dir", folder), *names)
    assert len(list(other.iterdir())) == 2


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
    tells(said, "model.path = some-org/some-model")
    assert asked == [(("huggingface.co", 443), 5.0)] and constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("problem", "arguments", "names"),
    [
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"),
            ["train"],
            ["sklearn", f"'{Path(__file__).parents[1]}[train]'"],
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            ["train"],
            [
                *("train.tokens_per_micro_batch", "rollout.kv_cache_tokens"),
                "model.gradient_checkpointing",
            ],
        ),
        (
            OSError(errno.ENOSPC, "No space", "/full"),
            ["train"],
            ["/full", "space"],
        ),
        (OSError(errno.EDQUOT, "Quota", "/q"), ["report"], ["/q", "space"]),
        (PermissionError(errno.EACCES, "No", "/mine"), ["train"], ["/mine", "--debug"]),
        (
            RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but"),
            ["train"],
            ["run.deterministic", "cumsum_cuda_kernel"],
        ),
    ],
    ids=["package", "memory", "space", "quota", "rights", "deterministic"],
)
def test_what_the_machine_lacks_is_one_line(
    problem: Exception,
    arguments: list[str],
    names: list[str],
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_run", Mock(side_effect=problem))
    tells(error_of(*arguments), *names)


def test_what_is_nobodys_mistake_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in (ModuleNotFoundError("x", name="mine.own"), RuntimeError("a bug")):
        monkeypatch.setattr(cli, "_run", Mock(side_effect=problem))
        with pytest.raises(type(problem)):
            cli.main(["train"])


def test_the_first_process_tells_what_all_have_in_common_and_torchao_is_not_heard_of_its_import(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, told in (("1", logging.WARNING), ("0", logging.INFO)):
        monkeypatch.setenv("RANK", rank)
        cli._prepare(debug=False)
        assert {logging.getLogger(n).level for n in ("perl", "perl_kernels")} == {told}
    said = {
        "torchao": "Failed to load x.so: y",
        "torch.utils._pytree": "%s is an Enum subclass and",
    }
    for name, message in said.items():
        logging.getLogger(name).warning(message, "KernelPreference")
        logging.getLogger(name).warning("of %s", name)
    assert [record.getMessage() for record in caplog.records] == [f"of {name}" for name in said]


def test_an_interrupt_is_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("go on with perl-rl resume RUN")
    monkeypatch.setattr(cli, "_run", Mock(side_effect=stop))
    assert run("train") == 130
    tells(capsys.readouterr().err, "stopped", "perl-rl resume", "RUN")


def test_epochs_and_steps_on_the_command_line_take_the_place_of_each_other(tmp_path: Path) -> None:
    train = parse("train", ["default", "--train.epochs", "2"]).config.train
    assert (train.steps, train.epochs) == (0, 2)
    recipe = tmp_path / "epochs.toml"
    recipe.write_text("train.epochs = 2.0")
    train = parse("train", [str(recipe), "--train.steps", "0"]).config.train
    assert (train.steps, train.epochs) == (0, 0)
    with refused("train.epochs = 2", "train.steps = 3"):
        parse("train", ["default", "--train.epochs", "2", "--train.steps", "3"])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_cuda_memory_grows_in_place_unless_the_user_has_set_how(
    given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process of `accelerate launch` or `torchrun` comes through here, before it imports torch."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    with monkeypatch.context() as patch:
        for name in names:
            patch.delenv(name, raising=False)
        for name, value in given.items():
            patch.setenv(name, value)
        assert run("config", "--list") == 0
        assert {name: os.environ[name] for name in names if name in os.environ} == found
        os.environ.pop("PYTORCH_ALLOC_CONF", None)
