"""The command line: `perl-rl train | resume | evaluate | generate | report | profile | plan | config | doctor`."""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import fields, replace
from typing import Any

from perl.failures import explain, summed_up
from perl.files import is_main_process
from perl.types import Interrupted, RunFailed, UserError

COMMANDS = {
    "train": ("perl.training.commands:Train", "recipe", "train a model by a recipe"),
    "resume": (
        "perl.training.commands:Resume",
        "run",
        "go on with a run that was stopped or killed",
    ),
    "evaluate": (
        "perl.evaluation.commands:Evaluate",
        "model",
        "accuracy and consistency over image orders, or on public benchmarks",
    ),
    "compare": (
        "perl.evaluation.commands:Compare",
        "run",
        "two runs or models on the same held-out examples or benchmarks",
    ),
    "generate": ("perl.evaluation.generate:Generate", "model", "ask a model about images"),
    "label": (
        "perl.data.labelling.command:Label",
        "file",
        "which images of a data set may change places, by rules or a model",
    ),
    "check": (
        "perl.evaluation.check_command:Check",
        "data",
        "read a whole data set: faulty rows, and what it looks like",
    ),
    "filter": (
        "perl.evaluation.filter_command:Filter",
        "model",
        "keep questions of fitting difficulty for a model",
    ),
    "report": (
        "perl.training.commands:Report",
        "run",
        "write a run's report.html and pictures again",
    ),
    "profile": (
        "perl.training.profile:Profile",
        "recipe",
        "where the time of a training step goes, and a trace",
    ),
    "plan": (
        "perl.training.roofline.command:PlanSteps",
        "recipe",
        "what a training step takes on a GPU that need not be here, computed",
    ),
    "serve": (
        "perl.rollout.vllm.command:Serve",
        "recipe",
        "start the vLLM server that a run samples on",
    ),
    "preview": (
        "perl.evaluation.preview.command:Preview",
        "recipe or data",
        "what the model will be shown: of data in each order, of a recipe with what rewards give",
    ),
    "score": (
        "perl.evaluation.score_command:Score",
        "data",
        "rewards of completions that you have",
    ),
    "config": ("perl.training.commands:ShowConfig", "recipe", "print a recipe with every key"),
    "doctor": ("perl.training.commands:Doctor", "", "what is installed and what would be used"),
}
"""By its name where a command is, what it is told first without a name, and what it is good for.

tyro's own sub-commands would import every command's module, and what those need, to show or parse any of them; and the
defaults of `train` are known only once its recipe has been read.
"""
_WITHOUT_TARGET = {"-h", "--help", "--list", "--list-suites"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a run failed, 2 a user's mistake (one line says which), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _run(arguments)
    except KeyboardInterrupt as stop:
        code = _stopped(summed_up(stop, "stopped at once"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except RunFailed as error:
        code = _fail(summed_up(error, str(error)), debug, 1)
    except Exception as error:
        what = explain(error)
        if what is None:
            raise
        code = _fail(summed_up(error, what), debug, 2)
    # What failed in this process alone ends it at once: the others wait for it elsewhere.
    if code != 1 and "perl.distributed" in sys.modules:
        sys.modules["perl.distributed"].shutdown()
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
    _prepare("--debug" in rest)
    command = parse(name, rest)
    try:
        command.execute()
    except Interrupted as stop:
        return _stopped(str(stop))
    return 0


def parse(name: str, arguments: list[str]) -> Any:
    """The command's arguments as its dataclass; a recipe's values are the defaults of the overrides.

    Raises:
        UserError: a recipe that cannot be read, a missing argument, or an option that does not exist.
    """
    import tyro

    from perl.config import Config
    from perl.recipe import DEFAULT_RECIPE, check_config, either_length, without

    place, wanted, _ = COMMANDS[name]
    module, _, cls = place.partition(":")
    kind: Any = getattr(importlib.import_module(module), cls)
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if wanted.startswith("recipe"):
        first = first or DEFAULT_RECIPE
    elif wanted and first is None and not _WITHOUT_TARGET & set(arguments):
        raise UserError(
            f"perl-rl {name} needs a {wanted} first, as in: perl-rl {name} {wanted.upper()} [options]"
        )
    default, said = _with_recipe(kind(), first, wanted), io.StringIO()
    try:
        with redirect_stderr(said):
            parsed: Any = tyro.cli(kind, prog=f"perl-rl {name}", args=arguments, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"perl-rl {name}: {_in_one_line(said.getvalue())}") from None
    if wanted.startswith("recipe") and parsed.recipe != first:
        raise UserError(
            f"perl-rl {name}: the {wanted} {parsed.recipe} must stand first, as in: perl-rl {name} RECIPE [options]"
        )
    config = getattr(parsed, "config", None)
    if isinstance(config, Config):
        # What is given on the command line holds in every stage.
        given = _given_keys(arguments)
        keys = {
            key: getattr(config.train, key)
            for key in ("steps", "epochs")
            if f"train.{key}" in given
        }
        config = replace(config, train=replace(config.train, **either_length(keys)))
        config = without(config, given)
        check_config(config)
        parsed = replace(parsed, config=config)
        if hasattr(parsed, "given"):
            parsed = replace(parsed, given=frozenset(given))
    return parsed


def _given_keys(arguments: Sequence[str]) -> set[str]:
    """The `section.key`s that options name: `--train.lr=1` and `--filter.no-zero-variance` among them."""
    names = (a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--"))
    return {name.replace(".no_", ".") if ".no_" in name else name for name in names if "." in name}


def _in_one_line(box: str) -> str:
    """What an error of tyro's says. It is drawn as a box: a title, the error, what is similar, and where help is."""
    plain = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", box)
    _, said, *more = [" ".join(s.split()) for s in re.split(r"^.*[─-]{3}.*$", plain, flags=re.M)]
    said = said.rstrip(".")
    if found := re.match(r"Error parsing (--\S+): (.*?)(\['.*?'\]|['\"].*['\"]$)", said):
        kinds = {"int()": "must be a whole number", "to float": "must be a number"}
        must = next((m for kind, m in kinds.items() if kind in said), "cannot be read")
        return f"{found[1]} = {found[3].strip('[]')} {must}; see --help"
    if re.search(r": (true|false)\b", said, re.I):
        return f"{said}; switches take none: --section.key turns one on, --section.no-key off"
    if "--stages" in said:
        return f"{said}; stages stand in a recipe's file, as [[stages]]"
    near = re.search(r"(?:Perhaps you meant|Arguments similar to \S+): (--\S+)", " ".join(more))
    return f"{said}; " + (f"did you mean {near[1]}?" if near else "see --help")


def _with_recipe(default: Any, recipe: str | None, wanted: str) -> Any:
    """The command's defaults, from the recipe or the run where it takes one."""
    from perl.config import MeasureConfig
    from perl.model.sources import run_of
    from perl.recipe import DEFAULT_RECIPE, is_data, load_recipe, read_config

    if hasattr(default, "eval") and recipe and (run := run_of(recipe)):
        of_run = read_config(run / "config.toml").eval
        values = {f.name: getattr(of_run, f.name) for f in fields(MeasureConfig)}
        return replace(default, eval=MeasureConfig(**values) if of_run.examples else default.eval)
    if not hasattr(default, "config") or recipe is None:
        return default
    if wanted == "recipe or data":
        of_data = is_data(recipe)
    else:
        of_data = hasattr(default, "data") and not recipe.endswith(".toml")
    config = load_recipe(DEFAULT_RECIPE if of_data else recipe)
    if of_data:  # Nothing is held out of data that stand alone.
        config = replace(config, data=replace(config.data, eval=""))
    return replace(default, config=config)


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (*_, text) in COMMANDS.items()]
    return "\n".join(
        (
            "perl-rl: reinforcement learning of vision-language models over several images, in permuted orders",
            "",
            "usage: perl-rl COMMAND [options]    (perl-rl COMMAND --help tells more)",
            "",
            *lines,
            "",
            "first steps: perl-rl train demo; perl-rl generate runs/demo/seed-0 --example 0",
            "your own:    perl-rl train --data.train data/train.jsonl --model.path Qwen/Qwen2.5-VL-3B-Instruct",
        )
    )


def _prepare(debug: bool) -> None:
    """Before torch is loaded: how its threads wait and its CUDA memory grows, and whose messages are shown (ours; of others
    only errors)."""
    # libgomp's default is to spin for minutes: with another busy process a step of the demo took 60 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Rows differ in length from step to step: blocks of fixed size would be left over in pieces that nothing fits into.
    # torch reads the older name first.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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
    # Of checkpoints that a process reads by itself.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.basicConfig(
        level=logging.WARNING, format="%(name)s: %(message)s", handlers=[_ToStderr()]
    )
    # What processes have in common is told by the first.
    told = logging.INFO if is_main_process() else logging.WARNING
    for ours in ("perl", "perl_kernels"):
        logging.getLogger(ours).setLevel(logging.DEBUG if debug else told)
    # transformers and peft import torchao where it is installed. A filter, as a level would hide all of these loggers' warnings.
    for other, said in _NOT_OURS.items():
        logging.getLogger(other).addFilter(lambda record, said=said: said not in str(record.msg))


_NOT_OURS = {"torchao": "Failed to load ", "torch.utils._pytree": " is an Enum subclass "}
"""By the logger, warnings of torchao's import: of kernels for other uses, and of an API of torch's that it calls."""


class _ToStderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time, which a live progress bar replaces by itself."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(BrokenPipeError):
            print(self.format(record), file=sys.stderr)


def _fail(message: str, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _stopped(message: str) -> int:
    print(message, file=sys.stderr)
    return 130
