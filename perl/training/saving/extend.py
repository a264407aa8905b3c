"""Other settings for a run that is there, given to `perl-rl resume RUN` or `perl-rl train --resume`: more steps or fewer, and
what takes another share of memory: sizes, and the sharding."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from perl.config import Config
from perl.files import RunFolder
from perl.recipe import Stage, check_config, plan, read_config, save_config
from perl.training.checks import check_stage
from perl.training.optimizer import Schedule
from perl.training.parallel.mesh import check_sharding
from perl.training.saving.checkpoint import CheckpointManager, Progress, write_progress
from perl.types import UserError


def extend(folder: RunFolder, steps: int) -> list[str]:
    """Let the last stage of a run take `steps` in all. A run that has finished then goes on behind its last step.

    Returns:
        What there is to say about it.

    Raises:
        UserError: the last stage is none of RL, or has taken more steps already.
    """
    config = read_config(folder.config)
    last = plan(config)[-1]
    if steps == last.steps:
        return []
    if last.kind != "rl":
        raise UserError(
            f"train.steps = {steps}: only RL at the end of a run takes more steps, and this one ends with {last.name} "
            f"({last.kind}); leave it out, and train from {folder.root} in a new run"
        )
    changed = _with_steps(config, steps)
    check_config(changed)
    roots = [folder.root / f"seed-{seed}" for seed in config.run.seeds] or [folder.root]
    found = [c for root in roots if (c := CheckpointManager(root / "checkpoints", 1).load())]
    taken = max((_taken(progress, last) for _, progress in found), default=0)
    if steps < taken:
        raise UserError(
            f"train.steps = {steps}: {last.name} has taken {taken} of its {last.steps} steps; give more than that"
        )
    for path, progress in found:
        if last.name in progress.taken:
            _reopen(progress, last)
            write_progress(path, progress)
    for root in {folder.root, *roots}:
        one = RunFolder(root)
        one.summary.unlink(missing_ok=True)
        if one.config.exists():
            save_config(_with_steps(read_config(one.config), steps), one.config)
    return _said(plan(changed)[-1], last, taken)


def resize(folder: RunFolder, sizes: Mapping[str, Any]) -> list[str]:
    """Give a run other sizes of what it computes together, or another sharding, by keys as `train.tokens_per_micro_batch`,
    in all of its stages. Without sharding those that say what is sharded, or where shards lie, are switched off.

    Returns:
        What there is to say about it.

    Raises:
        UserError: a value that cannot be, or not with so many processes.
    """
    if not sizes:
        return []
    config = read_config(folder.config)
    if sizes.get("train.sharding") == "none":
        further = {"train.shards": 0, "train.shard_vision": False, "train.cpu_offload": False}
        sizes = {key: off for key, off in further.items() if attrgetter(key)(config)} | dict(sizes)
    changed = _with_sizes(config, sizes)
    check_config(changed)
    check_sharding(changed, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())
    for stage in plan(changed):
        check_stage(stage)
    for root in [folder.root, *(folder.root / f"seed-{seed}" for seed in config.run.seeds)]:
        if (one := RunFolder(root).config).exists():
            save_config(_with_sizes(read_config(one), sizes), one)
    return [f"{key} = {value} from here on: equal but for rounding" for key, value in sizes.items()]


def _with_sizes(config: Config, sizes: Mapping[str, Any]) -> Config:
    for key, value in sizes.items():
        section, name = key.split(".")
        own = replace(getattr(config, section), **{name: value})
        stages = [
            replace(s, set={**s.set, section: {**s.set[section], name: value}})
            if name in s.set.get(section, {})
            else s
            for s in config.stages
        ]
        config = replace(config, **{section: own}, stages=tuple(stages))
    return config


def _taken(progress: Progress, last: Stage) -> int:
    here = progress.step if progress.stage == last.name else 0
    return progress.taken.get(last.name, here)


def _reopen(progress: Progress, last: Stage) -> None:
    """As if the run stood behind the last step of its last stage."""
    progress.stage, progress.step = last.name, progress.taken.pop(last.name)
    progress.stale = 0


def _with_steps(config: Config, steps: int) -> Config:
    if not config.stages:
        return replace(config, train=replace(config.train, steps=steps))
    *earlier, stage = config.stages
    own = {**stage.set, "train": {**stage.set.get("train", {}), "steps": steps}}
    return replace(config, stages=(*earlier, replace(stage, set=own)))


def _said(new: Stage, old: Stage, taken: int) -> list[str]:
    """What differs from a run that had been given so many steps from the start."""
    others = " (stages before it keep theirs)" if new.config.stages else ""
    lines = [f"{new.name} goes on from step {taken} to {new.steps}{others}"]
    train, updates = new.config.train, new.config.train.updates_per_batch
    before, after = (
        Schedule(train.lr, train.schedule, train.warmup_steps, steps * updates)
        for steps in (old.steps, new.steps)
    )
    were = [before(number) for number in range(taken * updates)]
    if were != [after(number) for number in range(taken * updates)]:
        lines.append(
            f"train.schedule = {train.schedule} was planned over {old.steps} steps: the learning rate ended at "
            f"{were[-1]:.3g} and goes on at {after(taken * updates):.3g}, so that this is not the run that {new.steps} "
            "steps from the start would have been"
        )
    if taken and new.config.permutation.rate_schedule != "constant":
        lines.append(
            f"permutation.rate_schedule = {new.config.permutation.rate_schedule} was planned over {old.steps} steps, "
            f"too, and goes on as if over {new.steps}"
        )
    return lines
