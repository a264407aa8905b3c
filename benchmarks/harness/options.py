"""What the command lines of the benchmarks share: a mistake is one line, and a report is a JSON file."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from perl.files import write_json
from perl.types import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def count(text: str) -> int:
    """A whole number above 0, for `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0, for `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def device_of(wanted: str | None) -> str:
    """`cuda` if there is one and nothing else is wanted.

    Raises:
        UserError: a GPU is wanted that is not there.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device cuda: there is no GPU that PyTorch can use")
    return wanted or ("cuda" if there else "cpu")


def environment() -> dict[str, str]:
    """For processes in which something is timed, where the user's own does not say otherwise."""
    return {
        # Threads that wait must not spin where another process is timed.
        "GOMP_SPINCOUNT": "1000",
        # glibc gives large blocks back to the system or keeps them, by what came before; a page fault for each page of
        # them makes the difference of a CPU's times. Here they are kept.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        # What a case leaves behind would keep a larger one from its memory.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # What a library would fetch is no part of a measurement.
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }


def step_parser(
    description: str,
    quick: str,
    models: Sequence[str],
    default_models: str,
    numbers: Mapping[str, str],
) -> Parser:
    """The options that the benchmarks of whole training steps have in common; `numbers` are theirs, with a help text."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--json", type=Path, metavar="FILE", help="write the report here")
    add("--quick", action="store_true", help=quick)
    add(
        "--model",
        help=f"{', '.join(models)} (random weights), or the folder of a Qwen-VL model; default: {default_models}",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and all that is computed with them; default: bfloat16 on cuda, float32 on cpu",
    )
    for name, said in numbers.items():
        several = {"nargs": "+"} if name == "images" else {}
        add(f"--{name}", type=count, metavar="N", help=said, **several)
    add("--seed", type=int, default=0, metavar="N", help="of all that is random; default: 0")
    return parser


def step_program(
    parse: Callable[[], tuple[Any, Path | None]],
    measure: Callable[[Any], dict[str, Any]],
    shown: Callable[[dict[str, Any]], Iterable[str]],
) -> int:
    """From options to a printed table and a report in a file; gives the exit code."""

    def run() -> int:
        setting, file = parse()
        report = measure(setting)
        print("\n\n".join(shown(report)))
        if file:
            write_json(file, report)
        return 0

    return exit_code(run)


def exit_code(run: Callable[[], int]) -> int:
    """Of a program: what `run` returns, 2 for bad input or a file that cannot be written, 1 for a wrong result, each said in one line."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"error: {error}; nothing is timed", file=sys.stderr)
        return 1
    except OSError as error:  # The disk is full, or a folder is gone.
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_writable(file: Path | None) -> None:
    """Before anything is measured that could then not be kept.

    Raises:
        UserError: no report can be written there.
    """
    if file is None:
        return
    try:
        if (file.exists() and not file.is_file()) or not file.absolute().parent.is_dir():
            raise UserError(f"--json {file}: give a file in a folder that is there")
        with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise UserError(f"--json {file}: it cannot be written ({error.strerror})") from error


def busy_line() -> list[str]:
    """A line for the reader of a table if others use this machine's cores."""
    load = os.getloadavg()[0]
    if load <= (os.cpu_count() or 1) + 1:
        return []
    return [f"This machine is busy (load {load:.1f}): the seconds say little."]
