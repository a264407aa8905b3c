"""`perl-rl train`, `resume`, `report`, `config` and `doctor`. What is slow to import is imported where it is used."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from glob import iglob
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from perl.config import Command, Config, Count
from perl.failures import explain, summed_up
from perl.files import RunFolder, is_main_process
from perl.lock import locked, refuse_if_running
from perl.model.sources import newest_model
from perl.paths import with_absolute_paths
from perl.recipe import (
    DEFAULT_RECIPE,
    check_named,
    differences,
    read_config,
    recipe_names,
    save_config,
    to_toml,
)
from perl.types import Example, Interrupted, RunFailed, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Train(Command):
    """Train by a recipe: cold start, evaluation, RL, evaluation, report. Without one, by the recipe `default`, which
    needs data and a model: `perl-rl train --data.train data/train.jsonl --model.path Qwen/Qwen2.5-VL-3B-Instruct`.
    Every key can be given, as in `perl-rl train demo --train.steps 5 --run.dir runs/short`.

    Those that matter first:

        --data.train        your data: a file, a folder, a hub data set
        --model.path        the model to train: a folder or a hub name
        --data.eval         what is measured on: data of its own, or split:0.05 of data.train
        --reward.functions  what a completion is worth, with --reward.weights; names or file.py:function
        --train.steps       how long; --train.examples-per-step questions each
        --rollout.*         completions per order of the images, their length, the temperature
        --train.lr          and --model.lora-rank: how fast, and which weights
        --run.dir           where everything goes; another one for each run
    """

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name (see `perl-rl config --list`) or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    overwrite: bool = False
    """Replace the run folder if it is there."""
    resume: bool = False
    """Go on in the run folder if it is there, with the settings that it began with; --train.steps alone may change."""
    given: Annotated[frozenset[str], Suppress] = frozenset()
    """The keys that the command line names."""

    def execute(self) -> None:
        from perl.data.streams import with_steps
        from perl.distributed import on_main_process

        # Whatever a run comes to later: this one goes on from the model of today.
        model = replace(self.config.model, path=newest_model(self.config.model.path))
        config = replace(self.config, model=model)
        if self.overwrite and self.resume:
            raise UserError("--overwrite and --resume exclude each other; leave one out")
        if not config.run.dir:
            raise UserError("run.dir is empty; name a folder with --run.dir")
        folder = RunFolder(Path(config.run.dir))
        check_named(config)
        # Before the data are read, which may take long; and again where the folder is taken.
        on_main_process(partial(refuse_if_running, folder.root))
        goes_on = self.resume and folder.config.exists()
        if not goes_on:
            on_main_process(partial(folder.check_new, self.overwrite))
        config = with_steps(config)
        if goes_on:
            _resume(folder, config, config.train.steps if "train.steps" in self.given else None)
            return
        if self.overwrite:
            on_main_process(partial(_check_kept, self, folder))
        on_main_process(partial(_check, config))
        config = with_absolute_paths(config)
        with ExitStack() as held:
            on_main_process(lambda: held.enter_context(locked(folder.root)))
            on_main_process(partial(folder.create, self.overwrite))
            try:
                on_main_process(partial(save_config, config, folder.config))
                _go(config, folder, resume=False)
            finally:
                if is_main_process():
                    folder.settle()


@dataclass(frozen=True)
class Steps:
    """What a run may be given anew."""

    steps: Count | None = None
    """Steps of its last RL stage in all, also of a run that has finished; empty: as many as before."""


@dataclass(frozen=True)
class Resume(Command):
    """Go on with a run that was stopped or killed, from its newest whole checkpoint; or, with more --train.steps, with
    one that has finished."""

    run: Positional[Path] = Path()
    """The run folder."""
    train: Steps = field(default_factory=Steps)

    def execute(self) -> None:
        folder = RunFolder(self.run)
        if not folder.config.exists():
            raise UserError(
                f"{self.run} is no run folder: it has no config.toml; start one with perl-rl train"
            )
        _resume(folder, steps=self.train.steps)


@dataclass(frozen=True)
class ShowConfig(Command):
    """Print a recipe with every key, overrides included, as TOML."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    list: bool = False
    """Only the names of the bundled recipes."""

    def execute(self) -> None:
        if self.list:
            print("\n".join(recipe_names()))
            return
        print(to_toml(self.config), end="")


@dataclass(frozen=True)
class Report(Command):
    """Write report.html and the pictures of a run again, also of one that is not finished."""

    run: Positional[Path] = Path()
    """The run folder."""

    def execute(self) -> None:
        from perl.report.page import write_report

        if not any((self.run / name).exists() for name in ("config.toml", "metrics.jsonl")):
            raise UserError(
                f"{self.run} is no run folder: it has neither config.toml nor metrics.jsonl"
            )
        print(write_report(self.run))


@dataclass(frozen=True)
class Doctor(Command):
    """What is installed, which backend and attention would be used, and what to install for more."""

    def execute(self) -> None:
        from perl.training.doctor import examine

        if not examine():
            sys.exit(1)


def _resume(folder: RunFolder, asked: Config | None = None, steps: int | None = None) -> None:
    from perl.distributed import on_main_process

    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(locked(folder.root)))
        if steps is not None:
            on_main_process(partial(_extend, folder, steps))
        try:
            _go(_stored(folder, asked, steps), folder, resume=True)
        finally:
            # What a run replaced that was killed lies aside until now.
            if is_main_process() and folder.has_begun():
                folder.settle()


def _extend(folder: RunFolder, steps: int) -> None:
    from perl.training.saving.extend import extend

    for line in extend(folder, steps):
        print(line, file=sys.stderr)


def _stored(folder: RunFolder, asked: Config | None = None, steps: int | None = None) -> Config:
    """The settings of a run that is there; says so where others were asked for."""
    config = read_config(folder.config)
    if asked and steps is not None:
        train = replace(asked.train, steps=config.train.steps)
        asked = replace(asked, train=train, stages=config.stages)
    config = replace(config, run=replace(config.run, dir=str(folder.root)))
    ignored = differences(config, with_absolute_paths(asked)) if asked else []
    if ignored and is_main_process():
        print(f"going on with {folder.config}; not used: {', '.join(ignored)}", file=sys.stderr)
    return config


def _check_kept(command: Train, folder: RunFolder) -> None:
    """Refuse to overwrite a folder that the new run reads from."""
    from perl.data.streams import training_sources
    from perl.recipe import plan

    config, root = command.config, folder.root.resolve()
    sources = [("the recipe", command.recipe), ("model.path", config.model.path)]
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


def _check(config: Config) -> None:
    """Find mistakes before anything is written or removed; in the main process alone."""
    from perl.config import EVAL_SEED
    from perl.data.dataset import check_apart, load_examples
    from perl.data.streams import training_sources
    from perl.recipe import measured_function, plan
    from perl.training.components import check_setup

    check_named(config)
    datasets: dict[tuple[Any, ...], Any] = {}
    rewards: dict[tuple[Any, ...], set[tuple[str, ...]]] = {}
    measured_whole = set[tuple[Any, ...]]()
    for stage in plan(config):
        own = stage.config
        for source, _ in training_sources(own.data):
            key = ("train", source, own.data, own.permutation.text)
            if key not in datasets:
                datasets[key] = load_examples(source, own.data, "train", own.run.seed)
            if stage.kind == "filter" and source == own.data.train:
                _check_filter(stage.name, own, datasets[key].size)
                measured_whole.add(key)
                rewards.setdefault(key, set()).add((measured_function(own),))
            if stage.kind == "rl":
                rewards.setdefault(key, set()).add(own.reward.functions)
        key = ("eval", own.data.eval, own.data, own.permutation.text)
        if own.eval.examples and own.data.eval and stage.kind == "rl" and key not in datasets:
            datasets[key] = load_examples(
                own.data.eval, own.data, "test", EVAL_SEED, own.eval.examples
            )
    trained, measured = (
        [dataset for (use, *_), dataset in datasets.items() if use == wanted]
        for wanted in ("train", "eval")
    )
    for dataset in measured:
        check_apart(dataset, trained)
    asked = config.eval.examples and any(stage.kind == "rl" for stage in plan(config))
    if asked and not measured:
        log.info(
            "data.eval is empty, so nothing is measured before and after RL; data.eval = split:0.05 would hold that share "
            "of data.train out"
        )
    processor = check_setup(config)
    _check_rows(datasets, rewards, measured_whole, processor)
    _check_prompts(config, processor, datasets)


def _check_rows(
    datasets: Mapping[tuple[Any, ...], Any],
    rewards: Mapping[tuple[Any, ...], set[tuple[str, ...]]],
    measured_whole: Collection[tuple[Any, ...]],
    processor: Any,
) -> None:
    """Raise UserError for a faulty row, or warn of those that will be skipped, which a filter stage does not."""
    from perl.data.check import checked, checks_of
    from perl.data.dataset import RowDataset
    from perl.report.progress import Display

    for key, dataset in datasets.items():
        _, source, data, text = key
        if not isinstance(dataset, RowDataset):
            continue
        checks = checks_of(text, processor, rewards.get(key, ()))
        stop = data.on_error == "error" or key in measured_whole
        with Display() as display:
            found = checked(dataset, checks, display, stop)
        if len(found.faults) == found.rows:
            raise UserError(
                f"all rows of {source} are faulty, the first: {found.faults[0].message}"
            )
        if found.faults:
            log.warning(
                "%s: %d of %d rows are faulty and will be skipped, the first: %s (perl-rl check lists them)",
                *(source, len(found.faults), found.rows, found.faults[0].message),
            )


def _check_prompts(config: Config, processor: Any, datasets: Mapping[tuple[Any, ...], Any]) -> None:
    """Say what each RL stage asks, and warn where it is not what its rewards or its model read."""
    from perl.evaluation.preview import processor_of
    from perl.recipe import plan
    from perl.rollout.instruction import Instruction, tell_prompts

    with nullcontext(processor) if processor else processor_of(config) as reads:
        for stage in plan(config):
            if stage.kind == "rl":
                own = stage.config
                asked = Instruction.of(own).fitted(reads)
                reads.check_texts(Example("(data.instruction, data.system)", (), asked.add(()), ""))
                keys = [
                    k
                    for k in datasets
                    if (k[0], *k[2:]) == ("train", own.data, own.permutation.text)
                ]
                tell_prompts(own, asked, reads, [(key[1], datasets[key]) for key in keys])


def _check_filter(name: str, config: Config, size: int | None) -> None:
    """Whether there are questions to measure, and as many as are to be kept."""
    from perl.recipe import measured_function

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


def _go(config: Config, folder: RunFolder, resume: bool) -> None:
    from perl.distributed import warn_if_alone
    from perl.report.page import write_report
    from perl.report.progress import Display
    from perl.training.saving.hub import push
    from perl.training.summary import print_summary
    from perl.training.train import train

    warn_if_alone()
    try:
        with Display(enabled=is_main_process()) as display:
            summary = train(config, folder, display, resume)
        if is_main_process():
            report = write_report(folder.root)
            print_summary(summary, str(folder.root))
            print(f"report: {report}")
            if config.run.push_to_hub:
                print(f"pushed: {push(config, folder.root, summary)}")
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {_further(folder, resume)}") from None
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(_further(folder, resume))
        if isinstance(error, Exception) and (resume or folder.has_begun()):
            _tell(error, folder)
        raise


def _further(folder: RunFolder, resume: bool) -> str:
    """How to go on with what a run has left."""
    if resume or folder.has_begun():
        return f"go on with perl-rl resume {folder.root}"
    return f"no step was complete, so {folder.root} is not kept"


def _tell(error: Exception, folder: RunFolder) -> None:
    """Keep the trace in the run folder.

    Raises:
        RunFailed: in place of an error that would be shown as a trace.
    """
    trace = folder.keep_trace(error)
    if trace is None or explain(error) is not None:
        return
    error.add_note(f"the trace is in {trace}")
    raise RunFailed(summed_up(error)) from error
