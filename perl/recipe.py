"""Recipes: TOML files that become a Config, with an error that names the key for whatever does not fit, and the
stages that a Config asks for."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from perl.config import Config, StageConfig
from perl.config_check import violation
from perl.files import replacing
from perl.types import UserError

_BUNDLED = Path(__file__).parent / "recipes"
STAGE_KINDS = ("cold_start", "filter", "rl")
_TAKEN = ("before", "after", "done", "initial", "final")
"""Names of what lies between stages, and of models that no stage leaves."""


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
    if "stages" in values:
        values["stages"] = read_stages(values["stages"], str(path))
    _check_keys(values, Config, str(path), "")
    config = _validated(values, str(path))
    check_config(config, str(path))
    return config


def check_config(config: Config, where: str = "") -> None:
    """Raise UserError, naming the key, for a value that makes no sense; `where` is the file it stands in."""
    before = f"{where}: " if where else ""
    if wrong := violation(config):
        raise UserError(f"{before}{wrong}")
    for stage in config.stages:
        if wrong := violation(merged(config, stage)):
            raise UserError(f"{before}stage {stage.name}: {wrong}")


def merged(config: Config, stage: StageConfig) -> Config:
    """The config with a stage's own values in place, as the stage runs with it.

    Raises:
        UserError: an unknown key or a value of the wrong type in the stage.
    """
    where = f"stage {stage.name}"
    _check_keys(dict(stage.set), Config, where, "")
    values = _values(config)
    for section, own in stage.set.items():
        values[section] = {**values[section], **own}
    return _validated(values, where)


def without(config: Config, keys: Collection[str]) -> Config:
    """The config with `section.key`s taken out of its stages, so that the common value holds in all of them."""
    stages = tuple(
        dataclasses.replace(
            stage,
            set={
                section: {k: v for k, v in own.items() if f"{section}.{k}" not in keys}
                for section, own in stage.set.items()
            },
        )
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=stages)


def save_config(config: Config, path: Path) -> None:
    """Write every key, so that the file alone repeats the run."""
    with replacing(path) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


def to_toml(config: Config) -> str:
    """Every key that has a value."""
    import tomli_w

    values = _values(config)
    if config.stages:
        values["stages"] = [{"name": s.name, "kind": s.kind, **s.set} for s in config.stages]
    return tomli_w.dumps(values)


def differences(one: Config, other: Config) -> list[str]:
    """Keys whose values are not the same, the run folder left out."""
    mine, others = (
        {s: v for s, v in dataclasses.asdict(c).items() if s != "stages"} for c in (one, other)
    )
    keys = [(section, key) for section, values in mine.items() for key in values]
    found = [f"{s}.{k}" for s, k in keys if mine[s][k] != others[s][k] and (s, k) != ("run", "dir")]
    return [*found, "stages"] if one.stages != other.stages else found


def _values(config: Config) -> dict[str, Any]:
    """Section -> key -> value, without stages and without keys that have no value."""
    return {
        section: {k: v for k, v in keys.items() if v is not None}
        for section, keys in dataclasses.asdict(config).items()
        if section != "stages"
    }


def read_stages(tables: Any, where: str) -> list[dict[str, Any]]:
    """[[stages]] tables as `StageConfig` takes them: everything but name and kind is a section of the stage's own.

    Raises:
        UserError: no list of tables, a name or kind that is missing or cannot be, a section that no stage can change.
    """
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"{where}: stages is a list of tables; write [[stages]] before each")
    out: list[dict[str, Any]] = []
    for number, table in enumerate(tables, start=1):
        name, kind = table.get("name"), table.get("kind")
        at = f"{where}: stage {name or number}"
        if missing := next((k for k in ("name", "kind") if k not in table), None):
            raise UserError(f"{at} has no {missing}; write {missing} = ... below its [[stages]]")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise UserError(f"{at}: name = {name!r} must be lower-case letters, digits, - and _")
        if name in _TAKEN or name in [stage["name"] for stage in out]:
            raise UserError(f"{at}: the name {name} is taken; choose another")
        if kind not in STAGE_KINDS:
            raise UserError(f"{at}: kind = {kind!r} is not one of {', '.join(STAGE_KINDS)}")
        own = {k: v for k, v in table.items() if k not in ("name", "kind")}
        for section in own:
            if section in ("run", "model", "stages"):
                raise UserError(f"{at}: {section} is common to all stages; set it outside of them")
        _check_keys(own, Config, at, "")
        out.append({"name": name, "kind": kind, "set": own})
    return out


def _check_keys(values: dict[str, Any], kind: type, where: str, prefix: str) -> None:
    known = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        if key == "stages":
            continue  # read_stages has looked at them.
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {prefix}{key} is a section; write [{prefix}{key}] and its keys below"
                )
            _check_keys(value, known[key], where, f"{prefix}{key}.")


def _validated(values: dict[str, Any], where: str) -> Config:
    """Strict types by pydantic; through JSON, so that lists may become tuples and nothing else is converted."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: `config` is what it runs with, `first_step` how many steps earlier stages of its kind take."""

    name: str
    kind: str
    config: Config
    first_step: int
    number: int
    """How many stages of its kind come before it."""

    @property
    def steps(self) -> int:
        """Optimizer steps or rollout batches it takes; a filter takes none."""
        return steps_of(self.kind, self.config)


def steps_of(kind: str, config: Config) -> int:
    """Steps of a stage of this kind under a configuration."""
    return {"cold_start": config.cold_start.steps, "rl": config.train.steps}.get(kind, 0)


def plan(config: Config) -> list[Stage]:
    """The stages that a recipe names; without any, a cold start and then RL."""
    named = config.stages or (
        StageConfig(name="cold_start", kind="cold_start"),
        StageConfig(name="rl", kind="rl"),
    )
    stages: list[Stage] = []
    for each in named:
        own = dataclasses.replace(
            merged(config, each) if each.set else config, stages=config.stages
        )
        earlier = [s for s in stages if s.kind == each.kind]
        first = sum(s.steps for s in earlier)
        stages.append(Stage(each.name, each.kind, own, first, len(earlier)))
    return stages


def points(stages: Sequence[Stage]) -> list[str]:
    """Where a run can stand: in a stage, in the evaluation before RL, after an RL stage, or at the end.

    Example: stages warm (cold_start), easy (rl), hard (rl) give
    `["warm", "before", "easy", "after easy", "hard", "after", "done"]`.
    """
    out: list[str] = []
    last = len(stages) - 1
    for i, stage in enumerate(stages):
        if stage.kind == "rl" and "before" not in out:
            out.append("before")
        out.append(stage.name)
        if stage.kind == "rl" and i < last:
            out.append(f"after {stage.name}")
    return [*out, "after", "done"]


def filtered_sources(stage: Stage, stages: Sequence[Stage], folder: Path) -> dict[str, Path]:
    """By data source (see `source_key`) the file that stands for it in a stage: what earlier filter stages left."""
    return {
        source_key(earlier.config.data.train): filtered_file(folder, earlier.name)
        for earlier in stages[: list(stages).index(stage)]
        if earlier.kind == "filter"
    }


def source_key(source: str) -> str:
    """One name for a data source, however its path is written."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def filtered_file(folder: Path, name: str) -> Path:
    """What a filter stage leaves of its data."""
    return folder / "filtered" / f"{name}.jsonl"
