"""A short table of results for the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import Case, by_op
from benchmarks.results_file import Results, Row, check
from benchmarks.tables import mebibytes, milliseconds, percent, plain, table, times

_MOST_ROWS = 12
_MAIN_MODEL = "Qwen2.5-VL-3B"
"""Of the README's recipe."""
_ABSENT = ("missing", "left out")
"""Did not take part; whoever failed did."""


def readme_table(results: Mapping[str, Any] | Results) -> str:
    """The operations that others do too, each at its main case: ours, and the others beside it.

    The main case is one of the main model if there is one; among these, the first of those in which most
    providers were timed.

    Args:
        results: what a file of results holds, read or not.

    Raises:
        UserError: these are no whole results.
    """
    lines = []
    for op, cases in by_op(check(results).rows).items():
        case = max((c for c in cases if c.reference), key=_weight, default=None)
        if case and case.reference and not all(row.ours for row in case.rows):
            lines.append(_line(op, case, case.reference))
    header = ["", "ours", "ms", "of the bound", "MiB", "others: time over ours, MiB"]
    return table(header, lines[:_MOST_ROWS], words=(0, 1, 5))


def _weight(case: Case) -> tuple[bool, int]:
    """max takes the first of equals."""
    of_main_model = str(case.rows[0].shape.get("model", "")).startswith(_MAIN_MODEL)
    return of_main_model, sum(row.timed for row in case.rows)


def _line(op: str, case: Case, ours: Row) -> list[str]:
    took_part = [row for row in case.ordered if not row.ours and row.status not in _ABSENT]
    return [
        f"{plain(op)}<br>{plain(case.name)}",
        plain(ours.provider),
        milliseconds(ours.median),
        percent(ours.fraction) + (" %" if ours.fraction else ""),
        mebibytes(ours.peak_extra_bytes),
        "<br>".join(_other(case, row) for row in took_part) or "none timed",
    ]


def _other(case: Case, row: Row) -> str:
    if not row.timed:
        return f"{plain(row.provider)} {plain(row.status)}"
    memory = mebibytes(row.peak_extra_bytes)
    return f"{plain(row.provider)} {times(case.ratio(row))}, {memory}"
