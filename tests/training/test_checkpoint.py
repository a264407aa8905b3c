"""What lies in a checkpoint, which ones stay, and which one a run goes on from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perl.training.saving.checkpoint import CheckpointManager, Progress
from tests.messages import refused, tells
from tests.training.two_tokens import weights_in


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def optimizer_of(model: Any) -> Any:
    """A model's masters, as many as it trains, and their AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    wide = torch.float32
    masters = {p: p if p.dtype == wide else nn.Parameter(p.detach().to(wide)) for p in trained}
    adamw = torch.optim.AdamW(masters.values(), lr=0.5, betas=(0.5, 0.75))
    for p in masters.values():
        parts = ("exp_avg", "exp_avg_sq")
        adamw.state[p] = {"step": torch.zeros(())} | {part: torch.zeros_like(p) for part in parts}

    def state() -> dict[str, torch.Tensor]:
        named = ((n, adamw.state[masters[p]]) for n, p in model.named_parameters() if p in masters)
        return {f"{name}/{key}": t for name, own in named for key, t in own.items()}

    return SimpleNamespace(masters=masters, adamw=adamw, state=state)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (2, [["8"], ["8", "9"], ["10", "9"], ["10", "11"]]),
        (1, [["8"], ["9"], ["10"], ["11"]]),
        (0, [["8"], ["9"], ["10"], ["11"]]),
        (9, [["8"], ["8", "9"], ["10", "8", "9"], ["10", "11", "8", "9"]]),
    ],
)
def test_the_newest_stay(keep: int, left: list[list[str]], tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep)
    for step, expected in enumerate(left):
        progress = Progress("rl", step, taken={"warm": 8})
        made = manager.save(nn.Linear(1, 1), None, progress)
        assert names(tmp_path) == [f"step-{name}" for name in expected]
        assert manager.load() == (made, progress)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Trained weights, AdamW's moments and the progress; nothing that is frozen."""
    model, manager = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), CheckpointManager(tmp_path, 2)
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    model[1].weight.grad, model[1].bias.grad = torch.full((1, 1), 3.0), torch.full((1,), -2.0)
    optimizer.adamw.step()
    trained = {f"1.{name}": p.detach().clone() for name, p in model[1].named_parameters()}
    progress = Progress("hard", 3, {"easy": 2}, True, {"hard": {"drawn": 7}}, {"before": None})
    progress.seconds, progress.elapsed, progress.records = {"x": 1.5}, 2.5, {"m": 9}
    path = manager.save(model, optimizer, progress, lambda f: save_file({}, f / "more.safetensors"))
    assert names(path) == ["manifest.json", "more.safetensors", "tensors"]
    assert weights_in(path) == trained

    other = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    other[0].requires_grad_(False)
    frozen = other[0].weight.clone()
    fresh = optimizer_of(other)
    assert CheckpointManager(tmp_path, 2).load() == (path, progress)
    manager.restore_model(path, other)
    manager.restore_optimizer(path, other, fresh)
    assert torch.equal(other[0].weight, frozen)
    assert other[1].weight.item() == trained["1.weight"].item()
    # Half of the gradient, and a quarter of its square.
    for parameter, mean, square in ((other[1].weight, 1.5, 2.25), (other[1].bias, -1.0, 1.0)):
        state = fresh.adamw.state[parameter]
        found = state["step"].item(), state["exp_avg"].item(), state["exp_avg_sq"].item()
        assert found == (1, mean, square)
    assert set(fresh.adamw.state) == {other[1].weight, other[1].bias}


@pytest.mark.parametrize("wrote", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reads", [torch.float32, torch.bfloat16])
def test_checkpoints_hold_masters_and_are_read_in_any_dtype(
    wrote: torch.dtype, reads: torch.dtype, tmp_path: Path
) -> None:
    third = torch.tensor([[1 / 3]])
    model, manager = nn.Linear(1, 1, bias=False).to(wrote), CheckpointManager(tmp_path, 1)
    optimizer = optimizer_of(model)
    with torch.no_grad():
        optimizer.masters[model.weight].copy_(third)
        model.weight.copy_(third)
    path = manager.save(model, optimizer, Progress())
    assert torch.equal(weights_in(path)["weight"], third)

    other = nn.Linear(1, 1, bias=False).to(reads)
    fresh = optimizer_of(other)
    manager.restore_model(path, other)
    manager.restore_optimizer(path, other, fresh)
    assert torch.equal(other.weight, third.to(reads))
    assert torch.equal(fresh.masters[other.weight], third)


@pytest.mark.parametrize(
    ("other", "named"),
    [(nn.Linear(3, 1), "weight is (1, 2)"), (nn.Linear(2, 1, bias=False), "bias is (1,)")],
)
def test_another_model_s_checkpoint_is_refused(
    other: nn.Module, named: str, tmp_path: Path
) -> None:
    manager = CheckpointManager(tmp_path, 2)
    path = manager.save(nn.Linear(2, 1), None, Progress())
    with refused(path, named, "config.toml", "[model]", "--overwrite"):
        manager.restore_model(path, other)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: events.append("synced"))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("named"), replace(*a)))
    CheckpointManager(tmp_path, 2).save(nn.Linear(2, 1), None, Progress())
    # The weights as they are written, every file and both folders, and the folder that has the new name.
    assert events == [*["synced"] * 5, "named", "synced"]


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path / "none", 2).load() is None


def test_checkpoints_of_an_earlier_version_are_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "000001").mkdir()
    with refused(tmp_path, "--overwrite"):
        CheckpointManager(tmp_path, 2).load()


def test_checkpoints_of_format_1_are_read(tmp_path: Path) -> None:
    """Whole tensors in the checkpoint's own folder, beside the groups of each process, whose names are the same."""
    path, manager = tmp_path / "step-3", CheckpointManager(tmp_path, 2)
    path.mkdir()
    third = torch.tensor([[1 / 3]])
    state = {"step": torch.tensor(3.0), "exp_avg": third + 1, "exp_avg_sq": third + 2}
    save_file({"weight": third}, path / "model.safetensors")
    named = {f"weight/{key}": tensor for key, tensor in state.items()}
    save_file(named, path / "optimizer.safetensors")
    for name, steps in (("overflow-0", 2), ("buffer-0", 5)):
        save_file(
            {"0/lengths": torch.zeros(steps, dtype=torch.int64)}, path / f"{name}.safetensors"
        )
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    manifest = {"format": 1, "files": files, "progress": {"stage": "rl", "step": 3}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = optimizer_of(model)
    assert manager.load() == (path, Progress("rl", 3))
    manager.restore_model(path, model)
    manager.restore_optimizer(path, model, optimizer)
    assert torch.equal(model.weight, third.bfloat16())
    master = optimizer.masters[model.weight]
    assert torch.equal(master, third)
    for key, tensor in optimizer.adamw.state[master].items():
        assert torch.equal(tensor, state[key])


def test_damaged_checkpoints_of_later_steps_give_way(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    for step in (1, 2, 9):
        manager.save(nn.Linear(1, 1), None, Progress("rl", step))
    file_of(tmp_path / "step-9").unlink()
    again = CheckpointManager(tmp_path, 2)
    assert again.load() == (tmp_path / "step-2", Progress("rl", 2))
    again.save(nn.Linear(1, 1), None, Progress("rl", 3))
    assert names(tmp_path) == ["step-2", "step-3"]


def test_the_best_is_linked_also_after_a_crash_in_linking(tmp_path: Path) -> None:
    """And the weights are written once, whatever is measured behind them."""
    manager = CheckpointManager(tmp_path, 1)
    path = manager.save(nn.Linear(1, 1), None, Progress("rl", 1))
    written = file_of(path).stat().st_mtime_ns
    (tmp_path / ".best.tmp").symlink_to("step-1", target_is_directory=True)
    later = Progress("after", 0, {"rl": 1}, best={"step": 1, "value": 0.5})
    assert manager.save(nn.Linear(1, 1), None, later) == path
    assert file_of(path).stat().st_mtime_ns == written
    assert names(tmp_path) == ["best", "step-1"] and manager.load() == (path, later)
    manager.save(nn.Linear(1, 1), None, Progress("rl", 2, best={"step": 1, "value": 0.5}))
    manager.save(nn.Linear(1, 1), None, Progress("rl", 3, best={"step": 3, "value": 0.6}))
    assert names(tmp_path) == ["best", "step-3"] and (tmp_path / "best").resolve().name == "step-3"


def file_of(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("tensors/*.safetensors")
    return file


def corrupt_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: os.truncate(file_of(c), 100),
        lambda c: file_of(c).unlink(),
        lambda c: corrupt_header(file_of(c)),
        lambda c: (c / "manifest.json").write_text("no json"),
        lambda c: (c / "manifest.json").write_text("[]"),
        lambda c: (c / "manifest.json").write_text('{"files": [], "progress": {}}'),
        lambda c: (c / "manifest.json").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, manager = nn.Linear(2, 2), CheckpointManager(tmp_path, 9)
    optimizer = optimizer_of(model)
    model(torch.ones(2)).sum().backward()
    optimizer.adamw.step()
    before, newest = (manager.save(model, optimizer, Progress("rl", step)) for step in (1, 2))
    damage(newest)
    with caplog.at_level(logging.WARNING, "perl.training.saving.checkpoint"):
        assert manager.load() == (before, Progress("rl", 1))
    tells(caplog.text, newest)
    damage(before)
    with refused(tmp_path, "--overwrite"):
        manager.load()
