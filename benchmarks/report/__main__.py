"""A file of results as Markdown with pictures beside it.

    python -m benchmarks.report benchmarks/results/DEVICE/FILE.json

Run from the repository's root. Writes FILE.md, and FILE-ratio.svg, FILE-bound.svg and FILE-memory.svg where there are
figures for them. Nothing is left out because it is bad for this repository.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from benchmarks.harness.options import Parser, exit_code
from benchmarks.report.case_tables import cases_markdown, summary_markdown
from benchmarks.report.cases import CERTAIN_ERROR, CERTAIN_POINTS, by_op, series
from benchmarks.report.results_file import Peaks, Results, Row, read
from benchmarks.report.steps import steps_markdown, steps_summary
from benchmarks.report.tables import counted, figure, plain
from perl.files import replacing
from perl.types import UserError

if TYPE_CHECKING:
    from benchmarks.report.pictures import Picture

_QUIET_LOAD = 1.0
"""More before the benchmarks is work of others, which took time from them."""


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(arguments))


def run(arguments: list[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.report",
        description="A file of results as Markdown with pictures beside it.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.json", help="results of the benchmarks")
    for path in write(parser.parse_args(arguments).file):
        print(f"written: {path}")
    return 0


def write(file: Path) -> list[Path]:
    """Write the report on a file of results, and its pictures, beside it.

    Returns:
        What was written, the report first.

    Raises:
        UserError: the file holds no whole results, or nothing can be written there.
    """
    results = read(file)
    target = file.with_suffix(".md")
    if target == file:
        raise UserError(f"{file}: the report would take its place; call it .json")
    try:
        pictures, note = _draw(results, file)
        with replacing(target) as temporary:
            temporary.write_text(markdown(results, pictures, note), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target}: {reason}; nothing can be written there") from error
    return [target, *(picture.path for picture in pictures)]


def _draw(results: Results, file: Path) -> tuple[list[Picture], str]:
    """The pictures, and why there are none."""
    try:
        import matplotlib  # noqa: F401  # What pictures.py imports where it needs it.
    except ImportError:
        return [], "No pictures: matplotlib is not installed (`pip install matplotlib`)."
    from benchmarks.report.pictures import draw

    return draw(results, file.with_suffix("")), ""


def markdown(results: Results, pictures: Sequence[Picture] = (), note: str = "") -> str:
    """The report.

    Args:
        note: why there are no pictures.
    """
    ops = by_op(results.rows)
    blocks = [
        *_head(results),
        *summary_markdown(ops, steps_summary(results.steps)),
        *(f"![{plain(p.alt)}]({quote(p.path.name)})" for p in pictures),
        *([note] if note else []),
        *cases_markdown(ops),
        *_growth(results.rows),
        *steps_markdown(results.steps),
    ]
    return "\n\n".join(blocks) + "\n"


def _head(results: Results) -> Iterator[str]:
    machine = results.machine
    yield f"# Benchmarks on {plain(machine.get('device', 'an unknown device'))}"
    yield from _doubts(results)
    commit = results.commit.removesuffix("+")
    changed = " with changes that are not committed" if results.commit.endswith("+") else ""
    parts = [
        counted(machine[f"{key}s"], key) for key in ("core", "thread") if machine.get(f"{key}s")
    ]
    names = {"python": "Python", "cuda": "CUDA"}
    versions = [
        f"{names.get(key, key)} {machine[key]}"
        for key in ("python", "torch", "triton", "transformers", "cuda")
        if machine.get(key)
    ]
    yield plain(
        f"{results.date}, commit {commit}{changed}, {results.mode} mode, {results.minutes:.1f} minutes. "
        f"{', '.join([*parts, *versions])}."
    )
    yield _peaks(results.peaks)


def _doubts(results: Results) -> Iterator[str]:
    """What a reader must know before any figure."""
    if results.load and results.load[0] > _QUIET_LOAD:
        cores = results.machine.get("cores")
        on = f" on {counted(cores, 'core')}" if isinstance(cores, int) else ""
        yield f"**The machine was busy (load {results.load[0]:.1f}{on}): times say little.**"
    if results.only:
        yield f"**A partial run: only what `--only '{plain(results.only)}'` chose.**"
    if results.interrupted:
        yield "**The run was interrupted: what it did not reach is missing.**"


def _peaks(peaks: Peaks | None) -> str:
    if peaks is None:
        return "The device's peaks were not measured, so nothing is said about bounds."
    return (
        f"Peaks of the device, measured in the same run: copies {figure(peaks.bytes_per_s / 1e9)} GB/s, large products "
        f"in {plain(peaks.dtype)} {figure(peaks.flops_per_s / 1e12)} TFLOP/s. The *bound* of an operation is the "
        "longer of its bytes at the first rate and its operations at the second."
    )


def _growth(rows: Sequence[Row]) -> Iterator[str]:
    fitted = [s for s in series(rows) if s.line]
    if not fitted:
        return
    yield "## Growth"
    yield (
        "Power laws through median times, by least squares on logarithms, ± one standard error; *at the end*: between the "
        f"two largest sizes; *uncertain*: fewer than {CERTAIN_POINTS} sizes, or a standard error above {CERTAIN_ERROR}."
    )
    for op in dict.fromkeys(s.op for s in fitted):
        lines = [f"- {plain(s.provider)}: {plain(s.line)}" for s in fitted if s.op == op]
        yield "\n".join([f"**{plain(op)}**", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
