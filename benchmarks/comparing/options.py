"""The options of `python -m benchmarks.compare`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks import json_file
from benchmarks.options import Parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: an option is unknown, or its value is no good.
    """
    parser = Parser(
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
        help='cases whose names hold all these words, as in "plan 64"; "and" is none',
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
    for name, revision in (("BASE", given.base), ("--head", given.head)):
        if revision is not None and not revision.strip():
            parser.error(f"{name} is empty: give a branch, a tag, a hash or HEAD~1")
    if given.check and given.head:
        parser.error("--check compares BASE with itself: leave out --head")
    if not 1 < given.threshold < math.inf:
        parser.error(f"--threshold {given.threshold:g}: give a finite ratio above 1")
    if not 0 < given.seconds_per_case < math.inf:
        parser.error(f"--seconds-per-case {given.seconds_per_case:g}: give finite seconds above 0")
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads {given.threads}: give a positive whole number")
    json_file.check(given.json)
    return given
