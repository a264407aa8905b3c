"""Atomic checkpoints: trained weights, optimizer and progress, in safetensors and JSON, never pickle.

All processes write what they hold, by PyTorch's distributed checkpoints; any number of them, sharded or not, reads it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from perl.distributed import Processes, second_group
from perl.files import beside, replacing
from perl.model.sources import (
    FORMAT,
    MANIFEST,
    TENSORS,
    check_files,
    checkpoints_in,
    first_cause,
    read_manifest,
    read_tensors,
    step_of,
    stored_shapes,
)
from perl.training.optimizer import Optimizer
from perl.types import UserError

logger = logging.getLogger(__name__)

_FILE_BYTES = 2**28
"""Of a file that a process writes, about: it lies in memory twice more until it is written."""


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
        processes: of the run, all of which save together; None: there is one.
        asynchronous: whether `save` waits for no more than the copy of the tensors to the host. The disk is waited for by the
            next one and by `wait`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        processes: Processes | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.folder = folder
        self.keep = max(1, keep)
        self.processes = processes
        self.asynchronous = asynchronous
        self.present: Path | None = None
        """The checkpoint of the weights as they are now."""
        self._writer = ThreadPoolExecutor(1) if asynchronous else None
        self._pending: Future[None] | None = None
        # What processes agree on in the background must not meet the reductions of the step that goes on.
        self._group = second_group() if asynchronous else None

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        progress: Progress,
        more: Callable[[Path], None] = lambda _: None,
        alone: bool = False,
    ) -> Path:
        """Write a checkpoint beside the others and rename it into place when it is complete.

        Args:
            model: whose trained weights are saved.
            optimizer: of these weights, if its state is.
            progress: as it is now.
            more: may write further safetensors files into the folder it is given; called by the first process.
            alone: the first process saves without the others, which it cannot with weights in shards.

        Raises:
            Exception: it could not be written, or the one before it, if that was not waited for.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        self.wait(alone)
        target = self.folder / f"step-{progress.steps}"
        first = self.processes is None or self.processes.index == 0
        if target == self.present:
            with self._agreed(alone):
                if first:
                    write_progress(target, progress)
                    self._tidy(progress)
            return target
        background = None if alone else self._writer
        with ExitStack() as ending:
            # The folder is there before any process writes.
            with self._agreed(alone):
                if first:
                    ending.enter_context(self._committed(target, progress, more))
            connected = torch.distributed.is_initialized() and not alone
            state = _state(model, optimizer) if first or connected else {}
            writer = HuggingFaceStorageWriter(
                str(beside(target) / TENSORS), _files(state), save_distributed=True
            )
            if connected and self.processes:
                state = _dealt(state, self.processes)
            if background:
                # Memory may not suffice in one process alone: the others would wait for it in the background.
                with self._agreed(alone):
                    state = writer.stage(state)
            write = partial(
                save,
                state,
                storage_writer=writer,
                process_group=self._group if background else None,
                no_dist=not connected,
            )
            finish = partial(_finish, ending.pop_all(), write)
        if background:
            self._pending = background.submit(finish)
        else:
            with self._agreed(alone):
                if first or connected:
                    finish()
        self.present = target
        return target

    def wait(self, alone: bool = False) -> None:
        """Until the last checkpoint is complete; all processes wait together, if none is `alone`.

        Raises:
            Exception: it could not be written.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            with self._agreed(alone):
                pending.result()
        except Exception:
            self.present = None
            raise
        finally:
            if pending.done():
                self._pending = None

    def _agreed(self, alone: bool) -> AbstractContextManager[None]:
        return nullcontext() if alone or self.processes is None else self.processes.jointly()

    @contextmanager
    def _committed(
        self, target: Path, progress: Progress, more: Callable[[Path], None]
    ) -> Iterator[None]:
        """A block in which all processes write their tensors; what ends it early leaves no folder of that name."""
        # As it is now: what is written in the background must not tell of later steps.
        now = Progress(**json.loads(json.dumps(asdict(progress))))
        with replacing(target, folder=True) as temporary:
            more(temporary)
            yield
            files = (p for p in sorted(temporary.rglob("*")) if p.is_file())
            sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
            manifest = {"format": FORMAT, "files": sizes, "progress": asdict(now)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            # Before the rename reaches the disk.
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
        _sync(self.folder)
        # Only now, so that at every moment one that is whole lies there.
        self._tidy(now)

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
                check_files(path)
                progress = Progress(**read_manifest(path)["progress"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
                continue
            self.present = path
            return path, progress
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged; start again with --overwrite"
            )
        return None

    def restore_model(self, path: Path, model: nn.Module) -> None:
        """Put a checkpoint's weights back, rounded where the model's are narrower; all processes, each its shards.

        Raises:
            UserError: it is of another model; nothing has changed.
        """
        check_weights(path, model)
        read_tensors(path, {name: p.detach() for name, p in _trained(model)})

    def restore_optimizer(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Put a checkpoint's optimizer state back, and what its weights were before they were rounded."""
        state = _state(model, optimizer)
        # Earlier versions left out the state of weights that had had no gradient yet.
        read_tensors(
            path, {name: state[name] for name in state.keys() & stored_shapes(path).keys()}
        )


def check_weights(path: Path, model: nn.Module) -> None:
    """Raise UserError if a checkpoint is of another model; the message names the first weight that differs."""
    own: dict[str, Any] = {name: p.shape for name, p in _trained(model)}
    stored: dict[str, Any] = {n: s for n, s in stored_shapes(path).items() if "/" not in n}
    for name in {**own, **stored}:
        there, here = (tuple(s[name]) if name in s else "not there" for s in (stored, own))
        if there != here:
            raise UserError(
                f"checkpoint {path} is of another model than config.toml says: {name} is {there} in it and {here} in the "
                "model; put the settings under [model] back, or start again with --overwrite"
            )


def write_progress(path: Path, progress: Progress) -> None:
    """Say of a whole checkpoint how far the run has come since, with the same weights."""
    manifest = read_manifest(path) | {"progress": asdict(progress)}
    with replacing(path / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(temporary)


def in_shards(model: nn.Module) -> bool:
    """Whether no process has all of the weights."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What training changes; frozen weights are where the model came from. Tied ones are named once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, as they lie in memory: DTensors where they are in shards."""
    masters = optimizer.masters if optimizer else {}
    weights = {name: masters.get(p, p).detach() for name, p in _trained(model)}
    return weights | (optimizer.state() if optimizer else {})


def _dealt(state: dict[str, torch.Tensor], processes: Processes) -> dict[str, torch.Tensor]:
    """What this process saves: its shards, and of what all have its share, so that no two copy the same to the host."""
    whole = {name: t.nbytes for name, t in state.items() if not isinstance(t, DTensor)}
    filled, others = [0] * processes.count, set()
    for name in sorted(whole, key=lambda name: -whole[name]):
        least = filled.index(min(filled))
        filled[least] += whole[name]
        others |= {name} if least != processes.index else set()
    return {name: tensor for name, tensor in state.items() if name not in others}


def _files(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that a process writes a tensor to, or its shard."""
    number, filled, out = 1, 0, {}
    for name, tensor in state.items():
        size = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        out[name], filled = number, filled + size
    return out


def _finish(ending: ExitStack, write: Callable[[], object]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    with ending:
        try:
            write()
        except CheckpointException as error:  # No Exception; all processes have the same.
            raise first_cause(error) from None


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
