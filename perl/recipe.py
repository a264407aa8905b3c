"""Recipes: TOML files that become a Config, with an error that names the key for whatever does not fit."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from perl.config import Config, violation
from perl.run import replacing
from perl.types import UserError

_BUNDLED = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _BUNDLED.glob("*.toml"))


def load_recipe(name: str) -> Config:
    """A Config from a bundled recipe's name or a TOML file.

    Raises:
        UserError: no such recipe or file, broken TOML, an unknown key, a value of the wrong type or out of range.
    """
    path = Path(name)
    if path.suffix != ".toml":
        bundled = _BUNDLED / f"{name}.toml"
        if not bundled.exists():
            near = difflib.get_close_matches(name, recipe_names(), n=1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"choose {', '.join(recipe_names())}, or give a .toml file"
            )
            raise UserError(f"unknown recipe {name}: {hint}")
        path = bundled
    config = read_config(path)
    if not config.run.dir:
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, dir=f"runs/{path.stem}")
        )
    return config


def read_config(path: Path) -> Config:
    """A Config from one TOML file; keys left out keep their defaults."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"recipe {path} cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error
    _check_keys(values, Config, str(path), "")
    return _validated(values, path)


def check_config(config: Config, where: str = "") -> None:
    """Raise UserError, naming the key, for a value that makes no sense; `where` is the file it stands in."""
    if wrong := violation(config):
        raise UserError(f"{where}: {wrong}" if where else wrong)


def save_config(config: Config, path: Path) -> None:
    """Write every key, so that the file alone repeats the run."""
    with replacing(path) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


def to_toml(config: Config) -> str:
    """Every key that has a value."""
    import tomli_w

    values = {
        section: {k: v for k, v in keys.items() if v is not None}
        for section, keys in dataclasses.asdict(config).items()
    }
    return tomli_w.dumps(values)


def differences(one: Config, other: Config) -> list[str]:
    """Keys whose values are not the same, the run folder left out."""
    mine, others = dataclasses.asdict(one), dataclasses.asdict(other)
    keys = [(section, key) for section, values in mine.items() for key in values]
    return [f"{s}.{k}" for s, k in keys if mine[s][k] != others[s][k] and (s, k) != ("run", "dir")]


def _check_keys(values: dict[str, Any], kind: type, where: str, prefix: str) -> None:
    known = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {prefix}{key} is a section; write [{prefix}{key}] and its keys below"
                )
            _check_keys(value, known[key], where, f"{prefix}{key}.")


def _validated(values: dict[str, Any], path: Path) -> Config:
    """Strict types by pydantic; through JSON, so that lists may become tuples and nothing else is converted."""
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(Config).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key} = {first['input']!r}: {first['msg']}") from error
    check_config(config, str(path))
    return config
