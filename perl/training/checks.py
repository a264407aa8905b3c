"""What is looked at before a run begins, so that a mistake is told before anything is written or removed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from glob import iglob
from pathlib import Path
from typing import Any

import torch

from perl.config import EVAL_SEED, Config, DataConfig, names_of
from perl.data.check import checked, checks_of
from perl.data.dataset import RowDataset, check_apart, load_examples
from perl.data.resample import parse_histogram
from perl.data.streams import training_sources
from perl.evaluation.evaluate import NUMBERS
from perl.evaluation.preview.recipe import processor_of
from perl.evaluation.trial import try_rewards
from perl.model.head import policy_loss_of
from perl.model.loading import check_kernels, check_model, load_processor
from perl.model.processor import Processor
from perl.model.tiny import TINY_MODELS
from perl.recipe import Stage, measured_function, plan
from perl.report.progress import Display
from perl.report.trackers import usable_trackers
from perl.rewards.scorer import Scorer
from perl.rollout.engines import check_sampling
from perl.rollout.instruction import Instruction, tell_prompts
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.training.components import check_bundled
from perl.training.optimizer import Schedule, check_optimizer
from perl.training.parallel.mesh import check_sharding, check_shared
from perl.training.saving.hub import check_push
from perl.types import UserError

log = logging.getLogger(__name__)


@dataclass
class Source:
    """Data that a run reads, and what its rows are held to."""

    name: str
    config: DataConfig
    text: str
    """`permutation.text`."""
    dataset: Any
    rewards: set[tuple[str, ...]] = field(default_factory=set)
    """`reward.functions` of the stages that train on it."""
    filtered: bool = False
    """Whether a filter stage measures it, which skips no row."""


def check_run(config: Config) -> None:
    """See that every stage has its data, model, rewards and trackers; in the main process alone, as it may take long.

    Raises:
        UserError: something cannot be used.
    """
    stages = plan(config)
    trained, measured = _training_sources(stages), _measured_sources(stages)
    for held_out in measured:
        check_apart(held_out.dataset, [source.dataset for source in trained])
    if not measured and config.eval.examples and any(stage.kind == "rl" for stage in stages):
        log.info(
            "data.eval is empty, so nothing is measured before and after RL; data.eval = split:0.05 would hold that share "
            "of data.train out"
        )
    processor = check_setup(config)
    check_rows([*trained, *measured], processor)
    _check_prompts(config, processor, trained)


def check_kept(config: Config, recipe: str, root: Path) -> None:
    """Refuse to overwrite a folder that the new run reads from."""
    root = root.resolve()
    sources = [("the recipe", recipe), ("model.path", config.model.path)]
    for stage in plan(config):
        data = stage.config.data
        first, *mixed = (source for source, _ in training_sources(data))
        sources += [("data.train", first), *(("data.mix", source) for source in mixed)]
        sources += [("data.eval", data.eval), ("data.image_root", data.image_root)]
    for name, value in sources:
        parts = [value, *value.split(",")]
        names = [*parts, *(part.partition(":")[0] for part in parts)]
        paths = [Path(n).expanduser() for n in (*names, *(f for n in parts for f in iglob(n))) if n]
        if any(path.exists() and path.resolve().is_relative_to(root) for path in paths):
            raise UserError(
                f"--overwrite would delete {name} = {value}; choose another --run.dir or move it out"
            )


def _training_sources(stages: Iterable[Stage]) -> list[Source]:
    found: dict[tuple[Any, ...], Source] = {}
    for stage in stages:
        config, text = stage.config, stage.config.permutation.text
        for name, _ in training_sources(config.data):
            key = (name, config.data, text)
            if key not in found:
                dataset = load_examples(name, config.data, "train", config.run.seed)
                found[key] = Source(*key, dataset)
            if stage.kind == "filter" and name == config.data.train:
                _check_filter(stage.name, config, found[key].dataset.size)
                found[key].filtered = True
                found[key].rewards.add((measured_function(config),))
            if stage.kind == "rl":
                found[key].rewards.add(config.reward.functions)
    return list(found.values())


def _measured_sources(stages: Iterable[Stage]) -> list[Source]:
    found: dict[tuple[Any, ...], Source] = {}
    for stage in stages:
        config = stage.config
        key = (config.data.eval, config.data, config.permutation.text)
        if stage.kind == "rl" and config.eval.examples and config.data.eval and key not in found:
            limit = config.eval.examples
            dataset = load_examples(config.data.eval, config.data, "test", EVAL_SEED, limit)
            found[key] = Source(*key, dataset)
    return list(found.values())


def check_rows(sources: Iterable[Source], processor: Processor | None) -> None:
    """Raise UserError for a faulty row, or warn of those that will be skipped."""
    for source in sources:
        if not isinstance(source.dataset, RowDataset):
            continue
        checks = checks_of(source.text, processor, source.rewards, source.config.control_tokens)
        stop = source.config.on_error == "error" or source.filtered
        with Display() as display:
            found = checked(source.dataset, checks, display, stop)
        if len(found.faults) == found.rows:
            raise UserError(
                f"all rows of {source.name} are faulty, the first: {found.faults[0].message}"
            )
        if found.faults:
            log.warning(
                "%s: %d of %d rows are faulty and will be skipped, the first: %s (perl-rl check lists them)",
                *(source.name, len(found.faults), found.rows, found.faults[0].message),
            )


def _check_prompts(config: Config, processor: Processor | None, sources: Sequence[Source]) -> None:
    """Say what each RL stage asks, warn where it is not what its rewards or its model read, and try the rewards."""
    with nullcontext(processor) if processor else processor_of(config) as reads:
        for stage in plan(config):
            if stage.kind == "rl":
                own = stage.config
                asked = Instruction.of(own).fitted(reads)
                limit = PromptLimit.to_train(own)
                if own.data.control_tokens == "error":
                    reads.check_messages(asked.add(()), "data.instruction or data.system")
                here = (own.data, own.permutation.text)
                shown = [(s.name, s.dataset) for s in sources if (s.config, s.text) == here]
                tell_prompts(own, asked, reads, shown)
                encoder = PromptEncoder(
                    reads, limit, own.data.overlong, asked, own.data.control_tokens
                )
                for name, dataset in shown:
                    try_rewards(name, dataset, own.permutation.text, own.reward, encoder)


def _check_filter(name: str, config: Config, size: int | None) -> None:
    """Whether there are questions to measure, and as many as are to be kept."""
    measured_function(config)
    if config.data.streaming:
        raise UserError(
            f"stage {name}: a filter needs rows by their number; leave data.streaming out"
        )
    measured = config.resample.examples or size
    if measured is None:
        raise UserError(
            f"stage {name}: {config.data.train} is endless; say how many questions to measure with "
            "resample.examples"
        )
    if config.resample.size > measured:
        raise UserError(
            f"stage {name}: resample.size = {config.resample.size} is more than the {measured} questions "
            "that are measured; lower it"
        )


def check_setup(config: Config) -> Processor | None:
    """Find what `build` would refuse, as far as that can be told without loading the weights.

    Returns:
        The processor of the model; None where the model is still to be made.

    Raises:
        UserError: for a model, processor, attention, reward or tracker that cannot be used.
    """
    usable_trackers(config)
    check_push(config.run.push_to_hub)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_shared(config, processes)
    check_sharding(config, processes, torch.cuda.is_available())
    check_deterministic(config, torch.cuda.is_available())
    for stage in plan(config):
        check_stage(stage)
        check_sampling(stage.config)
    if config.model.path not in TINY_MODELS:
        packed = check_model(config.model.path) is not None
        processor = load_processor(config.model.path, config.model)
        if packed:
            check_kernels(config.model)
        return processor
    check_bundled(config)
    check_kernels(config.model)
    return None


def check_deterministic(config: Config, cuda: bool) -> None:
    """Raise UserError for what PyTorch has no deterministic algorithm for on a GPU."""
    narrowed = [s.config.rollout.top_p for s in plan(config) if s.config.rollout.top_p < 1]
    if config.run.deterministic and cuda and narrowed:
        raise UserError(
            f"run.deterministic and rollout.top_p = {narrowed[0]} exclude each other on a GPU: PyTorch adds up probabilities "
            "in no fixed order there; leave one of them out, or take rollout.top_k"
        )


def check_stage(stage: Stage) -> None:
    """Raise UserError for settings of a stage that exclude each other."""
    config = stage.config
    if stage.kind == "filter":
        parse_histogram(config.resample.histogram)
        return
    completion = config.rollout.max_new_tokens
    for key, budget in (
        ("train.tokens_per_micro_batch", config.train.tokens_per_micro_batch),
        ("rollout.kv_cache_tokens", config.rollout.kv_cache_tokens),
    ):
        if config.train.steps and budget <= completion:
            raise UserError(
                f"{key} = {budget} leaves no room for a prompt beside "
                f"rollout.max_new_tokens = {completion}; raise the first or lower the second"
            )
    if stage.kind == "rl":
        _check_best(config)
    check_optimizer(config.train)
    Schedule(1.0, config.train.schedule, 0, 1)
    Schedule(1.0, config.cold_start.schedule, 0, 1, "cold_start.schedule")
    loss = policy_loss_of(config)
    if loss.correction and config.permutation.condition == "original":
        raise UserError(
            f"loss.correction = {loss.correction} compares with the log-probs of the prompt that was sampled from, and "
            "permutation.condition = original trains on another one; leave one of them out"
        )
    Scorer(config.reward.functions, config.reward.weights, config.reward.timeout)


def _check_best(config: Config) -> None:
    """Whether the evaluations are there that `run.keep_best` and `eval.patience` go by."""
    measured, key = config.eval, config.run.keep_best
    if measured.patience and not key:
        raise UserError(
            f"eval.patience = {measured.patience} needs run.keep_best, the number that is to get better; "
            f"{', '.join(NUMBERS)}, reward are some"
        )
    if not key:
        return
    parts = ("reward", *(f"reward/{name}" for name in names_of(config.reward.functions)))
    known = (*NUMBERS, *parts, *(f"greedy_{part}" for part in parts))
    if key not in known:
        raise UserError(f"run.keep_best = {key} is no number of an evaluation: {', '.join(known)}")
    if not measured.every or not measured.examples or not config.data.eval:
        missing = "data.eval" if not config.data.eval else "eval.examples"
        raise UserError(
            f"run.keep_best = {key} has nothing to choose from: set "
            f"{'eval.every' if not measured.every else missing} to evaluate along the way"
        )
