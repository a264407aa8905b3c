"""Revisions of this repository as folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perl.types import UserError

ROOT = Path(__file__).resolve().parents[2]


def commit_of(revision: str) -> str:
    """The full hash of a branch, a tag, a hash or `HEAD~3`.

    Raises:
        UserError: this is no git checkout, or has no such commit.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        reason = "" if not top.returncode else f" ({_last(top.stderr)})"
        raise UserError(f"{ROOT} is not a git checkout{reason}: revisions cannot be compared")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise UserError(f"{revision}: no such revision; give a branch, a tag, a hash or HEAD~1")
    return found.stdout.strip()


def working_tree() -> str:
    """The name of what lies in the folder now."""
    return f"working tree ({_git('describe', '--always', '--dirty').stdout.strip()})"


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary working tree of `commit`, without hooks; nothing of it stays, in `.git` neither."""
    with tempfile.TemporaryDirectory(prefix="perl-compare-") as folder:
        tree = Path(folder) / "tree"
        try:
            options = ["--detach", "--quiet", str(tree), commit]
            added = _git("-c", "core.hooksPath=/dev/null", "worktree", "add", *options)
            if added.returncode:
                raise UserError(f"git cannot check out {commit[:10]}: {_last(added.stderr)}")
            yield tree
        finally:
            if _git("worktree", "remove", "--force", str(tree)).returncode:
                shutil.rmtree(tree, ignore_errors=True)
                _git("worktree", "prune")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Within a hook, git's variables name the repository and the index that the hook is about.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("git is not installed: revisions cannot be compared") from error


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
