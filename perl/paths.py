"""Local files that a recipe names, written so that it does not matter from which folder it is read."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from glob import iglob
from pathlib import Path
from typing import Any

from perl.config import Config

_PATHS = {
    "data": ("train", "eval", "mix", "image_root"),
    "model": ("path", "chat_template"),
    "reward": ("functions",),
}
"""Keys whose values may be paths or begin with one."""


def with_absolute_paths(config: Config) -> Config:
    """The config with files and folders that are there named from the root."""

    def rooted(section: str, values: dict[str, Any]) -> dict[str, Any]:
        # The name of a function in a module or of ours may be that of a folder too.
        mark = ".py:" if section == "reward" else ""
        return {k: _absolute(v, mark) if k in _PATHS[section] else v for k, v in values.items()}

    changed = {}
    for section in _PATHS:
        own = getattr(config, section)
        values = {f.name: getattr(own, f.name) for f in fields(own)}
        changed[section] = replace(own, **rooted(section, values))
    stages = tuple(
        replace(s, set={k: rooted(k, v) if k in _PATHS else v for k, v in s.set.items()})
        for s in config.stages
    )
    return replace(config, **changed, stages=stages)


def _absolute(value: Any, mark: str) -> Any:
    """A source, model or reward function that begins with a path, or several, with the path made absolute.

    Example: in /home/me `"data/k12.jsonl*0.5"` becomes `"/home/me/data/k12.jsonl*0.5"` if there is such a file. What has no
    `mark` stays as it is.
    """
    if isinstance(value, list | tuple):
        return type(value)(_absolute(v, mark) for v in value)
    if (
        not isinstance(value, str)
        or mark not in value
        or re.match("split:|bundled:(?!folder:)", value)
    ):
        return value
    if "," in value and not Path(value).exists():
        return ",".join(_absolute(v, "") for v in value.split(","))
    scheme = "bundled:folder:" if value.startswith("bundled:folder:") else ""
    if not scheme and value.startswith(("bundled:", "split:")):
        return value
    path = value.removeprefix(scheme)
    ends = [len(path), *(m.start() for m in re.finditer("[:*?[]", path))]
    there = any(path[:end] and Path(path[:end]).exists() for end in ends) or any(iglob(path))
    return f"{scheme}{Path.cwd() / path}" if there else value
