"""What the values of a configuration must be, alone and beside each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from perl.config import Config
from perl.types import UserError

REWARD_SPEC = re.compile(
    r"(?:(?P<module>.*?):)?(?P<name>[A-Za-z_]\w*)\s*(?:\((?P<options>.*)\))?", re.S
)
"""How a reward function is written: `name`, `module:name`, with options in brackets."""

_Range = tuple[str, Callable[[float], bool]]
_NOT_NEGATIVE: _Range = ("0 or more", lambda v: 0 <= v < math.inf)
_ONE_OR_MORE: _Range = ("1 or more", lambda v: 1 <= v < math.inf)
_POSITIVE: _Range = ("above 0", lambda v: 0 < v < math.inf)
_SHARE: _Range = ("from 0 to 1", lambda v: 0 <= v <= 1)

RANGES: dict[str, _Range] = {
    "run.seed": ("from 0 to 2147483647", lambda v: 0 <= v < 2**31),
    "run.seeds": ("from 0 to 2147483647", lambda v: 0 <= v < 2**31),
    "run.log_every": _ONE_OR_MORE,
    "run.checkpoint_every": _NOT_NEGATIVE,
    "run.keep_checkpoints": _ONE_OR_MORE,
    "run.save_rollouts_every": _NOT_NEGATIVE,
    "model.lora_rank": _NOT_NEGATIVE,
    "model.lora_alpha": _POSITIVE,
    "model.feature_cache_mb": _NOT_NEGATIVE,
    "model.min_pixels": _ONE_OR_MORE,
    "model.max_pixels": _ONE_OR_MORE,
    "data.min_images": _ONE_OR_MORE,
    "data.max_images": _ONE_OR_MORE,
    "data.max_prompt_tokens": _ONE_OR_MORE,
    "cold_start.steps": _NOT_NEGATIVE,
    "cold_start.batch_size": _ONE_OR_MORE,
    "cold_start.lr": _NOT_NEGATIVE,
    "cold_start.warmup_steps": _NOT_NEGATIVE,
    "cold_start.noise": _SHARE,
    "permutation.orders": _ONE_OR_MORE,
    "permutation.rate": _SHARE,
    "data.first_slot": _SHARE,
    "resample.rollouts": _ONE_OR_MORE,
    "resample.orders": _ONE_OR_MORE,
    "resample.examples": _NOT_NEGATIVE,
    "resample.size": _NOT_NEGATIVE,
    "rollout.per_order": _ONE_OR_MORE,
    "rollout.temperature": _POSITIVE,
    "rollout.max_new_tokens": _ONE_OR_MORE,
    "rollout.batch_size": _ONE_OR_MORE,
    "reward.timeout": _NOT_NEGATIVE,
    "reward.group_weight_power": _POSITIVE,
    "filter.max_tries": _ONE_OR_MORE,
    "filter.min_accuracy": _SHARE,
    "filter.max_accuracy": _SHARE,
    "filter.replay": _NOT_NEGATIVE,
    "filter.replay_size": _ONE_OR_MORE,
    "filter.replay_power": _NOT_NEGATIVE,
    "loss.clip_low": _NOT_NEGATIVE,
    "loss.clip_high": _NOT_NEGATIVE,
    "loss.kl_coef": _NOT_NEGATIVE,
    "loss.entropy_coef": ("a finite number", math.isfinite),
    "train.steps": _NOT_NEGATIVE,
    "train.examples_per_step": _ONE_OR_MORE,
    "train.updates_per_batch": _ONE_OR_MORE,
    "train.tokens_per_micro_batch": _ONE_OR_MORE,
    "train.lr": _NOT_NEGATIVE,
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.betas": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    "train.max_grad_norm": ("above 0", lambda v: v > 0),
    "eval.examples": _NOT_NEGATIVE,
    "eval.max_orders": _ONE_OR_MORE,
    "eval.samples": _ONE_OR_MORE,
    "eval.every": _NOT_NEGATIVE,
}
"""What each number must be, if it has a value."""


def violation(config: Config) -> str | None:
    """What is wrong with the first value that makes no sense, naming its key; None if all do."""
    values = dict(_flat(config, ""))
    for key, (wanted, fits) in RANGES.items():
        several = values[key] if isinstance(values[key], tuple) else (values[key],)
        if wrong := [v for v in several if v is not None and not fits(v)]:
            must = wanted if all(map(math.isfinite, wrong)) else "a finite number"
            return f"{key} = {_shown(values[key])}: must be {must}"
    for low, high in (
        ("data.min_images", "data.max_images"),
        ("model.min_pixels", "model.max_pixels"),
        ("filter.min_accuracy", "filter.max_accuracy"),
    ):
        if values[low] > values[high]:
            return f"{low} = {values[low]} is more than {high} = {values[high]}; exchange them"
    seeds, functions, weights = (
        values[k] for k in ("run.seeds", "reward.functions", "reward.weights")
    )
    if len(set(seeds)) < len(seeds):
        return f"run.seeds = {_shown(seeds)} names one seed twice; leave one out"
    if seeds and values["run.seed"] != 0:
        return (
            f"run.seed = {values['run.seed']} does nothing beside run.seeds = {_shown(seeds)}; "
            "put it into run.seeds, or leave those empty"
        )
    if len(functions) != len(weights):
        return (
            f"reward.weights = {_shown(weights)} for {len(functions)} reward.functions "
            f"({', '.join(functions)}); give one weight for each"
        )
    if values["advantage.over"] != "group" and values["rollout.per_order"] < 2:
        return (
            f"advantage.over = {values['advantage.over']} with rollout.per_order = 1 leaves nothing to compare within "
            "an order; raise rollout.per_order to 2 or more"
        )
    if values["resample.orders"] > values["resample.rollouts"]:
        return (
            f"resample.orders = {values['resample.orders']} is more than resample.rollouts = "
            f"{values['resample.rollouts']}; each order needs a completion"
        )
    if values["permutation.draw"] == "released" and values["permutation.orders"] > 2:
        return (
            f"permutation.draw = released with permutation.orders = {values['permutation.orders']}: the released code "
            "draws the same order again; set permutation.orders = 2"
        )
    try:
        names_of(functions)
    except UserError as error:
        return str(error)
    band = (values["filter.min_accuracy"], values["filter.max_accuracy"])
    if band != (0, 1) and part_name(functions, values["filter.measure"]) is None:
        return _unnamed(
            functions,
            "filter.measure",
            values["filter.measure"],
            "name the one that filter.min_accuracy and max_accuracy are about",
        )
    if values["filter.replay"] > values["filter.replay_size"]:
        return (
            f"filter.replay = {values['filter.replay']} is more than filter.replay_size = "
            f"{values['filter.replay_size']}; exchange them"
        )
    if values["reward.group_weight"] != "none":
        of = values["reward.group_weight_of"]
        if part_name(functions, of) is None:
            return _unnamed(
                functions,
                "reward.group_weight_of",
                of,
                f"name the one whose mean decides about reward.group_weight = '{values['reward.group_weight']}'",
            )
    if values["permutation.condition"] == "original" and (
        values["filter.replay"] or values["filter.reuse_surplus"]
    ):
        return (
            "permutation.condition = original leaves no old log-probs for groups of earlier steps; "
            "set filter.replay = 0 and filter.reuse_surplus = false"
        )
    if values["permutation.orders"] * values["rollout.per_order"] < 2:
        return (
            "rollout.per_order = 1 with permutation.orders = 1 is a single completion per example, "
            "which has nothing to be compared with; raise one of them"
        )
    return None


def names_of(functions: Sequence[str | Callable[..., Any]]) -> tuple[str, ...]:
    """Distinct names to report by: the function's own, or the whole spec where two are alike."""
    whole = [
        f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__) for f in functions
    ]
    matches = [REWARD_SPEC.fullmatch(name.strip()) for name in whole]
    short = [m["name"] if m else name for m, name in zip(matches, whole, strict=True)]
    names = tuple(w if short.count(s) > 1 else s for w, s in zip(whole, short, strict=True))
    if len(set(names)) < len(names):
        raise UserError(
            f"reward.functions names one function twice: {', '.join(names)}; leave one out"
        )
    return names


def part_name(functions: Sequence[str], wanted: str) -> str | None:
    """The name that a reward function's scores are reported under (see `names_of`).

    `wanted` is one of `functions` as it is written there, or its plain name if no other has that too; None if it
    is neither. Raises UserError where one function is named twice.

    Example: `part_name(["box_iou(threshold=0.5)"], "box_iou(threshold=0.5)") == "box_iou"`.
    """
    place = _place(functions, wanted)
    return None if place is None else names_of(functions)[place]


def measured_function(config: Config, wanted: str | None = None) -> str:
    """The entry of `reward.functions` that `filter.measure` names; the only one if there is no other.

    `wanted`, from the command line, takes the place of `filter.measure` and may be any other function too.

    Raises:
        UserError: none or several fit the name.
    """
    functions, given = config.reward.functions, wanted is not None
    name = config.filter.measure if wanted is None else wanted
    place = _place(functions, name)
    if place is not None:
        return functions[place]
    if given and not _alike(functions, name):
        return name
    if not given and len(functions) == 1:
        return functions[0]
    key = "--measure" if given else "filter.measure"
    raise UserError(_unnamed(functions, key, name, "name the one that questions are measured by"))


def _place(functions: Sequence[str], wanted: str) -> int | None:
    whole = [f.strip() for f in functions]
    if wanted.strip() in whole:
        return whole.index(wanted.strip())
    alike = _alike(functions, wanted)
    return alike[0] if len(alike) == 1 else None


def _alike(functions: Sequence[str], wanted: str) -> list[int]:
    """Places of those with this plain name."""
    return [i for i, f in enumerate(functions) if names_of([f]) == (wanted.strip(),)]


def _unnamed(functions: Sequence[str], key: str, wanted: str, advice: str) -> str:
    """What to say of a name that stands for none of the functions, or for several."""
    if alike := [functions[i] for i in _alike(functions, wanted)]:
        return f"{key} = '{wanted}' may be any of {', '.join(alike)}; write one of them whole"
    return f"{key} = '{wanted}' is none of reward.functions ({', '.join(names_of(functions))}); {advice}"


def _flat(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def _shown(value: Any) -> str:
    """As TOML writes it."""
    return str(list(value)) if isinstance(value, tuple) else str(value)
