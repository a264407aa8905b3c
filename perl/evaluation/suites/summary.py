"""From answers to numbers: accuracies with intervals, what orders change, and the tables of the eight benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perl.evaluation.agreement import agreement
from perl.evaluation.statistics import wilson
from perl.evaluation.suites import SUITES
from perl.evaluation.suites.answers import AnswerFile, Row, official
from perl.evaluation.suites.base import Suite
from perl.files import replacing, write_json
from perl.report.metrics import mean

SOURCE = "† published, arXiv 2506.14907"

PUBLISHED = {
    "LLaVA-OneVision": (64.20, 48.20, 40.32, 63.20, 26.20, 18.30, 13.69, 18.80, 36.61),
    "InternVL2.5-8B": (67.00, 54.80, 46.70, 64.40, 39.50, 19.70, 30.92, 16.84, 42.48),
    "Qwen2-VL-7B": (69.60, 53.20, 52.76, 58.20, 32.50, 16.30, 28.62, 14.53, 40.71),
    "Migician": (69.12, 51.53, 52.32, 58.90, 30.10, 19.60, 8.73, 14.88, 38.15),
    "R1-VL-7B": (64.81, 55.00, 46.58, 63.50, 40.00, 24.70, 24.31, 18.77, 42.62),
    "R1-Onevision-7B": (71.76, 32.38, 46.48, 64.10, 46.40, 29.90, 36.96, 19.06, 43.38),
    "MM-Eureka 7B": (69.91, 51.49, 51.67, 73.00, 50.30, 26.90, 43.31, 24.39, 49.49),
    "Noisy-K12 7B": (73.15, 54.23, 52.13, 72.90, 52.80, 28.90, 41.27, 24.99, 50.05),
    "Qwen2.5-VL-7B": (70.80, 55.23, 52.00, 68.20, 46.30, 25.07, 36.38, 20.41, 47.90),
    "PeRL 7B": (76.39, 58.53, 54.23, 73.00, 49.56, 28.26, 43.38, 25.68, 51.13),
}
"""Table 1 of the PeRL paper as printed: percent by benchmark in the sequence of `SUITES`, and the average. Some averages
are not the mean of the eight numbers beside them (Qwen2.5-VL-7B: 47.90 printed, 46.80 computed). ReMI of PeRL is 41.65
in Table 2 of the same paper."""

Table = list[list[str]]
"""Rows of cells, the header first."""


def write_summary(folder: Path, model: str, published: bool) -> dict[str, Table]:
    """Write summary.json and table.md of every benchmark whose answers are in the folder; the tables by title."""
    rows = {name: list(AnswerFile(folder / f"{name}.jsonl").rows.values()) for name in SUITES}
    numbers = {name: summarise(SUITES[name], found) for name, found in rows.items() if found}
    tables = {
        "Score in percent, as each benchmark reports it": _overview(numbers, model, published),
        "Accuracy over items, percent": _accuracies(numbers),
    }
    if any(values["orders"] for values in numbers.values()):
        tables["Items whose images may move, percent"] = _moved(numbers)
    write_json(folder / "summary.json", {"model": model, "suites": numbers})
    with replacing(folder / "table.md") as temporary:
        text = "\n".join(f"{title}:\n\n{_markdown(table)}" for title, table in tables.items())
        temporary.write_text(text + (f"\n{SOURCE}\n" if published else ""), "utf-8")
    return tables


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


def percent(value: float | None) -> str:
    """`0.7639` as `76.39`."""
    return "-" if value is None else f"{100 * value:.2f}"


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


def _overview(numbers: Mapping[str, dict[str, Any]], name: str, published: bool) -> Table:
    """A table like the paper's Table 1: the model, its items, others' published rows if wanted.

    The average is over all eight, or not there. A dagger marks what is published, not measured here.
    """
    scores = [numbers[s]["score"] if s in numbers else None for s in SUITES]
    average = None if None in scores else mean(scores)
    items = [str(numbers[s]["items"]) if s in numbers else "-" for s in SUITES]
    rows = [
        ["", *(suite.title for suite in SUITES.values()), "AVG"],
        [name, *(percent(score) for score in [*scores, average])],
        ["n", *items, str(sum(v["items"] for v in numbers.values()))],
    ]
    if published:
        rows += [[f"{m} †", *(f"{v:.2f}" for v in values)] for m, values in PUBLISHED.items()]
    return rows


def _accuracies(numbers: Mapping[str, dict[str, Any]]) -> Table:
    """Accuracy over items with its interval, the mean over tasks, and items without an answer or cut short."""
    rows = [
        ["", "n", "accuracy", "95 % interval", "over tasks", "unread", "unfinished", "too long"]
    ]
    for values in numbers.values():
        accuracy, task_mean = percent(values["accuracy"]), percent(values["task_mean"])
        interval = " to ".join(percent(bound) for bound in values["interval"])
        counts = [str(values[name]) for name in ("unread", "unfinished", "too_long")]
        items = f"{values['items']} of {values['expected']}"
        rows.append([values["title"], items, accuracy, interval, task_mean, *counts])
    return rows


def _moved(numbers: Mapping[str, dict[str, Any]]) -> Table:
    """The items whose images moved: accuracy in the official order and over all, and consistency."""
    rows = [["", "n", "orders", "official order", "over orders", "consistency"]]
    for values in numbers.values():
        if moved := values["orders"]:
            names = ("official_accuracy", "accuracy", "consistency")
            counts = [str(moved["items"]), f"{moved['orders']:.3g}"]
            rows.append([values["title"], *counts, *(percent(moved[name]) for name in names)])
    return rows


def _markdown(table: Table) -> str:
    header, *rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))
