"""Two workers, and every case measured by them."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.comparing.row import Case, Row, confirmed, measure, without_times
from benchmarks.comparing.side import Ended, Side
from benchmarks.comparing.trees import ROOT, checked_out, commit_of, working_tree
from perl.report.progress import Display
from perl.types import UserError


@contextmanager
def sides(given: argparse.Namespace) -> Iterator[tuple[Side, Side]]:
    """Both workers, started; they and the trees of revisions are gone afterwards."""
    other = given.base if given.check else given.head
    before, after = commit_of(given.base), commit_of(other) if other else None
    options = {"device": given.device, "threads": given.threads, "quick": given.quick}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perl-compare-")))

        def side(name: str, tree: Path, log: str) -> Side:
            made = Side(name, tree, options, folder / log)
            stack.callback(made.close)
            made.start()
            return made

        base = side(_name(given.base, before), stack.enter_context(checked_out(before)), "base")
        if other and after:
            tree = stack.enter_context(checked_out(after))
            head = side(_name(other, after), tree, "head")
        else:
            head = side(working_tree(), ROOT, "head")
        base.ready()
        head.ready()
        yield base, head


def _name(revision: str, commit: str) -> str:
    return revision[:10] if commit.startswith(revision) else f"{revision} ({commit[:10]})"


def compare(given: argparse.Namespace, base: Side, head: Side, rows: list[Row]) -> None:
    """Append a row per case.

    Raises:
        UserError: no case is selected, or none can be measured on this machine.
    """
    cases, broken = _cases(given, base, head)
    with Display() as display:
        load = os.getloadavg()[0]
        if load > (os.cpu_count() or 1) / 2:
            display.say(f"This machine is busy (load {load:.1f}): intervals will be wide.")
        display.stage("compare", len(cases) + len(broken), unit="cases")
        rows += broken
        display.advance(len(broken))
        for case in cases:
            rows.append(measure(case, base, head, given.seconds_per_case, given.threshold))
            display.advance()
        _confirm(given, base, head, rows, display)
    if all(row.verdicts == ["unavailable"] for row in rows):
        reasons = "; ".join(sorted({row.reason for row in rows}))
        raise UserError(f"nothing can be measured here: {reasons}")


def _confirm(
    given: argparse.Namespace, base: Side, head: Side, rows: list[Row], display: Display
) -> None:
    """Measure again, in new processes, what was slower or faster."""
    again = [index for index, row in enumerate(rows) if row.differs]
    if not again:
        return
    display.stage("once more", len(again), unit="cases")
    base.restart()
    head.restart()
    for index in again:
        case = rows[index].case
        second = measure(case, base, head, given.seconds_per_case, given.threshold)
        rows[index] = confirmed(rows[index], second)
        display.advance()


def _cases(given: argparse.Namespace, base: Side, head: Side) -> tuple[list[Case], list[Row]]:
    """What HEAD can do of what is asked for, and modules of benchmarks that it cannot even import."""
    try:
        before, after = base.ask("cases"), head.ask("cases")
    except Ended as error:
        raise UserError(f"the benchmarks cannot be listed: {error}") from error
    # Without "and", the words are those of an expression that `benchmarks.run --only` takes.
    words = [word for word in given.only.lower().split() if word != "and"]

    def chosen(case: Case) -> bool:
        return all(word in f"{case.module} {case.name}".lower() for word in words)

    cases = [case for case in (Case(*names) for names in after["cases"]) if chosen(case)]
    broken = []
    for module, outcome in after["broken"].items():
        case = Case(module, module, "", "")
        other = before["broken"].get(module, {"state": "ready"})
        if outcome["state"] == "unavailable":
            row = Row(case, ["unavailable"], outcome["reason"])
        else:
            row = without_times(case, other, outcome)
        if row and chosen(case):
            broken.append(row)
    if not cases and not broken:
        raise UserError(f'--only "{given.only}": no case has all these words in its name')
    return cases, broken
