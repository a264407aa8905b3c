"""Two models' answers to the same items of the same benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from perl.evaluation.statistics import Comparison, compare_scores
from perl.evaluation.suites import SUITES
from perl.evaluation.suites.answers import AnswerFile, different, read_settings
from perl.evaluation.suites.clusters import cluster_bootstrap
from perl.evaluation.suites.summary import Row, Table, official, percent
from perl.types import UserError

Pairs = list[tuple[float, float, str]]
"""For each item the scores of both models and its problem."""

_SAME = frozenset({"model", "weights"})


def compare_folders(first: Path, second: Path) -> tuple[dict[str, Comparison], list[str]]:
    """Comparisons by benchmark, and of all items together as `all`, in the official order of images.

    For the intervals, versions of one problem (MathVerse has five of each) are drawn together.

    Returns:
        The comparisons, and remarks: benchmarks that only one folder has, settings that differ.

    Raises:
        UserError: a folder without answers, no benchmark in both, or different items of one benchmark.
    """
    settings = [read_settings(folder) for folder in (first, second)]
    remarks = [
        f"{key}: {old} in {first}, {new} in {second}"
        for key, old, new in different(*settings)
        if key not in _SAME
    ]
    pairs: dict[str, Pairs] = {}
    for name in SUITES:
        one, other = (_scores(folder / f"{name}.jsonl") for folder in (first, second))
        if one and other:
            _check_same_items(name, one, other, first, second)
            pairs[name] = [
                (row["score"], other[id]["score"], _problem(name, row, other[id]))
                for id, row in one.items()
            ]
        elif one or other:
            remarks.append(f"{name}: only in {first if one else second}, so it is left out")
    if not pairs:
        raise UserError(f"{first} and {second} have no benchmark in common; nothing is compared")
    found = {name: _compared(of_suite) for name, of_suite in pairs.items()}
    together = [pair for of_suite in pairs.values() for pair in of_suite]
    return {**found, "all": _compared(together)}, remarks


def comparison_table(found: dict[str, Comparison]) -> Table:
    """Accuracies over items in percent, their difference in points, and the items that one alone got right."""
    header = ["", "n", "1st", "2nd", "2nd - 1st", "95 % interval", "p", "only 1st", "only 2nd"]
    rows = [header]
    for name, c in found.items():
        low, high = c.interval
        rows.append(
            [
                SUITES[name].title if name in SUITES else "all items",
                str(c.items),
                percent(c.first),
                percent(c.second),
                f"{100 * c.difference:+.2f}",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                f"{c.p:.3g}",
                str(c.first_only),
                str(c.second_only),
            ]
        )
    return rows


def _compared(pairs: Pairs) -> Comparison:
    first, second, problems = zip(*pairs, strict=True)
    found = compare_scores(first, second)
    if len(set(problems)) == len(problems):
        return found
    differences = [b - a for a, b, _ in pairs]
    return replace(found, interval=cluster_bootstrap(differences, problems))


def _problem(name: str, one: Row, other: Row) -> str:
    """What says that two items are versions of one problem; answers of older versions may not have it."""
    problem = one.get("problem", other.get("problem", one["id"]))
    return f"{name} {problem}"


def _scores(path: Path) -> dict[str, Row]:
    rows = official(list(AnswerFile(path).rows.values()))
    return {row["id"]: row for row in rows}


def _check_same_items(
    name: str, one: dict[str, Row], other: dict[str, Row], first: Path, second: Path
) -> None:
    for mine, others, folder in ((one, other, first), (other, one, second)):
        if alone := [key for key in mine if key not in others]:
            raise UserError(
                f"{name}: {len(alone)} of {len(mine)} items are only in {folder} ({', '.join(alone[:3])}"
                f"{', ...' if alone[3:] else ''}); only answers to the same items are compared: finish both runs, "
                "with the same --limit"
            )
