"""Whether a recipe fits a GPU's memory; if not, which change makes it fit, by planning again with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from perl.config import Config
from perl.training.roofline.memory import RESERVED, Bytes, memory
from perl.training.roofline.model import model_facts
from perl.training.roofline.step import StepWork
from perl.types import UserError

_OF_WEIGHTS = {"model.lora_rank", "model.freeze_vision"}
"""Keys among `_candidates` that change which weights there are, or are trained."""


@dataclass(frozen=True)
class Change:
    """Keys with other values, and what comes of them."""

    keys: Mapping[str, Any]
    why: str
    peak: float
    """Bytes at most with it."""


def peak_of(kept: Mapping[str, Bytes]) -> float:
    """Most bytes of all stages."""
    return max(sum(parts.values()) for parts in kept.values())


def changed(config: Config, keys: Mapping[str, Any]) -> Config:
    """A config with other values of `section.key`."""
    for name, value in keys.items():
        section, key = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def first_that_fits(work: StepWork, capacity: float) -> Change | None:
    """The first single change with which the step fits; else as many of them, one after the other, as lower the peak
    until it fits. None: even these do not suffice, or nothing needs to change."""
    best = peak_of(memory(work, capacity))
    if best <= capacity:
        return None
    tried = []
    for keys, why in _candidates(work):
        peak = peak_with(work, keys, capacity)
        if peak is not None and peak <= capacity:
            return Change(keys, why, peak)
        tried.append((keys, why))
    together: dict[str, Any] = {}
    reasons: list[str] = []
    for keys, why in tried:
        peak = peak_with(work, {**together, **keys}, capacity)
        if peak is None or peak >= best:
            continue
        together, best = {**together, **keys}, peak
        reasons += [why] * (why not in reasons)
        if peak <= capacity:
            return Change(together, "; ".join(reasons), peak)
    return None


def without_change(work: StepWork, capacity: float) -> str:
    """What to do where no change suffices: more GPUs do not share what each keeps for itself."""
    more = "" if RESERVED * (not work.cpu) >= capacity else "more or "
    return f"take {more}larger GPUs" + ", or a smaller model" * bool(more)


def peak_with(work: StepWork, keys: Mapping[str, Any], capacity: float) -> float | None:
    """Most bytes with other values of keys; None: the step cannot be taken with them."""
    config = changed(work.config, keys)
    facts = work.facts
    if keys.keys() & _OF_WEIGHTS:  # Else the model is the same, and need not be made again.
        import torch

        facts = model_facts(config, torch.float32 if facts.itemsize == 4 else torch.bfloat16)
    try:
        return peak_of(memory(replace(work, config=config, facts=facts), capacity))
    except UserError:
        return None


def _candidates(work: StepWork) -> Iterator[tuple[dict[str, Any], str]]:
    """Keys to change and why, what costs least first."""
    model, train, rollout = work.config.model, work.config.train, work.config.rollout
    if model.gradient_checkpointing < 1:
        yield {"model.gradient_checkpointing": 1.0}, "layers keep their inputs alone"
    for part in (2, 4, 8):
        fewer = {"rollout.kv_cache_tokens": rollout.kv_cache_tokens // part}
        yield fewer, "fewer completions go on at a time"
    for part in (2, 4, 8):
        shorter = {"train.tokens_per_micro_batch": train.tokens_per_micro_batch // part}
        yield shorter, "a row has fewer tokens"
    if train.sharding == "none" and work.gpus > 1:
        yield {"train.sharding": "fsdp"}, f"{work.gpus} GPUs share weights, moments and gradients"
    sharded = train.sharding != "none"
    if sharded and not train.reshard_after_forward:
        yield {"train.reshard_after_forward": True}, "layers are let go of between their passes"
    if sharded and not train.shard_vision and work.facts.tower_trained:
        yield {"train.shard_vision": True}, "the vision tower is shared, too"
    if train.optimizer == "adamw":
        yield {"train.optimizer": "adamw_8bit"}, "moments take 2 bytes a weight, not 8"
    if sharded and not train.cpu_offload and not work.cpu:
        away = "shards, gradients and moments lie in the host's memory (untested)"
        yield {"train.cpu_offload": True}, away
    if not model.lora_rank:
        adapters = {"model.lora_rank": 64, "model.freeze_vision": True}
        yield adapters, "adapters alone are trained, and the model without them is the reference"
    elif work.facts.tower_trained:
        yield {"model.freeze_vision": True}, "the vision tower is not trained"
