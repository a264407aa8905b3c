"""A run's folder: what lies where, append-only records that resume cuts back, and writes that are whole or not there."""

from __future__ import annotations

import base64
import functools
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from perl.types import UserError

logger = logging.getLogger(__name__)

_HUB_TIMEOUT = 5.0
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SECTIONS = frozenset({"run", "model", "data", "rollout", "reward", "train"})


class RunFolder:
    """Paths of one run, and its two records, `metrics.jsonl` and `rollouts.jsonl`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.metrics = root / "metrics.jsonl"
        self.rollouts = root / "rollouts.jsonl"
        self.images = root / "images"
        self.checkpoints = root / "checkpoints"
        self.models = root / "models"
        self.evaluations = root / "evaluations"
        self.summary = root / "summary.json"
        self.filtered = root / "filtered"

    def check_new(self, overwrite: bool) -> None:
        """Raise UserError if a run cannot begin here: something is there, and no run folder that `overwrite` may replace."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"run.dir = {self.root} is a file; choose another --run.dir")
        if self._is_empty():
            return
        if not overwrite:
            raise UserError(
                f"run.dir = {self.root} is already there: go on with `{resume_command(self.root)}`, "
                "replace it with --overwrite, or choose another --run.dir"
            )
        if not self.is_run():
            raise UserError(
                f"run.dir = {self.root} is no run folder, so --overwrite leaves it alone; "
                "choose another --run.dir"
            )

    def create(self, overwrite: bool) -> None:
        """Make the folder. What `overwrite` replaces lies aside until the new run has begun.

        Raises:
            UserError: see `check_new`.
        """
        self.check_new(overwrite)
        if not self._is_empty():
            self._put_aside()
        self.root.resolve().mkdir(parents=True, exist_ok=True)

    def _is_empty(self) -> bool:
        return not self.root.exists() or not any(self.root.iterdir())

    def _put_aside(self) -> None:
        root = self.root.resolve()
        if self._replaced.exists() and not self.has_begun():
            shutil.rmtree(root)  # What lies aside is worth more than a run that never began.
            return
        shutil.rmtree(self._replaced, ignore_errors=True)
        root.rename(self._replaced)

    @property
    def _replaced(self) -> Path:
        root = self.root.resolve()
        return root.with_name(f".{root.name}.replaced")

    def has_begun(self) -> bool:
        """Whether anything is there that took work, for one seed or several: a checkpoint, a line of a record, questions
        that a filter has measured."""
        parts = [RunFolder(root) for root in (self.root, *self.root.glob("seed-*"))]
        return any(
            any(part.checkpoints.glob("[!.]*"))
            or any(part.positions().values())
            or any(part.filtered.glob("*.jsonl"))
            for part in parts
        )

    def settle(self) -> None:
        """Drop what was replaced if the new run has begun; else drop the new one and put the old back."""
        if self.has_begun():
            shutil.rmtree(self._replaced, ignore_errors=True)
            return
        shutil.rmtree(self.root.resolve(), ignore_errors=True)
        if self._replaced.exists():
            self._replaced.rename(self.root.resolve())

    def keep_trace(self, error: BaseException) -> Path | None:
        """Add the whole trace of an error to `error.log`, which each process has its own of; None if that fails too."""
        rank = int(os.environ.get("RANK", "0"))
        path = self.root / (f"error-{rank}.log" if rank else "error.log")
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), file=file)
                traceback.print_exception(error, file=file)
        except OSError:
            return None
        return path

    def is_run(self) -> bool:
        """Whether a run lives here: its config.toml has the sections of a recipe with every key."""
        try:
            return tomllib.loads(self.config.read_text(encoding="utf-8")).keys() >= _SECTIONS
        except (OSError, ValueError):
            return False

    def append(self, record: Path, row: dict[str, Any]) -> None:
        """Add one line of JSON to a record."""
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(row), allow_nan=False) + "\n")

    def make_parts(self) -> None:
        """The sub-folders of a run of one seed."""
        for folder in (self.images, self.checkpoints, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def positions(self) -> dict[str, int]:
        """Length of both records now; a checkpoint keeps it."""
        return {
            r.name: r.stat().st_size if r.exists() else 0 for r in (self.metrics, self.rollouts)
        }

    def cut_back(self, positions: dict[str, int]) -> None:
        """Drop what was recorded after a checkpoint: resuming writes it again."""
        for record in (self.metrics, self.rollouts):
            if record.exists():
                os.truncate(record, min(positions.get(record.name, 0), record.stat().st_size))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def resume_command(root: Path) -> str:
    """What goes on with a run, by as many processes as this one has."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return f"perl-rl resume {root}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = f" --nnodes {processes // here} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun{nodes * (here < processes)} --nproc-per-node {here} -m perl resume {root}"


def is_main_process() -> bool:
    """Whether this is the first of the processes that `accelerate launch` or torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(value), indent=2) + "\n", encoding="utf-8")


def to_line(row: Mapping[str, Any]) -> str:
    """One line of JSON; bytes become base64, and dates and the like their text."""
    line = json.dumps(row, default=_as_text, ensure_ascii=False)
    # Half of a surrogate pair is valid JSON only as an escape.
    return (json.dumps(row, default=_as_text) if _HALF_PAIR.search(line) else line) + "\n"


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON Lines file; they are with the operating system when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_line(row) for row in rows)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file, if it is there; `{}` for a line that is no JSON object.

    A last line without its end does not count: the process that wrote it was killed.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = {}
            yield row if isinstance(row, dict) else {}


def keep_rows(path: Path, count: int) -> None:
    """Cut a JSON Lines file back to its first `count` lines, so that rows can be appended to it again."""
    with path.open("rb") as file:
        end = sum(len(line) for line in islice(file, count))
    os.truncate(path, end)


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, a new folder if asked for, that takes its place when the block ends well.

    The folder's files get the permissions of the umask: safetensors makes its own for the owner alone.

    Raises:
        OSError: also where safetensors, whose own error only tells the number in its text, cannot write. It names the path.
    """
    temporary = beside(path)
    _remove(temporary)
    if folder:
        temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder:
            for file in (p for p in temporary.rglob("*") if p.is_file()):
                file.chmod(temporary.stat().st_mode & 0o666)
            _remove(path)  # A folder that is there and not empty cannot be replaced in one step.
        os.replace(temporary, path)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        _remove(temporary)


def beside(path: Path) -> Path:
    """Where `replacing` puts what will take the place of a path."""
    return path.with_name(f".{path.name}.tmp")


def _error_number(error: Exception) -> int | None:
    """Of a system's error that does not say which file it was about."""
    if isinstance(error, OSError):
        return error.errno if error.filename is None else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_safetensors(path: Path) -> None:
    """Raise ValueError if a safetensors file is cut or its table of contents is broken; reads only that."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


@functools.cache
def offline_if_unreachable() -> None:
    """Switch to the hub's offline mode where its server does not answer within seconds.

    Its client would try every file six times, half a minute or more each. A proxy is left to the client.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or not url.hostname or {"https", "all"} & getproxies().keys():
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), _HUB_TIMEOUT).close()
    except OSError as error:
        logger.warning("%s cannot be reached (%s); only its cache is used", url.hostname, error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if settings := sys.modules.get("datasets.config"):
            settings.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
