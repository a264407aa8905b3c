"""A short table of results for the README."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.report.cases import Case, by_op
from benchmarks.report.results_file import Results, Row
from benchmarks.report.tables import mebibytes, milliseconds, plain, table, times

_MOST_ROWS = 14
_MAIN_MODEL = "Qwen2.5-VL-3B"
"""Of the README's recipe."""
_ABSENT = ("missing", "left out")
"""Did not take part; whoever failed did."""
_BASELINES = ("PyTorch, eager", "PyTorch, torch.compile")
_LEGEND = (
    "Time over ours: above 1 the other is slower; ~: turns lie on both sides of 1, which is no difference. MiB: the most "
    "memory held at one time beyond the inputs."
)


def readme_table(results: Results) -> str:
    """The operations that others do too, each at its main case: a row for ours beside each of the others.

    The main case is one of the main model if there is one; among these, the first of those in which most
    providers were timed. The others are PyTorch's eager and compiled code and the best of each package. Where all
    would be too many, the fastest of each operation come first, then the second fastest, and so on.
    """
    chosen: list[tuple[Case, list[Row]]] = []
    for cases in by_op(results.rows).values():
        case = max((c for c in cases if c.reference), key=_weight, default=None)
        if case and (others := _others(case)):
            chosen.append((case, others))
    ranks = itertools.zip_longest(*(others for _, others in chosen))
    found = [row for row in itertools.chain.from_iterable(ranks) if row]
    kept, dropped = found[:_MOST_ROWS], len(found) - _MOST_ROWS
    lines = [
        line
        for case, others in chosen
        for line in _lines(case, [row for row in others if any(row is k for k in kept)])
    ]
    header = ["operation", "ours, ms", "the other", "time over ours", "ours, MiB", "its MiB"]
    more = (
        f" Left out: {dropped} more, no faster than those shown beside them." if dropped > 0 else ""
    )
    return f"{table(header, lines, words=(0, 2))}\n\n{_LEGEND}{more}"


def _weight(case: Case) -> tuple[bool, int]:
    """max takes the first of equals."""
    of_main_model = str(case.rows[0].shape.get("model", "")).startswith(_MAIN_MODEL)
    return of_main_model, sum(row.timed for row in case.rows)


def _others(case: Case) -> list[Row]:
    """The fastest first; of a package only its best, but for PyTorch's two baselines."""
    best: dict[str, Row] = {}
    for row in case.ordered:
        if not row.ours and row.status not in _ABSENT:
            name = row.provider if row.provider in _BASELINES else row.package_name
            best.setdefault(name or row.provider, row)
    return list(best.values())


def _lines(case: Case, others: list[Row]) -> Iterator[list[str]]:
    """The first names the operation and ours."""
    ours = case.reference
    if ours is None:
        return
    head = [f"**{plain(case.op)}**<br>{plain(case.name)}", milliseconds(ours.median)]
    memory = mebibytes(ours.peak_extra_bytes)
    for row in others:
        yield [
            *head,
            plain(row.provider),
            _ratio(case, row),
            memory,
            mebibytes(row.peak_extra_bytes),
        ]
        head, memory = ["", ""], ""


def _ratio(case: Case, row: Row) -> str:
    if not row.timed:
        return plain(row.status)
    mark = "~" if case.ratios(row) and not case.difference(row) else ""
    return mark + times(case.ratio(row))
