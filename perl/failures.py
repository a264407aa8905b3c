"""What ended a command, in one line for whoever called it."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from perl.types import UserError, one_line

# What the extra `train` installs, by the names they are imported by.
_TRAIN_PACKAGES = {
    *("transformers", "accelerate", "datasets", "huggingface_hub", "tokenizers", "peft"),
    *("safetensors", "sklearn", "scipy", "tensorboard", "matplotlib", "jinja2", "openai"),
}


def explain(error: BaseException) -> str | None:
    """A mistake of the user's, or what the machine lacks, and what to do; None for what is nobody's mistake."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _about_files(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _TRAIN_PACKAGES:
            return f"{package} is not installed; {install_command('train')}"
    if found := re.match(r"(\S+) does not have a deterministic implementation", str(error)):
        return f"run.deterministic: PyTorch has no deterministic {found[1]} on this device; leave it off"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not to be imported here
        return (
            "out of GPU memory: lower train.tokens_per_micro_batch or rollout.kv_cache_tokens, or set "
            "model.gradient_checkpointing; perl-rl resume takes all three"
        )
    return None


def install_command(extra: str) -> str:
    """What installs the packages of an extra, from where this package was installed or runs.

    Example: `pip install '/home/me/perl[train]'` in a clone.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    place, clone = "perl-rl", Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").exists():
        return f"pip install '{clone}[{extra}]'"
    try:
        # PEP 610: there is none where an index was asked for the package by its name.
        record = json.loads(distribution(place).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        record = {}
    url = record.get("url", "")
    if url.startswith("file:"):
        return f"pip install '{unquote(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return f"pip install '{place}[{extra}]{f' @ {url}' if url else ''}'"


def summed_up(error: BaseException, what: str | None = None) -> str:
    """One line: what it is, by default its type and message, and what was noted on it."""
    what = what or f"{type(error).__name__}: {one_line(error)}"
    return "; ".join([what, *getattr(error, "__notes__", ())])


def _about_files(error: OSError) -> str:
    """What a disk, a folder or a file would not do, and what helps."""
    what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}; free some space"
    return f"{what}; choose a folder or file that can be read and written (--debug shows where)"
