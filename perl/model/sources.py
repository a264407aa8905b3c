"""What `model.path`, or a command's MODEL, stands for: a model folder, a hub name, a LoRA adapter, a run, or one of its
checkpoints, which hold what training changed. The last three lie over another model, which is found here."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.files import RunFolder, check_safetensors
from perl.lock import holder
from perl.recipe import read_config
from perl.types import UserError, one_line

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.api import CheckpointException

FORMAT = 2
"""Of the checkpoints that this version writes and the highest that it reads."""
MANIFEST = "manifest.json"
TENSORS = "tensors"
"""Folder of a checkpoint's weights and optimizer state, a safetensors file or more of each process that saved it."""
ADAPTER = "adapter"
"""Folder of the adapter in the model that it is merged into."""
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_COMPANIONS = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    "special_tokens_map.json",
)
"""Files that one version of transformers or vLLM writes and another one looks for."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, by their steps."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps of all stages that lie before it."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `format`, `files` with their sizes, `progress`.

    Raises:
        UserError: a later version of this program wrote it.
        OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} is of format {manifest['format']}, and this version reads up to {FORMAT}; "
            "use the version that wrote it, or a later one"
        )
    return manifest


def check_files(checkpoint: Path) -> None:
    """Raise OSError or ValueError, or KeyError for a manifest that is none, if a file of a checkpoint is not as it was
    written; reads no more than tables of contents."""
    for name, size in read_manifest(checkpoint)["files"].items():
        file = checkpoint / name
        # Sizes tell a file that a full disk or a crash has cut, without reading gigabytes.
        if (actual := file.stat().st_size) != size:
            raise ValueError(f"{name} has {actual} bytes instead of {size}")
        check_safetensors(file)


def stored_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Of a checkpoint's tensors: weights by their names in the policy, and of the optimizer's state `NAME/PART`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(_tensors(checkpoint))).read_metadata()
    return {name: entry.size for name, entry in found.state_dict_metadata.items()}


def read_tensors(checkpoint: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into these, rounded where they are narrower; of DTensors each process reads its shards.

    No process waits for another, and nothing is unpickled: the files are safetensors, and what their headers say of
    shards is JSON.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(_tensors(checkpoint)))
    try:
        load(dict(into), storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # No Exception.
        raise first_cause(error) from None


def first_cause(error: CheckpointException) -> Exception:
    """What went wrong in the first of the processes that something went wrong in."""
    cause = error.failures[min(error.failures)][0]
    return cause if isinstance(cause, Exception) else RuntimeError(one_line(cause))


def _tensors(checkpoint: Path) -> Path:
    # Format 1 had whole tensors in the checkpoint's own folder.
    inside = checkpoint.expanduser() / TENSORS
    return inside if inside.is_dir() else inside.parent


def is_checkpoint(path: str | Path) -> bool:
    return (Path(path).expanduser() / MANIFEST).is_file()


def is_adapter(path: str | Path) -> bool:
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def run_of(path: str | Path) -> Path | None:
    """The run folder that this is, or whose checkpoint, model or adapter it is; None for any other path."""
    folder = Path(path).expanduser()
    if RunFolder(folder).config.is_file():
        return folder
    model = model_of(folder)
    root = model.parent.parent
    inside = model.parent.name in ("checkpoints", "models") and folder.is_dir()
    return root if inside and RunFolder(root).config.is_file() else None


def model_of(folder: Path) -> Path:
    """The model that an adapter lies in, where a run has left both; of any other folder its absolute path."""
    folder = Path(os.path.abspath(folder))
    return folder.parent if folder.name == ADAPTER else folder


def newest_model(path: str) -> str:
    """Of a run the model that it ended with, or its newest checkpoint while it has not; any other path as it is.

    Of a run of several seeds that of the first.

    Raises:
        UserError: a run without a model yet.
    """
    root = Path(path).expanduser()
    if not path or run_of(path) != root:
        return path
    if seeds := read_config(root / "config.toml").run.seeds:
        root = root / f"seed-{seeds[0]}"
    final, points = root / "models" / "final", {}
    for checkpoint in checkpoints_in(root / "checkpoints"):
        try:
            points[checkpoint] = read_manifest(checkpoint)["progress"]["stage"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # A damaged one; a run goes on from the one before, too.
    newest = next(reversed(points), None)
    if (final / "config.json").is_file() and (newest is None or points[newest] == "done"):
        return str(final)
    if newest is None:
        found = holder(root)
        further = f"wait for {found}" if found else f"go on with perl-rl resume {path}"
        raise UserError(f"{path} has no model yet; {further}")
    return str(newest)


def layers_of(path: str) -> list[str]:
    """The path, what it lies over, and so on down to a model folder or hub name.

    Example: `["runs/x/checkpoints/step-50", "Qwen/Qwen2.5-VL-3B-Instruct"]`.

    Raises:
        UserError: an adapter or a checkpoint that does not tell, or that lies over itself.
    """
    layers = [newest_model(path)]
    while (below := _below(layers[-1])) is not None:
        if below in layers:
            raise UserError(
                f"model.path = {path} lies over itself; correct {below}/{ADAPTER_CONFIG}"
            )
        layers.append(below)
    return layers


def check_layers(layers: Sequence[str]) -> None:
    """Raise UserError if the weights of a checkpoint or an adapter are not whole; reads only their tables of contents."""
    for path in layers:
        folder = Path(path).expanduser()
        file = folder / _ADAPTER_WEIGHTS
        if not is_checkpoint(path) and not file.is_file():
            raise UserError(
                f"model.path = {path} has no {file.name}; copy it, or convert other weights to safetensors"
            )
        try:
            check_files(folder) if is_checkpoint(path) else check_safetensors(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"model.path = {path}: damaged weights ({error}); give the checkpoint before, or copy them again"
            ) from error


def initial_model(root: Path) -> str:
    """What a run's model started from: a tiny one lies in the run folder, others where they were."""
    made = root / "models" / "initial"
    return str(made) if made.is_dir() else read_config(root / "config.toml").model.path


def _below(path: str) -> str | None:
    if is_checkpoint(path):
        root = run_of(path)
        if root is None:
            raise UserError(
                f"{path} is a checkpoint outside of its run folder, whose config.toml says what it was trained from; "
                "put it back into the run's checkpoints/"
            )
        return initial_model(root)
    if not is_adapter(path):
        return None
    try:
        text = (Path(path).expanduser() / ADAPTER_CONFIG).read_text(encoding="utf-8")
        config = json.loads(text)
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.path = {path}: its {ADAPTER_CONFIG} is not peft's ({one_line(error)}); copy it again"
        ) from error
    if kind != "LORA":
        raise UserError(
            f"model.path = {path}: an adapter of peft_type {kind} cannot be merged; give one of LORA"
        )
    if not base or not isinstance(base, str):
        raise UserError(
            f"model.path = {path}: its {ADAPTER_CONFIG} names no model; write a folder or hub name as "
            "base_model_name_or_path"
        )
    return base


def copy_companions(base: str, target: Path) -> None:
    """Of a local or cached model what describes tokenizer and processor and was not written anew."""
    for name in _COMPANIONS:
        if not (target / name).exists() and (found := cached_file_of(base, name)):
            shutil.copyfile(found, target / name)


def cached_file_of(base: str, name: str) -> str | None:
    """A file of a local or cached model."""
    from transformers.utils.hub import cached_file

    return cached_file(
        base,
        name,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
