"""The folder of a profile: whole or not there, and never in the place of anything else."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perl.distributed import on_main_process, process_state
from perl.files import is_main_process
from perl.types import UserError

RESULT = "profile.json"
_OURS = r"profile\.json|config\.toml|trace[-\w]*\.json\.gz"
"""Names of what a profile leaves."""


def several_processes() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def profile_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder of all processes that takes the place of `output` when the block ends well in all of them.

    A link as output stays one: the folder takes the place of what it points to.

    Args:
        output: where the profile is to be.
        overwrite: whether it may replace an earlier one.

    Raises:
        UserError: something lies there, before the block or after it; what has come meanwhile stays, and the
            message says where the profile is instead.
    """
    target = output.resolve()
    token = _agreed(secrets.token_hex(4))
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    aside = target.with_name(f".{target.name}.{token}.old")

    def begin() -> None:
        _check(target, output, overwrite)
        temporary.mkdir(parents=True)

    def finish() -> None:
        try:
            _check(target, output, overwrite)
        except UserError as error:
            kept = target.with_name(f"{target.name}-{token}")
            temporary.rename(kept)
            raise UserError(
                f"{error}; this came during the run, whose profile is in {kept}"
            ) from None
        try:
            if target.exists():
                target.rename(aside)
            temporary.rename(target)
        except BaseException:
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise
        if aside.exists():
            shutil.rmtree(aside)

    on_main_process(begin)
    try:
        yield temporary
        if several_processes():
            process_state().wait_for_everyone()
        on_main_process(finish)
    finally:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)


def _agreed(token: str) -> str:
    """That of the first process."""
    if not several_processes():
        return token
    from accelerate.utils import broadcast_object_list

    process_state()
    return broadcast_object_list([token])[0]


def _check(target: Path, output: Path, overwrite: bool) -> None:
    """Refuse to write where something else lies."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {output} is a file; choose another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--output {output} is already there: replace it with --overwrite, or choose another"
        )
    names = {path.name for path in target.iterdir()}
    if RESULT not in names or any(not re.fullmatch(_OURS, name) for name in names):
        raise UserError(
            f"--output {output} holds something else than a profile, so --overwrite leaves it alone; "
            "choose another"
        )
