"""The options of `python -m benchmarks.compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from perl.types import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: an option is unknown, or its value is no good.
    """
    parser = _Parser(
        prog="python -m benchmarks.compare",
        description="Whether the working tree is slower than a revision, by the ratio of times measured in turn.",
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="a branch, a tag, a hash or HEAD~1")
    add("--head", metavar="REVISION", help="compare this revision; default: the working tree")
    add("--check", action="store_true", help="compare BASE with itself, to learn the noise")
    add(
        "--only",
        default="",
        metavar="WORDS",
        help='cases whose names hold all these words, as in "plan 64"',
    )
    add("--quick", action="store_true", help="fewer and smaller cases")
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="where tensors live; default: cuda if there is one",
    )
    add("--threads", type=int, metavar="N", help="CPU threads of PyTorch on each side")
    add(
        "--seconds-per-case",
        type=float,
        default=6.0,
        metavar="S",
        help="rounds of a case begin within this time, but six of each side are always made; default: 6",
    )
    add(
        "--threshold",
        type=float,
        default=1.05,
        metavar="RATIO",
        help="smaller differences are none; default: 1.05",
    )
    add("--json", type=Path, metavar="FILE", help="write everything measured here")
    given = parser.parse_args(arguments)
    if given.check and given.head:
        parser.error("--check compares BASE with itself: leave out --head")
    if not given.threshold > 1:
        parser.error(f"--threshold {given.threshold:g}: give a ratio above 1")
    if not given.seconds_per_case > 0:
        parser.error(f"--seconds-per-case {given.seconds_per_case:g}: give seconds above 0")
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads {given.threads}: give a positive whole number")
    if given.json and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        parser.error(f"--json {given.json}: give a file in a folder that is there")
    return given
