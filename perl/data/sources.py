"""Rows of files, saved folders and hub data sets, read one at a time."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import resource
from pathlib import Path
from typing import Any

from perl.data.readers import (
    COMPRESSED,
    FILE_TYPES,
    ArrowRows,
    Several,
    Source,
    as_pattern,
    open_file,
    open_parquet,
)
from perl.files import offline_if_unreachable
from perl.types import UserError, one_line

log = logging.getLogger(__name__)

_NAMED = re.compile(r"([^:]+)(?::([^:\[\]]+))??(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?")
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev")}


def open_source(source: str, split: str) -> Source:
    """The rows behind a path or a hub name; raises UserError if there are none.

    `source` is a file of FILE_TYPES, JSON and CSV also compressed; a folder that `datasets` saved or can load,
    or a data set on the hub, each with `[:config][:split]` behind its name; a pattern such as `data/*.jsonl`; or several of
    these with commas, one after the other. Without its own split a data set with several gives `split`, and for `test` its
    validation split where there is no test.
    """
    parts = [source] if Path(source).expanduser().exists() else source.split(",")
    sources = [found for part in parts if part for found in _open_part(part, split)]
    if not sources:
        raise UserError(f"'{source}' names no data; give files with commas between them")
    return sources[0] if len(sources) == 1 else Several(source, sources)


def _open_part(source: str, split: str) -> list[Source]:
    try:
        sources = _found(source, split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read the data set {source}: {_with_cause(error)}; check the name and the file"
        ) from error
    for each in sources:
        if len(each) == 0:
            raise UserError(f"{each.name}: the data set is empty; give one with rows")
    return sources


def _found(source: str, split: str) -> list[Source]:
    path = Path(source).expanduser()
    if path.is_file():
        return [open_file(path)]
    if path.is_dir():
        return [_open_folder(path, None, None, split)]
    name, config, own_split = _named(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [_open_folder(folder, config, own_split, split)]
    if not glob.has_magic(name):
        return [_open_hub(source, split)]
    names = sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True)))
    if not names:
        raise UserError(f"no file fits {source} ({os.path.abspath(path)}); {_there(path)}")
    one_folder = len({os.path.dirname(name) for name in names}) == 1
    if one_folder and all(name.endswith(".parquet") for name in names):
        return [open_parquet(source, names)]  # All at once: they may be thousands.
    # Each of the others stays open, several times in a run; usual are 1,024 files in all.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return [open_file(Path(name)) for name in names]


def _open_folder(path: Path, config: str | None, own_split: str | None, split: str) -> Source:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    saved = _is_saved(path)
    if saved and config:
        raise UserError(f"{path} was saved by datasets and has no config {config}; leave it out")
    if saved:
        found: Any = datasets.load_from_disk(str(path))
    else:
        try:
            found = datasets.load_dataset(str(path), config)
        except DatasetGenerationError:
            _find_malformed(path)
            raise
    if own_split and own_split in (found if isinstance(found, dict) else ()):
        found = found[own_split]
    elif own_split:
        names = ", ".join(found) if isinstance(found, dict) else "one without a name"
        raise UserError(f"{path}:{own_split}: there is no such split, only {names}")
    name = f"{path}:{own_split}" if own_split else str(path)
    return ArrowRows(name, Path(os.path.abspath(path)), _choose_split(found, split, str(path)))


def _find_malformed(folder: Path) -> None:
    """Raise the UserError that names the first malformed line of the folder's JSON Lines files, which `datasets` does not."""
    for file in sorted(folder.rglob("*.jsonl")):
        rows = open_file(file)
        for i in range(len(rows)):
            rows.row(i)


def _with_cause(error: BaseException) -> str:
    """An error and what it comes from: that of `datasets` says only that there was one."""
    told = f"{type(error).__name__}: {one_line(error, 300)}"
    return f"{told}, from {_with_cause(error.__cause__)}" if error.__cause__ else told


def _is_saved(folder: Path) -> bool:
    """By `save_to_disk` of `datasets`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _named(source: str) -> tuple[str, str | None, str | None]:
    """A name with its config and split."""
    match = _NAMED.fullmatch(source)
    return match.groups() if match else (source, None, None)  # type: ignore[return-value]


def _open_hub(source: str, split: str) -> Source:
    name, config, own_split = _named(source)
    packed = [kind + end for kind in FILE_TYPES for end in ("", *COMPRESSED)]
    is_file = name.lower().endswith(tuple(packed))
    if name.startswith((".", "/", "~")) or is_file or name.count("/") > 1 or ":" in name:
        path = Path(name).expanduser()
        raise UserError(
            f"there is no file or folder {source} ({os.path.abspath(path)}); {_there(path)}"
        )
    offline_if_unreachable()
    import datasets
    from datasets import config as settings

    log.info("reading %s from the hub", source)
    try:
        found: Any = datasets.load_dataset(name, config, split=own_split)
    except OSError as error:  # A DatasetNotFoundError, or no connection
        raise UserError(
            f"there is no file or folder {source} ({os.path.abspath(name)}), and on the hub "
            f"{type(error).__name__}: {one_line(error)}; {_there(Path(name))}"
        ) from error
    # Images stored as paths lie in the download cache, and nowhere else.
    root = Path(os.path.abspath(Path(settings.HF_CACHE_HOME).expanduser()))
    return ArrowRows(source, root, _choose_split(found, split, source))


def _there(path: Path) -> str:
    """What to do about a path that is not there: what its nearest folder has instead."""
    parents = [
        p for p in Path(os.path.abspath(path)).parents if p.is_dir() and not glob.has_magic(str(p))
    ]
    names = sorted(p.name for p in parents[0].iterdir())
    missing = Path(os.path.abspath(path)).relative_to(parents[0]).parts[0]
    near = difflib.get_close_matches(missing, names, n=1)
    if near:
        return f"did you mean {parents[0] / near[0]}?"
    few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    return f"correct the path: {parents[0]} has {few}"


def _choose_split(found: Any, split: str, where: str) -> Any:
    if not isinstance(found, dict):
        return found
    for name in _SPLITS[split]:
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise UserError(
        f"{where} has the splits {', '.join(found)} but no {split}; name one, as in {where}:SPLIT"
    )


def is_streamable(source: str) -> bool:
    """Whether rows can be read as they come: those of the hub, of Parquet, of a folder that `datasets` did not save. All
    others can be had by number without reading them first."""
    folder, files = _places(source)
    if folder.is_dir():
        return not _is_saved(folder)
    return all(file.endswith(".parquet") for file in files)


def open_streamed(source: str, split: str) -> tuple[str, Path, Any]:
    """The name, the root of image paths and the rows of a data set that is read as it comes, images not decoded.

    Raises:
        UserError: it cannot be read, or not so.
    """
    import datasets

    if not is_streamable(source):
        raise UserError(
            f"data.streaming: {source} is read row by row as it is; leave data.streaming out (it is for hub data sets, "
            "folders and Parquet)"
        )
    name, config, own_split = _named(source)
    folder, files = _places(source)
    try:
        if files and not folder.is_dir():
            patterns = [as_pattern(file) for file in files]
            rows: Any = datasets.load_dataset(
                "parquet", data_files=patterns, split="train", streaming=True
            )
            root = Path(os.path.abspath(files[0])).parent
        else:
            if folder.is_dir():
                name = str(folder)
            else:
                offline_if_unreachable()
            rows = datasets.load_dataset(name, config, split=own_split, streaming=True)
            root = Path(os.path.abspath(folder))
    except Exception as error:
        raise UserError(
            f"cannot stream the data set {source} ({os.path.abspath(folder)}, or on the hub): "
            f"{_with_cause(error)}; {_there(folder)}"
        ) from error
    return source, root, _choose_split(rows, split, source).decode(False)


def _places(source: str) -> tuple[Path, list[str]]:
    """The folder that a source may be, and the files that it may be."""
    path = Path(source).expanduser()
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    return Path(_named(source)[0]).expanduser(), files
