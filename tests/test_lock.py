"""A run folder belongs to one process at a time: who is refused, who may read, and when the lock is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perl.lock import holder, locked, refuse_if_running
from tests.command_line import ErrorOf, json_lines, metrics, rewarded, run, wait_for
from tests.forked import Forked
from tests.messages import refused, tells


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "mine"
    assert holder(root) is None
    with locked(root):
        who = json.loads((tmp_path / "runs" / ".mine.lock").read_text())
        assert (who["pid"], who["host"]) == (os.getpid(), socket.gethostname())
        named = (f"run.dir = {root}", os.getpid(), who["host"], who["since"], "--run.dir")
        with refused(*named), locked(root):
            pass
        root.mkdir()
        root.rename(root.with_name("aside"))  # As --overwrite does.
        with refused(*named):
            refuse_if_running(root)
        with locked(root.with_name("other")):
            pass
    refuse_if_running(root)
    with pytest.raises(KeyError), locked(root):
        raise KeyError
    assert not list((tmp_path / "runs").glob(".*"))


def test_a_seed_s_folder_is_held_with_the_whole_run(tmp_path: Path) -> None:
    seed, other = tmp_path / "run" / "seed-3", tmp_path / "seed-3"
    seed.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").touch()
    for first, second in ((tmp_path / "run", seed), (seed, tmp_path / "run")):
        with locked(first), locked(other), refused(second, os.getpid()):
            refuse_if_running(second)


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom perl.lock import locked\n"
        f"with locked(Path({str(tmp_path / 'run')!r})):\n    print('held', flush=True)\n    time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with refused(process.pid, socket.gethostname()):
        refuse_if_running(tmp_path / "run")
    process.kill()
    process.wait()
    assert holder(tmp_path / "run") is None
    with locked(tmp_path / "run"):
        tells(holder(tmp_path / "run"), os.getpid())


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its last holder, between opening and locking: the next to come would make another file and hold that."""
    path, flock, removed = tmp_path / ".run.lock", fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "run"):
        assert removed and path.exists()
        tells(holder(tmp_path / "run"), os.getpid())


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "run"):
        refuse_if_running(tmp_path / "run")
    tells(caplog.text, "WARNING", tmp_path / "run", "locks")


WAITING = """
import os, time
from pathlib import Path

def f(prompts, completions, trainer_state, **columns):
    second = trainer_state.global_step == 1
    while "WAIT" in os.environ and second and not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return [float(i % 2) for i in range(len(completions))]
"""
"""A reward that lets the second step of a run wait, and nobody else who is told to use it."""


@pytest.mark.slow
def test_what_is_asked_of_a_run_that_is_running(
    short_recipe: Path, error_of: ErrorOf, capsys: pytest.CaptureFixture[str]
) -> None:
    base = short_recipe.parent
    folder, data = base / "run", base / "data.jsonl"
    options = (*rewarded(base, WAITING), "--train.steps", "2", "--run.checkpoint-every", "1")
    options += ("--reward.timeout", "0")
    process = Forked("perl", "train", short_recipe, *options, WAIT="yes")
    wait_for(folder, "rl", 1, process)
    while not (folder / "checkpoints" / "step-1").exists():
        assert process.poll() is None
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')  # As a reader may see a line that is being written.

    def files() -> dict[str, int]:
        paths = [p for p in folder.rglob("*") if p.is_file()]
        return {
            str(p.relative_to(folder)): p.stat().st_mtime_ns
            for p in paths
            if p.name != "report.html" and "plots" not in p.parts
        }

    before = files()
    for command in (
        ("train", short_recipe),
        ("train", short_recipe, "--overwrite"),
        ("train", short_recipe, "--resume"),
        ("resume", folder),
    ):
        tells(error_of(*command), f"run.dir = {folder}", process.pid, socket.gethostname())
    for command in (
        ("evaluate", folder, "--eval.examples", "1", "--data", data),
        ("generate", folder, "--prompt", "which?", "--max-new-tokens", "2"),
        ("report", folder),
        ("filter", folder, "--data", data, "--limit", "2", "--output", base / "kept.jsonl"),
    ):
        assert run(*command) == 0, capsys.readouterr().err
    assert files() == before
    assert json_lines(base / "kept.jsonl")
    os.truncate(folder / "metrics.jsonl", (folder / "metrics.jsonl").stat().st_size - 19)
    (base / "go").touch()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert holder(folder) is None
