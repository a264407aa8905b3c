"""Public benchmarks, read from local files laid out as they are published; one file each.

`SUITES` has them in the sequence of the paper's Table 1 (arXiv 2506.14907). `base` says what a benchmark is, `reading` what a
reply answers, by the one reader of `perl.rewards.reading`, `measure` asks a model, `answers` keeps what it said, `summary` and `comparison` make the tables.

To add one: a file that makes an `Example` of a row (`base.make_example`) and judges a reply (`reading.judge_option`,
`judge_value`, or a rule of its own), with a `SUITE` at its end, and its module in `SUITES` below.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from perl.evaluation.suites import (
    blink,
    mantis_eval,
    mathverse,
    mathvision,
    mathvista,
    mmiu,
    mv_math,
    remi,
)
from perl.evaluation.suites.base import Suite
from perl.types import UserError

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (mantis_eval, blink, mmiu, mathvista, mathverse, mathvision, remi, mv_math)
}


def choose_suites(names: Sequence[str]) -> list[Suite]:
    """The benchmarks of those names, `all` for every one, each once and in the table's sequence.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name != "all" and name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"choose among {', '.join(SUITES)}, or all"
            )
            raise UserError(f"--suite {name}: there is no such benchmark; {hint}")
    return [suite for name, suite in SUITES.items() if name in names or "all" in names]


def layout(root: str = "DIR") -> str:
    """What is expected where under `--suite-root`, and where to get it."""
    return "\n\n".join(
        "\n".join(
            (
                f"{suite.name}: {suite.title}, {suite.expected} items",
                f"  from {suite.home}",
                *(f"    {root}/{suite.name}/{p}" for p in (*suite.files, *suite.folders)),
            )
        )
        for suite in SUITES.values()
    )
