"""`perl-rl train`, `resume`, `report`, `config` and `doctor`. What is slow to import is imported where it is used."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

from perl.config import AboveZero, Command, Config, Count, Positive, Share
from perl.failures import explain, summed_up
from perl.files import RunFolder, is_main_process, resume_command
from perl.lock import locked, refuse_if_running
from perl.model.sources import checkpoints_in, newest_model
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
from perl.types import Interrupted, RunFailed, UserError


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
    """Go on in the run folder if it is there, with the settings that it began with, but for those that `perl-rl resume`
    takes."""
    given: Annotated[frozenset[str], Suppress] = frozenset()
    """The keys that the command line names."""

    def execute(self) -> None:
        from perl.data.streams import with_steps
        from perl.distributed import on_main_process
        from perl.training.checks import check_kept, check_run

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
            anew = {key: attrgetter(key)(config) for key in ANEW if key in self.given}
            _resume(folder, anew, config)
            return
        if self.overwrite:
            on_main_process(partial(check_kept, self.config, self.recipe, folder.root))
        on_main_process(partial(check_run, config))
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


@dataclass(frozen=True, kw_only=True)
class TrainAnew:
    """What a run may be given anew; empty: as before."""

    steps: Count | None = None
    """Steps of its last RL stage in all, also of a run that has finished."""
    tokens_per_micro_batch: Positive | None = None
    """Most tokens of one packed row."""
    sharding: Literal["none", "fsdp"] | None = None
    """Whether every process holds all weights, gradients and optimizer state, or they are spread over processes."""
    shards: Count | None = None
    """Processes that hold one copy of the weights together; 0: those of a node."""
    reshard_after_forward: bool | None = None
    """Let go of a layer's weights between its forward and its backward."""
    shard_vision: bool | None = None
    """Shard the vision tower too."""
    cpu_offload: bool | None = None
    """Keep shards, their gradients and the optimizer's state in the host's memory."""


@dataclass(frozen=True, kw_only=True)
class RolloutAnew:
    """What takes another share of memory, or samples elsewhere; empty: as before."""

    kv_cache_tokens: Positive | None = None
    """Most tokens whose keys and values are kept at once."""
    url: tuple[str, ...] | None = None
    """Addresses of vLLM servers."""
    vllm: str | None = None
    """The executable that starts one."""
    gpu_memory: AboveZero | None = None
    """Share of a GPU's memory that it takes."""
    requests: Positive | None = None
    """Most requests under way at a server."""
    timeout: AboveZero | None = None
    """Seconds after which a server that answers nothing counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class ModelAnew:
    """What takes another share of memory; empty: as before."""

    gradient_checkpointing: Share | None = None
    """Share of the layers whose activations are computed again."""


@dataclass(frozen=True)
class Resume(Command):
    """Go on with a run that was stopped or killed, from its newest whole checkpoint; or, with more --train.steps, with
    one that has finished. One that memory did not suffice for may be given sizes that take less, or another sharding."""

    run: Positional[Path] = Path()
    """The run folder."""
    train: TrainAnew = field(default_factory=TrainAnew)
    rollout: RolloutAnew = field(default_factory=RolloutAnew)
    model: ModelAnew = field(default_factory=ModelAnew)

    def execute(self) -> None:
        folder = RunFolder(self.run)
        if not folder.config.exists():
            raise UserError(
                f"{self.run} is no run folder: it has no config.toml; start one with perl-rl train"
            )
        _resume(
            folder, {key: value for key in ANEW if (value := attrgetter(key)(self)) is not None}
        )


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
    """What is installed, which backend and attention would be used, and what to install for more; with --url what a
    running vLLM server lacks."""

    url: tuple[str, ...] = ()
    """Addresses of vLLM servers to look at, as in http://127.0.0.1:8000."""

    def execute(self) -> None:
        from perl.training.doctor import examine

        if not examine(self.url):
            sys.exit(1)


ANEW = (
    "train.steps",
    "train.tokens_per_micro_batch",
    "train.sharding",
    "train.shards",
    "train.reshard_after_forward",
    "train.shard_vision",
    "train.cpu_offload",
    "rollout.kv_cache_tokens",
    "rollout.url",
    "rollout.vllm",
    "rollout.gpu_memory",
    "rollout.requests",
    "rollout.timeout",
    "model.gradient_checkpointing",
)
"""Keys that a run may be given anew."""


def _resume(folder: RunFolder, anew: dict[str, Any], asked: Config | None = None) -> None:
    """Go on with a run; `anew` has values by keys of `ANEW`."""
    from perl.distributed import on_main_process

    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(locked(folder.root)))
        on_main_process(partial(_change, folder, anew))
        try:
            _go(_stored(folder, asked, "train.steps" in anew), folder, resume=True)
        finally:
            # What a run replaced that was killed lies aside until now.
            if is_main_process() and folder.has_begun():
                folder.settle()


def _change(folder: RunFolder, anew: dict[str, Any]) -> None:
    from perl.training.saving.extend import extend, resize

    sizes = {key: value for key, value in anew.items() if key != "train.steps"}
    lines = resize(folder, sizes)
    if "train.steps" in anew:
        lines += extend(folder, anew["train.steps"])
    for line in lines:
        print(line, file=sys.stderr)


def _stored(folder: RunFolder, asked: Config | None, extended: bool) -> Config:
    """The settings of a run that is there; says so where others were asked for."""
    config = read_config(folder.config)
    config = replace(config, run=replace(config.run, dir=str(folder.root)))
    if asked and extended:
        train = replace(asked.train, steps=config.train.steps)
        asked = replace(asked, train=train, stages=config.stages)
    ignored = differences(config, with_absolute_paths(asked)) if asked else []
    if ignored and is_main_process():
        print(f"going on with {folder.config}; not used: {', '.join(ignored)}", file=sys.stderr)
    return config


def _go(config: Config, folder: RunFolder, resume: bool) -> None:
    from perl.distributed import naming_missing, warn_if_alone
    from perl.report.page import write_report
    from perl.report.progress import Display
    from perl.training.saving.hub import push
    from perl.training.summary import print_summary
    from perl.training.train import train

    warn_if_alone()
    try:
        with Display(enabled=is_main_process()) as display, naming_missing():
            summary = train(config, folder, display, resume)
        if is_main_process():
            report = write_report(folder.root)
            print_summary(summary, str(folder.root))
            print(f"report: {report}")
            if config.run.push_to_hub:
                print(f"pushed: {push(config, folder.root, summary)}")
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {_further(config, folder, resume)}") from None
    except (Exception, KeyboardInterrupt) as error:
        told = any(note.startswith("saved: ") for note in getattr(error, "__notes__", ()))
        early = resume and not told
        if early and (found := checkpoints_in(folder.checkpoints)):
            error.add_note(f"saved: {found[-1]}")
        # A run that refuses to go on would do so again.
        if not (early and isinstance(error, UserError)):
            error.add_note(_further(config, folder, resume))
        if isinstance(error, Exception) and (resume or folder.has_begun()):
            _tell(error, folder)
        raise


def _further(config: Config, folder: RunFolder, resume: bool) -> str:
    """How to go on with what a run has left."""
    if resume or folder.has_begun():
        alone = f", or in one process with perl-rl resume {folder.root} --train.sharding none"
        sharded = config.train.sharding != "none"
        return f"go on with {resume_command(folder.root)}{alone if sharded else ''}"
    return f"no step was complete, so {folder.root} is not kept"


def _tell(error: Exception, folder: RunFolder) -> None:
    """Keep the trace in the run folder.

    Raises:
        RunFailed: in place of an error that would be shown as a trace.
    """
    trace = folder.keep_trace(error)
    if trace is None or isinstance(error, RunFailed) or explain(error) is not None:
        return
    error.add_note(f"the trace is in {trace}")
    raise RunFailed(summed_up(error)) from error
