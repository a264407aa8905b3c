"""Atomic checkpoints: trained weights, optimizer and progress, in safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perl.files import check_safetensors, replacing
from perl.model.sources import FORMAT, MANIFEST, checkpoints_in, read_manifest, step_of
from perl.training.optimizer import Optimizer
from perl.types import UserError

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come; JSON-able."""

    stage: str = ""
    """The point where the run stands (see `perl.recipe.points`); empty: at its start."""
    step: int = 0
    """Steps of that stage that are complete."""
    taken: dict[str, int] = field(default_factory=dict)
    """Steps of the stages that are over, by name."""
    ended: bool = True
    """Whether what follows the last of them, an evaluation that is due, has been done too."""
    streams: dict[str, Any] = field(default_factory=dict)
    """Position in the data, by stage."""
    results: dict[str, Any] = field(default_factory=dict)
    """Evaluations so far: before, after."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent, by stage of the work."""
    elapsed: float = 0.0
    """Seconds of training so far, including those before a resume."""
    best: dict[str, float] = field(default_factory=dict)
    """Of all evaluations the best by `run.keep_best`: its `value`, and `step`, the steps of all stages before it."""
    stale: int = 0
    """Evaluations of this stage since then."""
    records: dict[str, int] = field(default_factory=dict)
    """Lengths of metrics.jsonl and rollouts.jsonl."""

    @property
    def steps(self) -> int:
        """Complete steps of all stages together, each with the weights of its own."""
        return sum(self.taken.values()) + self.step


class CheckpointManager:
    """Saves and restores the checkpoints of one run.

    They lie in `step-N`, N the steps of all stages together. Between two steps only the progress changes: the evaluation
    behind a stage leaves the weights, and so the checkpoint, as they are.

    Args:
        folder: where the checkpoints lie, one sub-folder each.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = max(1, keep)
        self._present: Path | None = None
        """The checkpoint of the weights as they are now."""

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        progress: Progress,
        more: Callable[[Path], None] = lambda _: None,
    ) -> Path:
        """Write a checkpoint beside the others and rename it into place when it is complete.

        `more` may write further safetensors files into the folder it is given.
        """
        from safetensors.torch import save_file

        target = self.folder / f"step-{progress.steps}"
        if target == self._present:
            write_progress(target, progress)
            self._tidy(progress)
            return target
        # Whatever is killed in the block leaves no folder of that name: a checkpoint that is there is whole.
        with replacing(target, folder=True) as temporary:
            masters = optimizer.masters if optimizer else {}
            weights = {n: masters.get(p, p).detach().contiguous() for n, p in _trained(model)}
            save_file(weights, temporary / "model.safetensors")
            if optimizer is not None:
                save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
            more(temporary)
            # Sizes tell a file that a full disk or a crash has cut, without reading gigabytes.
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            manifest = {"format": FORMAT, "files": files, "progress": asdict(progress)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            _sync(temporary)
        self._present = target
        # Only now, so that at every moment one that is whole lies there.
        self._tidy(progress)
        return target

    def _tidy(self, progress: Progress) -> None:
        """Leave the newest checkpoints and the best one. What is of later steps was damaged: the run went on before it."""
        found = checkpoints_in(self.folder)
        earlier = [path for path in found if step_of(path) <= progress.steps]
        kept = {*earlier[-self.keep :]}
        if progress.best:
            best = self.folder / f"step-{progress.best['step']:.0f}"
            kept.add(best)
            with replacing(self.folder / "best") as link:
                link.symlink_to(best.name, target_is_directory=True)
        for old in {*found} - kept:
            shutil.rmtree(old)

    def load(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint that is whole, or None if there never was one.

        Raises:
            UserError: there are checkpoints and every one is damaged, or they are of another version.
        """
        found = checkpoints_in(self.folder)[::-1]
        if not found and self.folder.is_dir() and any(self.folder.glob("[0-9]*")):
            raise UserError(
                f"{self.folder} has checkpoints of an earlier version, which this one does not read; use that version, "
                "or start again with --overwrite"
            )
        for path in found:
            try:
                progress = _verified(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
                continue
            self._present = path
            return path, progress
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged; start again with --overwrite"
            )
        return None

    def restore_model(self, path: Path, model: nn.Module) -> None:
        """Put a checkpoint's weights back, rounded where the model's are narrower."""
        from safetensors.torch import load_file

        weights = load_file(path / "model.safetensors")
        own = model.state_dict()
        if weights.keys() != dict(_trained(model)).keys() or any(
            own[name].shape != tensor.shape for name, tensor in weights.items()
        ):
            raise UserError(
                f"checkpoint {path} is of another model than config.toml says; "
                "put the settings under [model] back, or start again with --overwrite"
            )
        model.load_state_dict(weights, strict=False)

    def restore_optimizer(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Put a checkpoint's optimizer state back, and what its weights were before they were rounded."""
        from safetensors.torch import load_file

        parameters, adamw = dict(_trained(model)), optimizer.adamw
        if any(master is not weight for weight, master in optimizer.masters.items()):
            for name, tensor in load_file(path / "model.safetensors").items():
                optimizer.masters[parameters[name]].data.copy_(tensor)
        for full, tensor in load_file(path / "optimizer.safetensors").items():
            name, key = full.rsplit("/", 1)
            master = optimizer.masters[parameters[name]]
            # AdamW keeps its step counter on the host unless it is fused, its moments beside the weights.
            there = "cpu" if key == "step" and not adamw.defaults["fused"] else master.device
            adamw.state[master][key] = tensor.to(there)


def write_progress(path: Path, progress: Progress) -> None:
    """Say of a whole checkpoint how far the run has come since, with the same weights."""
    manifest = read_manifest(path) | {"progress": asdict(progress)}
    with replacing(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync_file(temporary)


def _verified(path: Path) -> Progress:
    manifest = read_manifest(path)
    for name, size in manifest["files"].items():
        actual = (path / name).stat().st_size
        if actual != size:
            raise ValueError(f"{name} has {actual} bytes instead of {size}")
        check_safetensors(path / name)
    return Progress(**manifest["progress"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What training changes; frozen weights are where the model came from. Tied ones are named once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    out = {}
    for name, parameter in _trained(model):
        for key, value in optimizer.adamw.state.get(optimizer.masters[parameter], {}).items():
            out[f"{name}/{key}"] = torch.as_tensor(value).contiguous()
    return out


def _sync(folder: Path) -> None:
    """Make the files reach the disk before the rename does."""
    for path in folder.iterdir():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
