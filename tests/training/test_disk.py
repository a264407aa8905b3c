"""Damaged checkpoints and full disks: a run goes on from the newest checkpoint that is whole, and says so."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from perl.training.saving.checkpoint import CheckpointManager, Progress
from tests.command_line import ALTERNATING, ErrorOf, metrics, rewarded, run
from tests.messages import tells


def test_a_run_resumes_from_the_checkpoint_before(
    short_recipe: Path, two_tokens: None, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    every = ("--run.checkpoint-every", "1", "--run.keep-checkpoints", "9", "--train.steps", "2")
    reward = rewarded(short_recipe.parent, ALTERNATING)
    assert run("train", short_recipe, *reward, *every) == 0
    folder = short_recipe.parent / "run"
    (folder / "summary.json").unlink()
    (file,) = max((folder / "checkpoints").iterdir()).glob("*/*.safetensors")
    os.truncate(file, 10)
    assert run("resume", folder) == 0
    tells(capsys.readouterr().err, "step 1", "step-1")
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert run("resume", folder) == 0
    tells(capsys.readouterr().err, "finished")
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("no json")
    tells(error_of("resume", folder), folder / "checkpoints", "--overwrite")


@pytest.fixture
def small_disk(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Iterator[Path]:
    """A file system that one checkpoint with its optimizer state fits on, and no second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (tiny_folder("tiny-qwen2.5-vl") / "model.safetensors").stat().st_size * 9 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, short_recipe: Path, error_of: ErrorOf
) -> None:
    folder = small_disk / "run"
    options = ("--run.dir", folder, "--run.checkpoint-every", "1", "--train.steps", "3")
    reward = rewarded(short_recipe.parent, ALTERNATING)
    said = error_of("train", short_recipe, *reward, *options)
    tells(said, f"{folder}/checkpoints/step-2", "space")
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-1"}
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert run("resume", folder) == 0
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]


@pytest.mark.parametrize("at", ["safetensors.torch.save", "os.fsync", "os.replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_no_trace(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manager = torch.nn.Linear(2, 2), CheckpointManager(tmp_path, 2)
    first = manager.save(model, None, Progress("rl", 1))

    def full(*_: object, **__: object) -> None:
        if at.startswith("safetensors"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(at, full)
    with pytest.raises(OSError) as error:
        manager.save(model, None, Progress("rl", 2))
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [first]
    found = manager.load()
    assert found is not None and found[1].step == 1


def test_a_disk_that_is_full_from_the_start(
    short_recipe: Path, two_tokens: None, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("perl.files.RunFolder.append", full)
    tells(error_of("train", short_recipe), os.strerror(errno.ENOSPC).split()[1], "free")
