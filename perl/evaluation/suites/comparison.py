"""Two models' answers to the same items of the same benchmarks."""

from __future__ import annotations

from pathlib import Path

from perl.evaluation.statistics import Comparison, compare_scores
from perl.evaluation.suites import SUITES
from perl.evaluation.suites.answers import AnswerFile, Row, different, official, read_settings
from perl.evaluation.suites.summary import Table, percent
from perl.types import UserError

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
    # A benchmark and both models' answers to one item of it.
    pairs: dict[str, list[tuple[str, Row, Row]]] = {}
    for name in SUITES:
        one, other = (_answers(folder / f"{name}.jsonl") for folder in (first, second))
        if one and other:
            _check_same_items(name, one, other, first, second)
            pairs[name] = [(name, row, other[id]) for id, row in one.items()]
        elif one or other:
            remarks.append(f"{name}: only in {first if one else second}, so it is left out")
    if not pairs:
        raise UserError(
            f"{first} and {second} have no benchmark in common; evaluate both with the same --suite"
        )
    together = [pair for of_suite in pairs.values() for pair in of_suite]
    return {name: _compared(found) for name, found in {**pairs, "all": together}.items()}, remarks


def comparison_table(found: dict[str, Comparison]) -> Table:
    """Accuracies over items in percent, their difference in points, and the items that one alone got right."""
    rows = [["", "n", "1st", "2nd", "2nd - 1st", "95 % interval", "p", "only 1st", "only 2nd"]]
    for name, c in found.items():
        title = SUITES[name].title if name in SUITES else "all items"
        by, low, high = (f"{100 * value:+.2f}" for value in (c.difference, *c.interval))
        scores = [str(c.items), percent(c.first), percent(c.second), by, f"{low} to {high}"]
        rows.append([title, *scores, f"{c.p:.3g}", str(c.first_only), str(c.second_only)])
    return rows


def _compared(pairs: list[tuple[str, Row, Row]]) -> Comparison:
    return compare_scores(
        [one["score"] for _, one, _ in pairs],
        [other["score"] for *_, other in pairs],
        # Answers of older versions do not have the problem.
        [(name, a.get("problem", b.get("problem", a["id"]))) for name, a, b in pairs],
    )


def _answers(path: Path) -> dict[str, Row]:
    return {row["id"]: row for row in official(list(AnswerFile(path).rows.values()))}


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
