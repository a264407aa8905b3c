"""The picture of a filtered data set: accuracies before and after, and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perl.data.resample import levels_of, shares_of
from perl.report.plots import BLUE, GREY, INK, STYLE, VERMILION


def draw_difficulty(
    accuracies: Sequence[float] | np.ndarray,
    chosen: Sequence[int],
    histogram: Sequence[float] | np.ndarray,
    path: Path,
) -> tuple[Path, Path]:
    """Write `path` with .png and .svg appended, and return both.

    Args:
        accuracies: float [Q], NaN where nothing was measured.
        chosen: indices of the questions that are kept, with repeats.
        histogram: float [L], the target's shares.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = np.asarray(accuracies, dtype=np.float64)
    wanted = np.asarray(histogram) / np.sum(histogram)
    count = len(wanted)
    after = values[list(chosen)]
    measured = int((levels_of(values, count) >= 0).sum())
    places = np.arange(count)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
        axes = figure.subplots()
        for shift, shown, colour, label in (
            (-0.2, values, GREY, f"before: {measured} questions, mean {np.nanmean(values):.2f}"),
            (0.2, after, BLUE, f"after: {len(after)} questions, mean {np.mean(after):.2f}"),
        ):
            axes.bar(places + shift, shares_of(shown, count), 0.38, color=colour, label=label)
        axes.plot(places + 0.2, wanted, "_", color=VERMILION, ms=13, mew=2.2, label="target")
        axes.set_title("Accuracy of the questions")
        axes.set_xlabel("accuracy of a question over its rollouts")
        axes.set_ylabel("share of questions")
        axes.set_xticks(places, [f"{k / (count - 1):.1f}" for k in places])
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.tick_params(colors=INK)
        figure.legend(loc="outside lower center", ncols=3)
        files = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
