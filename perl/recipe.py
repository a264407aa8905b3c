"""Recipes: TOML files that become a Config, with an error that names the key for whatever does not fit, and the
stages that a Config asks for."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from perl.config import (
    INSTRUCTIONS,
    Command,
    Config,
    DataConfig,
    StageConfig,
    names_of,
    part_name,
    places_of,
)
from perl.files import replacing
from perl.types import IMAGE_SLOT, UserError

_BUNDLED = Path(__file__).parent / "recipes"
_SPLIT = "split:"
DEFAULT_RECIPE = "default"
"""What runs where no recipe is named."""
STAGE_KINDS = ("cold_start", "filter", "rl")
_TAKEN = ("before", "after", "done", "initial", "final", "best")
"""Names of what lies between stages, and of models that no stage leaves."""
_OF_THE_RUN = {
    "train": (
        *("sharding", "shards", "reshard_after_forward", "reduce_dtype"),
        *("shard_vision", "cpu_offload", "optimizer"),
    ),
    "rollout": (
        *("engine", "url", "vllm", "gpu_memory", "devices", "serve_args"),
        *("requests", "timeout", "placement", "transfer", "tolerance", "ahead"),
    ),
}
"""Keys that all stages have alike: how the weights lie in memory, and on which servers rollouts are sampled."""


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _BUNDLED.glob("*.toml"))


def is_data(name: str) -> bool:
    """Whether a name stands for data, where a recipe may stand too: neither a bundled recipe's name nor a .toml file.

    Raises:
        UserError: a bare word that is neither a recipe nor there.
    """
    if name in recipe_names() or name.endswith(".toml"):
        return False
    if not re.search(r"[/:,.*?\[]", name) and not Path(name).exists():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        raise UserError(
            f"{name} is neither a recipe nor data that is there: "
            + (f"did you mean {near[0]}?" if near else f"choose {', '.join(recipe_names())}, ")
            + "or give a .toml file, a file or folder of rows, or a hub data set as OWNER/NAME or NAME:SPLIT"
        )
    return True


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
    """A Config from one TOML file; keys left out are those of the recipe that its key `recipe` names, or the defaults."""
    config = _validated(_read(path), f"{path}: ")
    check_config(config, f"{path}: ")
    return config


def _read(path: Path) -> dict[str, Any]:
    """The sections of a TOML file, over those of the recipe that it starts from."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"recipe {path} cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error
    if isinstance(values.get("train"), dict):
        values["train"] = either_length(values["train"])
    if isinstance(model := values.get("model"), dict):
        share = model.get("gradient_checkpointing")
        if isinstance(share, bool):  # As it was written when it was all layers or none.
            model["gradient_checkpointing"] = float(share)
    if "stages" in values:
        values["stages"] = _stages(values["stages"], str(path))
    if (base := values.pop("recipe", None)) is None:
        return values
    if base not in recipe_names():
        raise UserError(f"{path}: recipe = {base!r} is none of {', '.join(recipe_names())}")
    whole = _read(_BUNDLED / f"{base}.toml")
    for section, own in values.items():
        both = isinstance(own, dict) and isinstance(whole.get(section), dict)
        whole[section] = whole[section] | own if both else own
    return whole


def check_config(config: Config, where: str = "") -> None:
    """Raise UserError, naming the key, for a value that makes no sense in the config or one of its stages.

    `where` begins the message.
    """
    _validated(_values(config), where)
    for stage in config.stages:
        own = merged(config, stage, where).data.eval
        if own != config.data.eval and (is_split(own) or is_split(config.data.eval)):
            raise UserError(
                f"{where}stage {stage.name}: data.eval = {own}: what is held out is held out in the whole run; set "
                "data.eval outside of the stages"
            )


def check_named(config: Config) -> None:
    """Raise UserError unless the config names a model, and training data in every stage."""
    unnamed = [] if config.model.path else ["model.path"]
    trained = all(stage.config.data.train for stage in plan(config))
    if not trained or (is_split(config.data.eval) and not config.data.train):
        unnamed.insert(0, "data.train")
    if unnamed:
        raise UserError(
            f"{' and '.join(unnamed)} must be named, as in: perl-rl train --data.train data/train.jsonl "
            "--model.path Qwen/Qwen2.5-VL-3B-Instruct; perl-rl train demo is a run that needs neither"
        )


def check_options(command: Command) -> None:
    """Raise UserError, naming the option, for a number out of the bounds that stand beside it."""
    from pydantic import TypeAdapter, ValidationError

    for name, kind in get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        if not isinstance(value, int | float):
            continue
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            must = error.errors()[0]["msg"].replace("Input should", "must")
            raise UserError(f"--{name.replace('_', '-')} {value}: {must}") from error


def merged(config: Config, stage: StageConfig, where: str = "") -> Config:
    """The config with a stage's own values in place, as the stage runs with it.

    Raises:
        UserError: an unknown key or a value that makes no sense in the stage.
    """
    where, values = f"{where}stage {stage.name}: ", _values(config)
    for section, own in stage.set.items():
        if isinstance(own, dict) and section in values:
            values[section] |= either_length(own) if section == "train" else own
        else:
            values[section] = own
    return _validated(values, where)


def either_length(train: dict[str, Any]) -> dict[str, Any]:
    """Keys of the section train, of which epochs or steps alone takes the place of the other one given elsewhere; epochs
    of 0 stand for steps."""
    if "steps" in train:
        return {"epochs": 0, **train}
    return {"steps": 0, **train} if train.get("epochs") else train


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


def _stages(tables: Any, where: str) -> list[dict[str, Any]]:
    """[[stages]] tables as `StageConfig` takes them: everything but name and kind is a section of the stage's own.

    Raises:
        UserError: no list of tables, a name or kind that is missing or cannot be, a section that no stage can change.
    """
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"{where}: stages is a list of tables; write [[stages]] before each")
    out: list[dict[str, Any]] = []
    for number, table in enumerate(tables, start=1):
        own = dict(table)
        name, kind = own.pop("name", None), own.pop("kind", None)
        at = f"{where}: stage {name or number}"
        if missing := next((k for k in ("name", "kind") if k not in table), None):
            raise UserError(f"{at} has no {missing}; write {missing} = ... below its [[stages]]")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise UserError(f"{at}: name = {name!r} must be lower-case letters, digits, - and _")
        if name in _TAKEN or name in [stage["name"] for stage in out]:
            raise UserError(f"{at}: the name {name} is taken; choose another")
        if kind not in STAGE_KINDS:
            raise UserError(f"{at}: kind = {kind!r} is not one of {', '.join(STAGE_KINDS)}")
        if common := next((k for k in ("run", "model", "stages") if k in own), None):
            raise UserError(f"{at}: {common} is common to all stages; set it outside of them")
        for section, keys in _OF_THE_RUN.items():
            given = own.get(section)
            if key := next((k for k in keys if isinstance(given, dict) and k in given), None):
                raise UserError(
                    f"{at}: {section}.{key} is common to all stages; set it outside of them"
                )
        out.append({"name": name, "kind": kind, "set": own})
    return out


def _validated(values: dict[str, Any], where: str) -> Config:
    """Strict types and bounds by pydantic, and what the values must be beside each other.

    They go through JSON, so that lists may become tuples and nothing else is converted.
    """
    from pydantic import ValidationError

    try:
        config = _adapter().validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(where + _what_is_wrong(error.errors())) from error
    if wrong := _conflict(config):
        raise UserError(f"{where}{wrong}")
    return config


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


_BRANCHES = ("constrained-", "literal[")


def _what_is_wrong(errors: Sequence[Any]) -> str:
    """The first finding of pydantic's in one line that names the key."""
    # Where a key takes one thing or another, there is a finding for each, and its place ends in what it is not.
    keys = [
        ".".join(part for part in map(str, e["loc"]) if not part.startswith(_BRANCHES))
        for e in errors
    ]
    error, key = errors[0], keys[0]
    if error["type"] == "unexpected_keyword_argument":
        *sections, unknown = error["loc"]
        section = get_type_hints(Config)[sections[0]] if sections else Config
        known = [f.name for f in dataclasses.fields(section)]
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"known here: {', '.join(known)}"
        if near:
            hint = f"did you mean {'.'.join([*sections, *near])}?"
        return f"unknown key {key}; {hint}"
    if error["type"] == "dataclass_type":
        return f"{key} is a section; write [{key}] and its keys below"
    value, must = error["input"], error["msg"].replace("Input should", "must")
    if isinstance(value, float) and not math.isfinite(value):
        must = "must be a finite number"
    same = [e.get("ctx", {}) for e, k in zip(errors[1:], keys[1:], strict=True) if k == key]
    others = [each["expected"] for each in same if "expected" in each]
    return f"{key} = {value!r}: {' or '.join([must, *others])}"


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
        own = dataclasses.replace(own, data=held_out_of(own.data, config.data.train))
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


def is_split(source: str) -> bool:
    """Whether a source is a part of training data that is held out."""
    return source.startswith(_SPLIT)


def held_out_of(data: DataConfig, run: str) -> DataConfig:
    """The section with what is held out named as a part of what the run trains on, where the section's data are others."""
    if not is_split(data.eval) or data.eval.count(":") > 1 or data.train == run:
        return data
    return dataclasses.replace(data, eval=f"{data.eval}:{run}")


def split_of(data: DataConfig) -> tuple[float, str] | None:
    """The share that `data.eval = "split:SHARE"` holds out, and of which training source; None: it is data of its own.

    A stage with a `data.train` of its own has the source of the run behind the share (see `plan`).

    Raises:
        UserError: a share that is no number between 0 and 1.
    """
    if not is_split(data.eval):
        return None
    share, _, source = data.eval.removeprefix(_SPLIT).partition(":")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(
            f"data.eval = {data.eval}: the share must be a number between 0 and 1, as in split:0.05"
        )
    return value, source or data.train


def source_key(source: str) -> str:
    """One name for a data source, however its path is written."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def filtered_file(folder: Path, name: str) -> Path:
    """What a filter stage leaves of its data."""
    return folder / "filtered" / f"{name}.jsonl"


def _conflict(config: Config) -> str | None:
    """What is wrong with values that do not fit each other, naming the first one's key; None if all do."""
    run, reward, chosen = config.run, config.reward, config.filter
    permutation, per_order = config.permutation, config.rollout.per_order
    for low, high in (
        ("data.min_images", "data.max_images"),
        ("model.min_pixels", "model.max_pixels"),
        ("filter.min_accuracy", "filter.max_accuracy"),
        ("filter.replay", "filter.replay_size"),
    ):
        least, most = (operator.attrgetter(key)(config) for key in (low, high))
        if least > most:
            return f"{low} = {least} is more than {high} = {most}; exchange them"
    if len(set(run.seeds)) < len(run.seeds):
        return f"run.seeds = {list(run.seeds)} names one seed twice; leave one out"
    if config.data.streaming:
        for key, given in (
            ("train.epochs", config.train.epochs),
            ("filter.replay", chosen.replay),
            ("filter.reuse_overflow", chosen.reuse_overflow),
            ("data.eval = split:", is_split(config.data.eval)),
        ):
            if given:
                return f"{key} needs rows by their number, which data.streaming does not have; leave one of them out"
    if config.train.epochs and config.train.steps:
        return (
            f"train.epochs = {config.train.epochs:g} and train.steps = {config.train.steps} both say how long to train; "
            "leave one out"
        )
    if run.seeds and run.seed:
        return (
            f"run.seed = {run.seed} does nothing beside run.seeds = {list(run.seeds)}; "
            "put it into run.seeds, or leave those empty"
        )
    if run.seeds and run.push_to_hub:
        return (
            f"run.push_to_hub = {run.push_to_hub} takes one model, and run.seeds = {list(run.seeds)} leave several; "
            "push one of them with: hf upload"
        )
    if wrong := _unusable_text(config.data):
        return wrong
    if config.advantage.over != "group" and per_order < 2:
        return (
            f"advantage.over = {config.advantage.over} with rollout.per_order = 1 leaves nothing to compare within "
            "an order; raise rollout.per_order to 2 or more"
        )
    if config.resample.orders > config.resample.rollouts:
        return (
            f"resample.orders = {config.resample.orders} is more than resample.rollouts = "
            f"{config.resample.rollouts}; each order needs a completion"
        )
    if permutation.draw == "released" and permutation.orders > 2:
        return (
            f"permutation.draw = released with permutation.orders = {permutation.orders}: the released code "
            "draws the same order again; set permutation.orders = 2"
        )
    try:
        names_of(reward.functions)
        split_of(config.data)
    except UserError as error:
        return str(error)
    band = (chosen.min_accuracy, chosen.max_accuracy)
    if band != (0, 1) and part_name(reward.functions, chosen.measure) is None:
        advice = "name the one that filter.min_accuracy and max_accuracy are about"
        return unnamed(reward.functions, "filter.measure", chosen.measure, advice)
    if reward.group_weight != "none":
        of = reward.group_weight_of
        if part_name(reward.functions, of) is None:
            advice = f"name the one whose mean decides about reward.group_weight = '{reward.group_weight}'"
            return unnamed(reward.functions, "reward.group_weight_of", of, advice)
    if permutation.condition == "original" and (chosen.replay or chosen.reuse_overflow):
        return (
            "permutation.condition = original leaves no old log-probs for groups of earlier steps; "
            "set filter.replay = 0 and filter.reuse_overflow = false"
        )
    if permutation.orders * per_order < 2:
        return (
            "rollout.per_order = 1 with permutation.orders = 1 is a single completion per example, "
            "which has nothing to be compared with; raise one of them"
        )
    return None


def _unusable_text(data: DataConfig) -> str | None:
    """What is wrong with the texts that are added to questions."""
    named = ("", "auto", *INSTRUCTIONS)
    if data.instruction not in named and len(data.instruction.split()) < 2:
        near = difflib.get_close_matches(data.instruction, named, n=1)
        return (
            f"data.instruction = {data.instruction!r} is neither a sentence nor one of {', '.join(named[1:])}; "
            + (f"did you mean {near[0]}?" if near else 'write it out, or "" for none')
        )
    for key in ("instruction", "system"):
        if IMAGE_SLOT in getattr(data, key):
            return f"data.{key} holds {IMAGE_SLOT}, which stands for an image of the question; leave it out"
    return None


def measured_function(config: Config, wanted: str | None = None) -> str:
    """The entry of `reward.functions` that `filter.measure` names; the only one if there is no other.

    `wanted`, from the command line, takes the place of `filter.measure` and may be any other function too.

    Raises:
        UserError: none or several fit the name.
    """
    functions = config.reward.functions
    name = config.filter.measure if wanted is None else wanted
    places = places_of(functions, name)
    if len(places) == 1:
        return functions[places[0]]
    if wanted is not None and not places:
        return wanted
    if wanted is None and len(functions) == 1:
        return functions[0]
    key = "filter.measure" if wanted is None else "--measure"
    raise UserError(unnamed(functions, key, name, "name the one that questions are measured by"))


def unnamed(functions: Sequence[str], key: str, wanted: str, advice: str) -> str:
    """What to say of a name that stands for none of the functions, or for several."""
    if places := places_of(functions, wanted):
        several = ", ".join(functions[i] for i in places)
        return f"{key} = '{wanted}' may be any of {several}; write one of them whole"
    return f"{key} = '{wanted}' is none of reward.functions ({', '.join(names_of(functions))}); {advice}"
