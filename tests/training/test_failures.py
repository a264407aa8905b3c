"""Errors planted everywhere in a run: what is kept, what the one line says, and that the run goes on from there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perl.evaluation.difficulty import MeasuredFile
from perl.report import page
from perl.report.gallery import Gallery
from perl.rewards.scorer import Scorer
from perl.training import commands
from perl.training.saving.checkpoint import CheckpointManager
from perl.training.session import Session
from perl.types import UserError
from tests.command_line import metrics, run, untimed
from tests.messages import tells
from tests.training.two_tokens import (
    Accelerator,
    OwnEngine,
    TwoTokens,
    config_of,
    saved,
    stand_in,
)

STAGES = """
run = { dir = "FOLDER/run", checkpoint_every = 50, save_rollouts_every = 1 }
eval = { examples = 2, max_orders = 2, every = 2 }

[[stages]]
name = "warm"
kind = "cold_start"
cold_start.steps = 3

[[stages]]
name = "sift"
kind = "filter"
resample = { rollouts = 2, histogram = "uniform" }

[[stages]]
name = "rl"
kind = "rl"
train.steps = 4
"""
"""A checkpoint is due only at the end of a stage."""


def recipe(folder: Path, more: str = "") -> Path:
    config_of(folder, (STAGES + more).replace("FOLDER", str(folder)))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A function that gives the folder of a run that nothing went wrong in."""

    @cache
    def finished() -> Path:
        root = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            bare(patch)
            assert run("train", recipe(root)) == 0
        return root / "run"

    return finished


def bare(patch: pytest.MonkeyPatch) -> None:
    """Without what a model folder is needed for, and the report, which takes longer than these runs."""
    stand_in(patch)
    patch.setattr("perl.training.checks.check_run", lambda *_: None)
    patch.setattr("perl.report.page.write_report", lambda root: root)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)


def plant(
    patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException
) -> None:
    """The call of this number raises, and none after it."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(*arguments, **keywords)

    patch.setattr(owner, name, failing)


def goes_on(root: Path, unbroken: Path) -> None:
    """The run ends with the numbers and the weights of one that nothing went wrong in."""
    assert run("resume", root) == 0
    assert untimed(root) == untimed(unbroken)
    kept = [(f / "rollouts.jsonl").read_text() for f in (root, unbroken)]
    assert kept[0] == kept[1]
    for name in ("warm", "final"):
        one, other = (load_file(f / "models" / name / "weights") for f in (unbroken, root))
        assert all(torch.equal(one[k], other[k]) for k in one)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


# Calls of a run without a fault. The engine: the filter 1, before RL 2 and 3, RL steps 4, 5, 8 and 9, measured along the way 6
# and 7, after RL 10 and 11. The policy: the cold start 1 to 3, then two for each RL step. AdamW: 1 to 3, then one for each.
PLANTED: dict[str, tuple[Any, str, int, tuple[str, int] | None, list[str]]] = {
    "tower, first step of all": (TwoTokens, "forward", 1, None, ["warm step 1"]),
    "tower, cold start": (TwoTokens, "forward", 3, ("warm", 2), ["warm step 3", "warm step 2"]),
    # Weights may have changed in part: what was saved before them stands.
    "optimizer, cold start": (torch.optim.AdamW, "step", 3, None, ["warm step 3"]),
    "record, cold start": (Session, "record", 3, None, ["warm step 3"]),
    "export of the cold start": (TwoTokens, "save_pretrained", 1, ("warm", 3), ["warm step 3"]),
    "checkpoint of the cold start": (CheckpointManager, "save", 1, ("sift", 0), ["sift"]),
    "engine, filter": (OwnEngine, "generate", 1, ("sift", 0), ["sift"]),
    "file of the filter": (MeasuredFile, "add", 1, ("sift", 0), ["sift"]),
    "engine, before RL": (
        OwnEngine,
        "generate",
        2,
        ("before", 0),
        ["before RL"],
    ),
    "engine, first RL step": (OwnEngine, "generate", 4, ("rl", 0), ["rl step 1"]),
    "tower, first RL step": (TwoTokens, "forward", 5, ("rl", 0), ["rl step 1"]),
    "reward, third RL step": (Scorer, "score_rollouts", 6, ("rl", 2), ["rl step 3", "rl step 2"]),
    "packer, third RL step": (TwoTokens, "pack", 6, ("rl", 2), ["rl step 3", "rl step 2"]),
    "optimizer, third RL step": (torch.optim.AdamW, "step", 6, ("rl", 0), ["rl step 3"]),
    "record, third RL step": (Session, "record", 9, ("rl", 0), ["rl step 3"]),
    "tower, last RL step": (TwoTokens, "forward", 11, ("rl", 3), ["rl step 4", "rl step 3"]),
    "engine, along the way": (OwnEngine, "generate", 6, ("rl", 2), ["rl step 2"]),
    "pictures, along the way": (Gallery, "keep_rollouts", 2, ("rl", 2), ["rl step 2"]),
    "engine, after RL": (
        OwnEngine,
        "generate",
        10,
        ("after", 0),
        ["after RL"],
    ),
    "export at the end": (
        TwoTokens,
        "save_pretrained",
        2,
        ("done", 0),
        ["the end"],
    ),
    "report": (page, "write_report", 1, ("done", 0), []),
}
"""Whose which call fails, the point that is saved then, and what the line names."""


@pytest.mark.parametrize("at", PLANTED)
def test_a_bug_anywhere_keeps_what_is_done_and_the_run_goes_on(
    at: str,
    tmp_path: Path,
    whole: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, call, point, said = PLANTED[at]
    plant(monkeypatch, owner, name, call, ValueError("planted"))
    folder = tmp_path / "run"
    if at == "tower, first step of all":
        # Nothing is worth keeping, and the trace has nowhere else to go.
        with pytest.raises(ValueError, match="planted") as caught:
            run("train", recipe(tmp_path))
        tells("; ".join(caught.value.__notes__), *said, folder)
        assert not folder.exists()
        return
    assert run("train", recipe(tmp_path)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    tells(line, "error", "ValueError", "planted", *said, f"perl-rl resume {folder}")
    tells(line, folder / "error.log")
    tells((folder / "error.log").read_text(), "Traceback", "planted", *said)
    assert (saved(folder) or [None])[-1] == point
    assert metrics(folder)
    goes_on(folder, whole())


def test_a_step_is_complete_without_its_sample_of_rollouts(
    tmp_path: Path, whole: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    plant(monkeypatch, Gallery, "keep_groups", 3, ValueError("planted"))
    assert run("train", recipe(tmp_path)) == 1
    assert saved(folder)[-1] == ("rl", 3)
    assert run("resume", folder) == 0
    assert untimed(folder) == untimed(whole())


def test_a_folder_that_is_taken_is_told_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perl.training.checks.check_run", lambda *_: pytest.fail("read"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    for option in ((), ("--overwrite",), ("--resume",)):
        assert run("train", recipe(tmp_path), *option) == 2
        tells(capsys.readouterr().err, f"run.dir = {tmp_path / 'run'}")


def exit_of_a_library() -> SystemExit:
    return SystemExit(0)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (lambda: UserError("a picture cannot be read"), 2, ["picture"]),
        (full, 2, ["somewhere", "space"]),
        (lambda: torch.OutOfMemoryError("20 GiB"), 2, ["rollout.kv_cache_tokens"]),
        (lambda: MemoryError(), 1, ["MemoryError", "error.log"]),
        (exit_of_a_library, 1, ["exit(0)", "error.log"]),
        (KeyboardInterrupt, 130, ["stopped"]),
    ],
    ids=["mistake", "full disk", "GPU memory", "memory", "exit", "second Ctrl-C"],
)
def test_whatever_the_error_the_last_step_is_kept(
    error: Callable[[], BaseException],
    code: int,
    said: list[str],
    tmp_path: Path,
    whole: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, OwnEngine, "generate", 8, error())
    folder = tmp_path / "run"
    assert run("train", recipe(tmp_path)) == code
    line = capsys.readouterr().err.splitlines()[-1]
    tells(line, *said, "rl step 3", "rl step 2", f"perl-rl resume {folder}")
    assert saved(folder)[-1] == ("rl", 2)
    goes_on(folder, whole())


def test_a_run_with_relative_paths_goes_on_from_any_folder(
    tmp_path: Path, whole: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    plant(monkeypatch, OwnEngine, "generate", 8, ValueError("planted"))
    data = ("--data.train", "data.jsonl", "--data.eval", "data.jsonl")
    assert run("train", "recipe.toml", "--run.dir", "run", *data) == 1
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    goes_on(Path("../run"), whole())


def test_debug_shows_the_trace_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, OwnEngine, "generate", 8, ValueError("planted"))
    assert run("train", recipe(tmp_path), "--debug") == 1
    said = capsys.readouterr().err
    tells(said, "Traceback", "generate")
    tells(said.splitlines()[-1], "planted", "rl step 3")


@pytest.mark.parametrize("further", [full(), TypeError("too"), KeyboardInterrupt()], ids=repr)
def test_the_first_error_is_told_where_the_rescue_fails_too(
    further: BaseException,
    tmp_path: Path,
    whole: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    plant(monkeypatch, OwnEngine, "generate", 8, ValueError("planted"))
    with monkeypatch.context() as patch:
        # Checkpoints before it: of the cold start, the filter, and what was measured before RL.
        plant(patch, CheckpointManager, "save", 4, further)
        assert run("train", recipe(tmp_path)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    tells(line, "planted", "rl step 3", "rl")
    assert saved(folder)[-1] == ("rl", 0) and len(metrics(folder)) == 8
    assert not list((folder / "checkpoints").glob(".*"))
    goes_on(folder, whole())


def test_a_run_with_finished_steps_is_kept_without_a_checkpoint(
    tmp_path: Path, whole: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was to replace another one, which is gone then."""
    folder = tmp_path / "run"
    plant(monkeypatch, torch.optim.AdamW, "step", 3, ValueError("planted"))
    assert run("train", recipe(tmp_path)) == 1
    assert saved(folder) == [] and len(metrics(folder)) == 2
    plant(monkeypatch, commands, "save_config", 1, full())
    assert run("train", recipe(tmp_path), "--overwrite") == 2
    assert len(metrics(folder)) == 2
    plant(monkeypatch, torch.optim.AdamW, "step", 1, ValueError("planted"))
    with pytest.raises(ValueError, match="planted"):
        run("train", recipe(tmp_path), "--overwrite")
    assert len(metrics(folder)) == 2
    plant(monkeypatch, torch.optim.AdamW, "step", 2, ValueError("planted"))
    assert run("train", recipe(tmp_path), "--overwrite") == 1
    assert len(metrics(folder)) == 1 and not (tmp_path / ".run.replaced").exists()
    (tmp_path / ".run.replaced").mkdir()  # As where it was killed.
    goes_on(folder, whole())
    assert not (tmp_path / ".run.replaced").exists()


def test_a_filter_that_was_stopped_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perl.evaluation.difficulty.CHUNK", 2)
    file = recipe(tmp_path)
    file.write_text(file.read_text().replace("steps = 3", "steps = 0"))
    plant(monkeypatch, OwnEngine, "generate", 2, ValueError("planted"))
    assert run("train", file) == 1
    tells(capsys.readouterr().err.splitlines()[-1], "sift", "perl-rl resume")
    measured = tmp_path / "run" / "filtered" / "sift.accuracies.jsonl"
    assert len(measured.read_text().splitlines()) == 2
    asked = len(OwnEngine.asked)
    assert run("resume", tmp_path / "run") == 0
    assert [n for *_, n in OwnEngine.asked[asked : asked + 2]] == [2, 2]


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out(
    method: str,
    tmp_path: Path,
    whole: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def down(*_: Any, **__: Any) -> None:
        calls.append(method)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(Accelerator, method, down)
    assert run("train", recipe(tmp_path)) == 0
    told = [r for r in caplog.records if r.name == "perl.report.trackers"]
    assert len(told) == len(calls) == 1
    tells(told[0].getMessage(), "itself", "ConnectionError")
    assert untimed(tmp_path / "run") == untimed(whole())
