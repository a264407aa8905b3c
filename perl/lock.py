"""One process at a time works in a run folder: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perl.types import UserError

logger = logging.getLogger(__name__)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a run folder while the block runs. Of several processes of one run the first holds it for all.

    The lock is flock's on a file beside the folder, so that it stays while `--overwrite` renames the folder. NFS passes it
    on to its server; a file system without locks is warned about and used without.

    Raises:
        UserError: another process works in the folder.
    """
    path = _file(root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"run.dir = {root}: {error.filename} is a file; choose another --run.dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES):
            raise OSError(error.errno, error.strerror, str(root)) from error
        logger.warning("%s cannot be locked (%s): start nothing else in it", root, error.strerror)
        yield
        return
    if file is None:
        refuse_if_running(root)
        raise UserError(f"run.dir = {root} was in use just now; try again")
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.write(file, json.dumps(holder).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # Before it is let go: whoever opens it later makes a new one.
        os.close(file)


def refuse_if_running(root: Path) -> None:
    """Raise UserError if a process works in the run folder, naming it."""
    if found := holder(root):
        raise UserError(
            f"run.dir = {root} is in use by {found}; wait until it ends, stop it (it saves itself on the first "
            "Ctrl-C or SIGTERM), or choose another --run.dir"
        )


def holder(root: Path) -> str | None:
    """Which process works in a run folder, in words; None if none does."""
    try:
        file = os.open(_file(root), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            return None
        with suppress(ValueError, KeyError):
            found = json.loads(os.read(file, 4096))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        return "another process"  # It has not written its name yet.
    finally:
        os.close(file)
    return None


def _acquire(path: Path) -> int | None:
    """The locked file; None if another process holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                os.truncate(file, 0)  # What a killed one wrote.
                return file
        except OSError as error:
            os.close(file)
            if error.errno == errno.EWOULDBLOCK:
                return None
            raise
        os.close(file)


def _file(root: Path) -> Path:
    """Of a seed's folder the lock of the whole run."""
    root = root.resolve()
    if re.fullmatch(r"seed-\d+", root.name) and (root.parent / "config.toml").exists():
        root = root.parent
    return root.with_name(f".{root.name}.lock")
