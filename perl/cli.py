"""The command line: `perl-rl train | resume | evaluate | generate | report | profile | config | doctor`."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from perl.config import Config, MeasureConfig
from perl.types import UserError


@dataclass(frozen=True)
class _Common:
    debug: bool = False
    """Show the whole trace of an error, and debug messages."""


@dataclass(frozen=True)
class Train(_Common):
    """Train by a recipe: cold start, evaluation, RL, evaluation, report. Every key of the recipe can be
    overridden, as in `perl-rl train demo --train.steps 5 --run.dir runs/short`."""

    recipe: Positional[str] = "demo"
    """A bundled recipe's name (see `perl-rl config --list`) or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    overwrite: bool = False
    """Replace the run folder if it is there."""
    resume: bool = False
    """Go on in the run folder if it is there."""


@dataclass(frozen=True)
class Resume(_Common):
    """Go on with a run that was stopped or killed, from its newest whole checkpoint."""

    run: Positional[Path] = Path()
    """The run folder."""


@dataclass(frozen=True)
class Evaluate(_Common):
    """Accuracy and consistency of a model on held-out examples, over all or many orders of their images; or, with
    --suite, its answers to public benchmarks, as in
    `perl-rl evaluate runs/first --suite blink --suite-root suites --output runs/first/suites`."""

    model: Positional[str] = ""
    """A run folder (its last model and its settings), a model folder, or a hub name."""
    data: str = ""
    """JSONL or Parquet file, hub dataset or bundled:digits; empty: the run's."""
    eval: MeasureConfig = field(default_factory=MeasureConfig)
    max_new_tokens: int | None = None
    """Longest completion; empty: the run's, 2048 with --suite."""
    max_prompt_tokens: int | None = None
    """Longest prompt, image tokens included; empty: the run's data.max_prompt_tokens."""
    overlong: Literal["error", "drop"] | None = None
    """What to do with a longer prompt; a dropped one is left out, with --suite it counts as wrong; empty: the run's."""
    output: Path | None = None
    """JSON file for the numbers, by task and by example; with --suite a folder for answers, numbers and table."""
    suite: tuple[str, ...] = ()
    """Public benchmarks: mantis_eval, blink, mmiu, mathvista, mathverse, mathvision, remi, mv_math, or all."""
    suite_root: Path | None = None
    """Folder with one sub-folder for each benchmark, laid out as it is published."""
    list_suites: bool = False
    """Only print what is expected in the sub-folders and where to get it."""
    text: Literal["slots", "references"] | None = None
    """How text and images are kept consistent in other orders of one's own data; empty: the run's."""
    instruction: Literal["official", "think"] = "official"
    """How a benchmark's question asks for the answer: as its authors do, or with PeRL's think-and-box instruction."""
    orders: int = 1
    """With --suite: orders of the images where a benchmark lets them move, the official one first."""
    limit: int | None = None
    """With --suite: only the first items of each benchmark."""
    extract: Literal["rules", "llm"] = "rules"
    """Who reads the answer of a completion that boxes none: rules, or the model behind PERL_LLM_URL."""
    published: bool = False
    """With --suite: the rows of the PeRL paper's Table 1 in the table as well."""


@dataclass(frozen=True)
class Compare(_Common):
    """Difference of two models' answers to the same benchmarks, with its interval and probability."""

    first: Positional[Path] = Path()
    """A folder that `perl-rl evaluate --suite` wrote."""
    second: Positional[Path | None] = None
    """Another one."""


@dataclass(frozen=True)
class Generate(_Common):
    """Ask a model about images, or about a held-out example of its run."""

    model: Positional[str] = ""
    """A run folder (its last model), a model folder, or a hub name."""
    prompt: str = ""
    """The question; `<image>` marks where each image goes, else they stand before it."""
    images: tuple[Path, ...] = ()
    """Image files, in the order of their slots."""
    example: int | None = None
    """Number of a held-out example of the run's data, instead of prompt and images."""
    n: int = 1
    """Completions."""
    temperature: float | None = None
    """0: the most likely completion; empty: 0 for one completion, 1 for several."""
    max_new_tokens: int | None = None
    """Longest completion; empty: the run's."""
    seed: int = 0
    """Of the sampling."""


@dataclass(frozen=True)
class Label(_Common):
    """Say for every row of a data set which images may change places and whether its answer then follows, and write
    the rows with `kind`, `should_change` and `label_reason`. Stopped, the same command goes on where it was."""

    data: Positional[str] = ""
    """JSONL or Parquet file, or hub dataset."""
    output: Path | None = None
    """JSONL file; empty: NAME.labelled.jsonl beside the data."""
    labeller: Literal["rules", "llm", "rules+llm"] = "rules"
    """Rules over the text; the model behind PERL_LLM_URL; or that model where the rules are unsure."""
    text: Literal["slots", "references"] = "slots"
    """What permutation.text of the training will be: mentions of images stay, or follow their images."""
    rephrase: bool = False
    """Let the model behind PERL_LLM_URL turn open questions over several images into multiple choice first."""
    relabel: bool = False
    """Replace labels that the data has already."""
    overwrite: bool = False
    """Start again instead of going on with the output."""
    limit: int | None = None
    """Only the first rows."""


@dataclass(frozen=True)
class Filter(_Common):
    """Roll every question of a data set out with a model, and keep a selection whose accuracies have the wanted
    histogram. Stopped, the same command goes on where it was."""

    model: Positional[str] = ""
    """A run folder (its last model and its settings), a model folder, or a hub name."""
    data: str = ""
    """JSONL or Parquet file, hub dataset or bundled:digits; empty: the training data of the run."""
    rollouts: int = 10
    """Completions per question."""
    orders: int = 1
    """Image orders that they are spread over; 1: the original one."""
    measure: str | None = None
    """Reward function that they are scored by: one of the run's by its name, or any other, written as in
    reward.functions; empty: the run's filter.measure."""
    histogram: str = "paper"
    """Target shares of the accuracies 0.0, 0.1, ..., 1.0: paper (its Fig. 3b), uniform, or eleven numbers with commas."""
    size: int | None = None
    """Questions to keep; empty: as many as meet the histogram without repeats."""
    repeat: bool = False
    """Take questions of accuracies that are too rare more than once."""
    output: Path | None = None
    """JSONL file; empty: NAME.filtered.jsonl beside the data."""
    accuracies: Path | None = None
    """JSONL file with the measurements; empty: NAME.accuracies.jsonl beside the data."""
    limit: int | None = None
    """Measure a sample of this many questions; endless bundled ones need it."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int | None = None
    """Longest completion; empty: the run's."""
    max_prompt_tokens: int | None = None
    """Longest prompt, image tokens included; empty: the run's data.max_prompt_tokens."""
    overlong: Literal["error", "drop"] | None = None
    """What to do with a longer prompt; a dropped one is left out; empty: the run's."""
    seed: int = 0
    """Of the sampling and of the selection."""
    overwrite: bool = False
    """Measure again what another model or other settings have measured."""
    text: Literal["slots", "references"] | None = None
    """How text and images are kept consistent in other orders; empty: the run's."""


@dataclass(frozen=True)
class Report(_Common):
    """Write report.html and the pictures of a run again, also of one that is not finished."""

    run: Positional[Path] = Path()
    """The run folder."""


@dataclass(frozen=True)
class Profile(_Common):
    """Where the time of a training step goes, by stage, and a trace of one: takes a few steps of a recipe's first RL
    stage from the recipe's initial model, without cold start and evaluation, and keeps neither weights nor metrics.
    Groups that filter.* would drop are kept, so that every step has something to train on. Every key of the
    recipe can be overridden, as in `perl-rl profile demo --train.examples-per-step 4`."""

    recipe: Positional[str] = "demo"
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    steps: int = 3
    """Steps that are timed, without torch.profiler, which would slow the host down."""
    warmup: int = 1
    """Steps before them, in no figure."""
    traced: int = 1
    """Steps behind them under torch.profiler: operators, a GPU's times, the trace; 0: none."""
    forwards: int = 96
    """How many forward passes of the language model a traced step's rollout is traced for, and a sixteenth as many rows
    of its log-probs and of its update: a trace that can still be opened."""
    stage: str = ""
    """Name of another stage of the recipe, as in --stage cold_start; empty: the first of RL."""
    output: Path | None = None
    """Folder for profile.json, config.toml and the trace; empty: runs/profile-RECIPE."""
    overwrite: bool = False
    """Replace the profile that is there."""
    shapes: bool = False
    """Record the shapes of operators' inputs, and tell operators apart by them."""
    memory: bool = False
    """Record allocations in the trace."""
    stacks: bool = False
    """Record the lines of Python that called, in the trace; slow."""


@dataclass(frozen=True)
class ShowConfig(_Common):
    """Print a recipe with every key, overrides included, as TOML."""

    recipe: Positional[str] = "demo"
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    list: bool = False
    """Only the names of the bundled recipes."""


@dataclass(frozen=True)
class Doctor(_Common):
    """What is installed, which backend and attention would be used, and what to install for more."""


COMMANDS: dict[str, tuple[type[_Common], str]] = {
    "train": (Train, "train a model by a recipe"),
    "resume": (Resume, "go on with a run that was stopped or killed"),
    "evaluate": (Evaluate, "accuracy and consistency over image orders, or on public benchmarks"),
    "compare": (Compare, "two models' answers to the same benchmarks"),
    "generate": (Generate, "ask a model about images"),
    "label": (Label, "which images of a data set may change places, by rules or a model"),
    "filter": (Filter, "keep questions of fitting difficulty for a model"),
    "report": (Report, "write a run's report.html and pictures again"),
    "profile": (Profile, "where the time of a training step goes, and a trace"),
    "config": (ShowConfig, "print a recipe with every key"),
    "doctor": (Doctor, "what is installed and what would be used"),
}


_WITHOUT_TARGET = {"-h", "--help", "--list", "--list-suites"}

# What the extra `train` installs, by the names they are imported by.
_TRAIN_PACKAGES = {
    *("transformers", "accelerate", "datasets", "huggingface_hub", "tokenizers", "peft"),
    *("safetensors", "sklearn", "scipy", "tensorboard", "matplotlib", "jinja2"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a user's mistake (one line says which), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    trains = arguments[:1] in (["train"], ["resume"])
    try:
        code = _run(arguments)
    except UserError as error:
        code = _fail(str(error), debug)
    except KeyboardInterrupt:
        further = "; go on from the last checkpoint, if there is one, with perl-rl resume RUN"
        code = _stopped(f"stopped at once{further if trains else ''}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _fail(_about_files(error), debug)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_PACKAGES:
            raise
        code = _fail(f"{package} is not installed; pip install 'perl-rl[train]'", debug)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not to be imported here
            raise
        code = _fail(
            "out of GPU memory: lower train.tokens_per_micro_batch or rollout.batch_size, or set "
            "model.gradient_checkpointing"
            + (", and go on with perl-rl resume RUN; the last checkpoint stands" if trains else ""),
            debug,
        )
    if "perl.processes" in sys.modules:
        sys.modules["perl.processes"].part()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if not arguments:
        raise UserError(f"no command; give one of {', '.join(COMMANDS)}, see perl-rl --help")
    if arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"perl-rl {version('perl-rl')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(
            f"unknown command {name}: "
            + (f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}")
        )
    command = parse(name, rest)
    _prepare(command.debug)
    from perl import (
        commands,
        commands_evaluate,
        commands_filter,
        commands_label,
        commands_profile,
    )
    from perl.interrupt import Interrupted

    actions: dict[type[_Common], Callable[[Any], None]] = {
        Train: commands.train_command,
        Resume: commands.resume_command,
        Evaluate: commands_evaluate.evaluate_command,
        Compare: commands_evaluate.compare_command,
        Generate: commands.generate_command,
        Label: commands_label.label_command,
        Filter: commands_filter.filter_command,
        Report: commands.report_command,
        Profile: commands_profile.profile_command,
        ShowConfig: commands.config_command,
        Doctor: commands.doctor_command,
    }
    try:
        actions[type(command)](command)
    except Interrupted as stop:
        return _stopped(str(stop))
    return 0


def parse(name: str, arguments: list[str]) -> Any:
    """The command's arguments as its dataclass; a recipe's values are the defaults of the overrides.

    Raises:
        UserError: a recipe that cannot be read, a missing argument, or an option that does not exist.
    """
    import tyro

    kind, _ = COMMANDS[name]
    target = {
        Train: "recipe",
        Profile: "recipe",
        ShowConfig: "recipe",
        Resume: "run",
        Report: "run",
        Evaluate: "model",
        Compare: "folder",
        Generate: "model",
        Label: "file",
        Filter: "model",
    }
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    wanted = target.get(kind)
    if wanted and first is None and not _WITHOUT_TARGET & set(arguments):
        raise UserError(
            f"perl-rl {name} needs a {wanted} first, as in: perl-rl {name} {wanted.upper()} [options]"
        )
    default = _with_recipe(kind(), first)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed, unknown = tyro.cli(
                kind,
                prog=f"perl-rl {name}",
                args=arguments,
                default=default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(
            f"perl-rl {name}: {_first_sentence(said.getvalue())}; see perl-rl {name} --help"
        ) from None
    if unknown:
        raise UserError(f"perl-rl {name}: " + _unknown_option(unknown[0], default))
    if isinstance(parsed, Train | Profile | ShowConfig):
        from perl.recipe import check_config, without

        # What is given on the command line holds in every stage.
        parsed = replace(parsed, config=without(parsed.config, _given_keys(arguments)))
        check_config(parsed.config)
    return parsed


def _given_keys(arguments: Sequence[str]) -> set[str]:
    """The `section.key`s that options name: `--train.lr=1` and `--filter.no-zero-variance` among them."""
    names = (a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--"))
    return {name.replace(".no_", ".") if ".no_" in name else name for name in names if "." in name}


def _first_sentence(box: str) -> str:
    """What an error message of tyro's says: it stands between a title and help text, divided by rules."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    _, said, *_ = [*re.split(r"^.*[─-]{3}.*$", plain, flags=re.MULTILINE), ""]
    return " ".join(said.replace("│", " ").split()).rstrip(".")


def _with_recipe(default: Any, recipe: str | None) -> Any:
    """The command's defaults, from the recipe or the run where it takes one."""
    from perl.recipe import load_recipe, read_config

    if isinstance(default, Evaluate) and recipe and (Path(recipe) / "config.toml").exists():
        of_run = read_config(Path(recipe) / "config.toml").eval
        values = {f.name: getattr(of_run, f.name) for f in fields(MeasureConfig)}
        return replace(default, eval=MeasureConfig(**values) if of_run.examples else default.eval)
    if not isinstance(default, Train | Profile | ShowConfig) or recipe is None:
        return default

    return replace(default, config=load_recipe(recipe))


def _unknown_option(option: str, default: Any) -> str:
    """`--train.lrr` is unknown; did you mean `--train.lr`?"""
    if option.lower() in ("true", "false"):
        return f"unexpected argument {option}: switches take none; --section.key turns one on, --section.no-key off"
    if not option.startswith("-"):
        return f"unexpected argument {option}; see --help"
    name = option.split("=")[0].replace("_", "-")
    if name == "--stages" and hasattr(default, "config"):
        return "unknown option --stages: stages stand in a recipe's file, as [[stages]]"
    known = _options(default, "")
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _options(value: Any, prefix: str) -> list[str]:
    out = []
    for f in fields(value):
        if isinstance(value, Config) and f.name == "stages":
            continue
        inner = getattr(value, f.name)
        name = "" if isinstance(inner, Config) else f"{prefix}{f.name}".replace("_", "-")
        out += _options(inner, f"{name}." if name else "") if is_dataclass(inner) else [f"--{name}"]
    return out


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        (
            "perl-rl: reinforcement learning of vision-language models over several images, in permuted orders",
            "",
            "usage: perl-rl COMMAND [options]    (perl-rl COMMAND --help tells more)",
            "",
            *lines,
            "",
            "first steps: perl-rl train demo; perl-rl generate runs/demo/seed-0 --example 0",
        )
    )


def _prepare(debug: bool) -> None:
    """Before torch is loaded: how its threads wait, and whose messages are shown (ours; of others only errors)."""
    # libgomp's default is to spin for minutes: with another busy process a step of the demo took 60 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not debug:
        # Of what our dependencies will change in each other one day.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"transformers|peft|accelerate"
        )
    logging.basicConfig(
        level=logging.WARNING, format="%(name)s: %(message)s", handlers=[_ToStderr()]
    )
    for ours in ("perl", "perl_kernels"):
        logging.getLogger(ours).setLevel(logging.DEBUG if debug else logging.INFO)


class _ToStderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time, which a live progress bar replaces by itself."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(BrokenPipeError):
            print(self.format(record), file=sys.stderr)


def _fail(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _stopped(message: str) -> int:
    print(message, file=sys.stderr)
    return 130


def _about_files(error: OSError) -> str:
    """What a disk, a folder or a file would not do, and what helps."""
    what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{what}; free some space and go on with perl-rl resume RUN, the last checkpoint stands"
        )
    return f"{what}; choose a folder or file that can be read and written (--debug shows where)"
