"""From answers to numbers: accuracies with intervals, what orders change, and the table of the eight benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from perl.evaluation.agreement import agreement
from perl.evaluation.statistics import wilson
from perl.evaluation.suites import SUITES
from perl.evaluation.suites.base import Suite
from perl.evaluation.suites.published import PUBLISHED
from perl.report.metrics import mean

_WIDE = 200

Row = dict[str, Any]
Table = list[list[str]]


def official(rows: Sequence[Row]) -> list[Row]:
    """The rows of the order in which the benchmark shows its images."""
    return [row for row in rows if row["order"] == sorted(row["order"])]


def summarise(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of one benchmark, all from 0 to 1.

    `score` is what the benchmark itself reports: the mean over items or over tasks (`averaged`). `accuracy` is over
    items, with Wilson's 95 % `interval`. `too_long` items were not asked and count as wrong, `unfinished` ones were
    cut at the longest completion, from `unread` ones no answer could be read. `orders` is about the items
    whose images may move and that were asked in more than one order; None where there are none.
    """
    first = official(rows)
    by_task: defaultdict[str, list[float]] = defaultdict(list)
    for row in first:
        by_task[row["task"]].append(row["score"])
    scores = [row["score"] for row in first]
    accuracy, task_mean = mean(scores), mean(mean(of_task) for of_task in by_task.values())
    return {
        "title": suite.title,
        "items": len(first),
        "expected": suite.expected,
        "score": task_mean if suite.averaged == "tasks" else accuracy,
        "averaged": suite.averaged,
        "accuracy": accuracy,
        "interval": list(wilson(round(sum(scores)), len(scores))),
        "task_mean": task_mean,
        "too_long": sum(row["completion"] is None for row in first),
        "unfinished": sum(row["completion"] is not None and not row["finished"] for row in first),
        "unread": sum(row["completion"] is not None and row["answer"] is None for row in first),
        "by_task": {
            task: {"items": len(of_task), "accuracy": mean(of_task)}
            for task, of_task in sorted(by_task.items())
        },
        "orders": _over_orders(rows),
    }


def _over_orders(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy over all orders asked, each item weighing the same, and how often two orders choose one picture."""
    items: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["movable"]:
            items[row["id"]].append(row)
    several = [of_item for of_item in items.values() if len(of_item) > 1]
    if not several:
        return None
    return {
        "items": len(several),
        "orders": mean(float(len(of_item)) for of_item in several),
        "official_accuracy": mean(r["score"] for of_item in several for r in official(of_item)),
        "accuracy": mean(mean(r["score"] for r in of_item) for of_item in several),
        "consistency": mean(agreement([[r["chosen"]] for r in of_item]) for of_item in several),
    }


def overview(numbers: Mapping[str, dict[str, Any]], name: str, published: bool) -> Table:
    """A table like the paper's Table 1, percent: a header, the model, its items, others' published rows if wanted.

    The average is over all eight, or not there. A dagger marks what is published, not measured here.
    """
    header = ["", *(suite.title for suite in SUITES.values()), "AVG"]
    scores = [numbers[s]["score"] if s in numbers else None for s in SUITES]
    average = None if None in scores else mean(scores)
    items = [str(numbers[s]["items"]) if s in numbers else "-" for s in SUITES]
    rows = [
        header,
        [name, *(percent(score) for score in [*scores, average])],
        ["n", *items, str(sum(v["items"] for v in numbers.values()))],
    ]
    if published:
        rows += [
            [f"{model} †", *(f"{values[k]:.2f}" for k in (*SUITES, "average"))]
            for model, values in PUBLISHED.items()
        ]
    return rows


def accuracies(numbers: Mapping[str, dict[str, Any]]) -> Table:
    """Accuracy over items with its interval, the mean over tasks, and items without an answer or cut short."""
    rows = [
        ["", "n", "accuracy", "95 % interval", "over tasks", "unread", "unfinished", "too long"]
    ]
    for values in numbers.values():
        low, high = values["interval"]
        rows.append(
            [
                values["title"],
                f"{values['items']} of {values['expected']}",
                percent(values["accuracy"]),
                f"{percent(low)} to {percent(high)}",
                percent(values["task_mean"]),
                *(str(values[name]) for name in ("unread", "unfinished", "too_long")),
            ]
        )
    return rows


def over_orders(numbers: Mapping[str, dict[str, Any]]) -> Table:
    """The items whose images moved: accuracy in the official order and over all, and consistency."""
    rows = [["", "n", "orders", "official order", "over orders", "consistency"]]
    for values in numbers.values():
        if moved := values["orders"]:
            names = ("official_accuracy", "accuracy", "consistency")
            counts = [str(moved["items"]), f"{moved['orders']:.3g}"]
            rows.append([values["title"], *counts, *(percent(moved[name]) for name in names)])
    return rows


def percent(value: float | None) -> str:
    """`0.7639` as `76.39`."""
    return "-" if value is None else f"{100 * value:.2f}"


def markdown(table: Table) -> str:
    """The table in Markdown, its first row the header."""
    header, *rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def print_table(table: Table, title: str) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table as Drawn

    header, *rows = table
    drawn = Drawn(title=title, title_justify="left")
    for i, column in enumerate(header):
        drawn.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    # A file or a pipe has no width that anything would have to be folded to.
    console = Console() if Console().is_terminal else Console(width=_WIDE)
    console.print(drawn)
