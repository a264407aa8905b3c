"""What has been found of files, kept in the user's cache until they or our code change."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from perl.files import write_json

T = TypeVar("T")

_found: dict[str, Any] = {}


def kept(about: Any, files: Sequence[Path], find: Callable[[], T]) -> T:
    """What `find` gives, JSON-able, or gave before while the files were as they are now; `about` tells it from all else.
    Without files it is known in this process alone."""
    key = _key(about, files)
    if key not in _found:
        file = kept_file(about, files)
        value = read_kept(file)
        if value is None:
            value = find()
            write_kept(file, value)
        _found[key] = value
    return _found[key]


def kept_file(about: Any, files: Sequence[Path]) -> Path | None:
    """Where something is kept; None where there are no files whose change would tell that it no longer holds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perl-rl" / f"{_key(about, files)}.json" if files else None


def read_kept(file: Path | None) -> Any:
    """What is kept there; None: nothing that can be read."""
    try:
        return json.loads(file.read_text()) if file else None
    except (OSError, ValueError):
        return None


def write_kept(file: Path | None, value: Any) -> None:
    if file is None:
        return
    with suppress(OSError):  # A home that cannot be written costs the next start its time.
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)


def _key(about: Any, files: Sequence[Path]) -> str:
    stats = [(str(path.absolute()), path.stat()) for path in files]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps([_code(), stamps, about], default=str).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Of this package: another version may find something else."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
