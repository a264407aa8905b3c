"""Passes over the data as steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perl.config import Config
from perl.data.dataset import load_examples
from perl.data.streams import read_mix
from perl.recipe import Stage, filtered_sources, plan, source_key
from perl.types import UserError

log = logging.getLogger(__name__)


def with_steps(config: Config) -> Config:
    """The config with `train.epochs` worked out as `train.steps`, in every stage.

    Raises:
        UserError: data whose number of rows is not known before the run.
    """
    stages = plan(config)
    steps = {
        stage.name: _steps_of_epochs(stage, stages)
        for stage in stages
        if stage.kind == "rl" and stage.config.train.epochs
    }
    if not steps:
        return config
    length = {name: {"steps": count, "epochs": 0.0} for name, count in steps.items()}
    common = replace(config.train, steps=max(steps.values()), epochs=0.0)
    own = tuple(
        replace(s, set={**s.set, "train": {**s.set.get("train", {}), **length.get(s.name, {})}})
        for s in config.stages
    )
    return replace(config, train=common if config.train.epochs else config.train, stages=own)


def _steps_of_epochs(stage: Stage, stages: Sequence[Stage]) -> int:
    config, where = stage.config, f"stage {stage.name}: train.epochs"
    source, data = config.data.train, config.data
    if source_key(source) in filtered_sources(stage, stages, Path()):
        raise UserError(
            f"{where}: how many rows a filter stage leaves is not known; give train.steps"
        )
    size = load_examples(source, data, "train", config.run.seed).size
    if size is None:
        raise UserError(f"{where}: {source} is endless; give train.steps")
    sources = [(source, 1.0), *read_mix(data.mix)]
    draws = config.train.epochs * size * sum(weight for _, weight in sources)
    steps = math.ceil(round(draws / config.train.examples_per_step, 6))
    log.info("%s = %g over %d rows: %d steps", where, config.train.epochs, size, steps)
    return steps
