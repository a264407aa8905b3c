"""The comparison for people, a table, notes below it and the outcome in a line, and for programs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.comparing.row import Row
from benchmarks.comparing.side import Side


def table(rows: Sequence[Row]) -> str:
    """A line per case, under the name of its operation; cases that nothing can be said of here are counted below."""
    shown = [row for row in rows if row.verdicts != ["unavailable"]]
    labels = [f"  {_label(row)}" for row in shown]
    width = max([4, *map(len, labels)])
    ratio = "ratio  [95 % interval]"
    lines = [
        f"{'case':{width}} {'base ms':>10} {'head ms':>10}  {ratio:22}  {'memory':>6}  verdict"
    ]
    op = None
    for row, label in zip(shown, labels, strict=True):
        if row.case.op != op:
            op = row.case.op
            lines.append(op)
        lines.append(f"{label:{width}} {_figures(row)}  {_verdict(row)}")
    left_out = Counter(row.reason for row in rows if row.verdicts == ["unavailable"])
    notes = [f"left out: {count} ({reason})" for reason, count in left_out.items()]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def summary(rows: Sequence[Row], base: str, head: str) -> str:
    counts = Counter(v for row in rows for v in row.verdicts if v != "unavailable")
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    advice = "; more --seconds-per-case may settle the unclear" if counts["unclear"] else ""
    return f"{head} against {base}: {words}{advice}"


def noise(rows: Sequence[Row]) -> str:
    """Of a comparison of BASE with itself: how far off 1 a ratio is when nothing has changed."""
    ratios = [row.ratio for row in rows if row.ratio]
    if not ratios:
        return "nothing was timed"
    off = max(max(r.median, 1 / r.median) for r in ratios) - 1
    reach = max(max(r.high, 1 / r.low) for r in ratios) - 1
    return f"the same code differs by up to {off:.1%}, its intervals reach {reach:.1%}"


def asdict(
    given: argparse.Namespace, base: Side, head: Side, rows: Sequence[Row]
) -> dict[str, Any]:
    """`base` and `head` by name, the machine, the options, and `rows`."""
    return {
        "base": base.name,
        "head": head.name,
        "machine": head.machine,
        "threshold": given.threshold,
        "seconds_per_case": given.seconds_per_case,
        "rows": [row.asdict() for row in rows],
    }


def _label(row: Row) -> str:
    return ", ".join(part for part in (row.case.case, row.case.provider) if part)


def _figures(row: Row) -> str:
    if row.ratio is None:
        return f"{'-':>10} {'-':>10}  {'-':22}  {'-':>6}"
    base, head = (1e3 * seconds for seconds in row.medians)
    interval = f"{row.ratio.median:.3f}  [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    memory = f"{row.peaks[1] / row.peaks[0]:.2f}" if row.peaks and row.peaks[0] else "-"
    return f"{base:10.4g} {head:10.4g}  {interval:22}  {memory:>6}"


def _verdict(row: Row) -> str:
    verdict = ", ".join(row.verdicts)
    return f"{verdict}: {row.reason}" if row.reason else verdict
