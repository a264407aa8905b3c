"""Tables and pictures of the permutation experiment, from what `permutation.py` measured.

    python docs/experiments/permutation_report.py runs/permutation/results.json --images docs/images

Means over seeds with 95 % t-intervals. Differences to plain GRPO are paired: both runs have the same
start, filter and seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from permutation import ORDERS, STARTS  # The script beside this one.

FILTERS = {False: "all groups", True: "zero-variance groups dropped"}
MEASURES: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "accuracy": ("accuracy, sampled", lambda row: row["accuracy"]),
    "greedy": ("accuracy, greedy", lambda row: row["greedy_accuracy"]),
    "consistency": ("consistency", lambda row: row["consistency"]),
    "excess": (
        "first slot named too often",
        lambda row: row["first_slot"] - row["first_slot_right"],
    ),
    "greedy_excess": (
        "the same, greedy",
        lambda row: row["greedy_first_slot"] - row["first_slot_right"],
    ),
}
SIGNAL = ("groups with signal", lambda row: row["signal"])

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())["rows"]
    for start in STARTS:
        print(table(rows, start), end="\n\n")
    for start in STARTS:
        print(differences(rows, start), end="\n\n")
    if args.images:
        draw(rows, args.images)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval; NaN for a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half)


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with the wanted values, by seed; `orders=None` means the model before RL."""
    found = (r for r in rows if all(r.get(key) == value for key, value in wanted.items()))
    return sorted(found, key=lambda row: row["seed"])


def percent(values: Sequence[float], sign: bool = False) -> str:
    mean, half = interval([100 * v for v in values])
    return f"{mean:{'+' if sign else ''}.1f} ± {half:.1f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (header, ["---", *["---:"] * (len(header) - 1)], *lines)
    )


def label(orders: int | None) -> str:
    if orders is None:
        return "before RL"
    return "plain GRPO" if orders == 1 else f"n_s = {orders - 1}"


def table(rows: Sequence[Row], start: str) -> str:
    """What each arm comes to from one start."""
    lines = []
    before = select(rows, start=start, orders=None)
    cells = [percent([of(r) for r in before]) for _, of in MEASURES.values()]
    lines.append([label(None), "", *cells, ""])
    for drop, name in FILTERS.items():
        for orders in ORDERS:
            arm = select(rows, start=start, orders=orders, drop=drop)
            cells = [percent([of(r) for r in arm]) for _, of in (*MEASURES.values(), SIGNAL)]
            lines.append([label(orders), name, *cells])
    seeds = len(before)
    header = [f"{start} start, {seeds} seeds, percent", "filter", *_titles()]
    return markdown(header, lines)


def differences(rows: Sequence[Row], start: str) -> str:
    """What permuted orders add to plain GRPO, paired by seed; the last line is the mean of the others, seed by seed."""
    lines = []
    gains: list[list[list[float]]] = []  # [arm][measure][seed]
    for drop, name in FILTERS.items():
        plain = select(rows, start=start, orders=1, drop=drop)
        for orders in ORDERS[1:]:
            arm = select(rows, start=start, orders=orders, drop=drop)
            gains.append(
                [
                    [of(a) - of(b) for a, b in zip(arm, plain, strict=True)]
                    for _, of in (*MEASURES.values(), SIGNAL)
                ]
            )
            lines.append([label(orders), name, *(percent(gain, sign=True) for gain in gains[-1])])
    means = [
        [fmean(by_seed) for by_seed in zip(*measure, strict=True)]
        for measure in zip(*gains, strict=True)
    ]
    lines.append(["any", "either", *(percent(mean, sign=True) for mean in means)])
    return markdown([f"{start} start: minus plain GRPO, points", "filter", *_titles()], lines)


def _titles() -> list[str]:
    return [title for title, _ in (*MEASURES.values(), SIGNAL)]


def draw(rows: Sequence[Row], folder: Path) -> None:
    """One panel for each start and measure, orders to the right; seeds as small points."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from perl.report.style import BLUE, GREY, STYLE, VERMILION

    shown = [*(MEASURES[name] for name in ("accuracy", "consistency", "excess")), SIGNAL]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 6.2), dpi=140, layout="constrained")
        grid = figure.subplots(len(STARTS), len(shown), sharex=True, sharey="col")
        for line, start in zip(grid, STARTS, strict=True):
            for axes, (title, of) in zip(line, shown, strict=True):
                before = select(rows, start=start, orders=None)
                if title != SIGNAL[0]:
                    level = fmean(100 * of(r) for r in before)
                    axes.axhline(level, color=GREY, ls="--", lw=1.2, label="before RL")
                for (drop, name), colour, shift in zip(
                    FILTERS.items(), (BLUE, VERMILION), (-0.06, 0.06), strict=True
                ):
                    arms = [select(rows, start=start, orders=o, drop=drop) for o in ORDERS]
                    values = [[100 * of(r) for r in arm] for arm in arms]
                    places = [o - 1 + shift for o in ORDERS]
                    means, halves = zip(*map(interval, values), strict=True)
                    axes.errorbar(
                        places, means, halves, color=colour, marker="o", capsize=3, label=name
                    )
                    for place, seeds in zip(places, values, strict=True):
                        axes.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.3, ms=5)
                # By the seeds, not by their intervals, which are wide where seeds are few.
                everything = [100 * of(r) for r in rows if r.get("orders") or title != SIGNAL[0]]
                axes.set_ylim(min(everything) - 5, max(everything) + 5)
                axes.set_title(f"{start} start: {title}", fontsize=9)
                axes.set_xticks([o - 1 for o in ORDERS], ["plain\nGRPO", "1", "2", "3"])
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        for axes in grid[-1]:
            axes.set_xlabel("permuted orders (n_s)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "permutation.png")


if __name__ == "__main__":
    main()
