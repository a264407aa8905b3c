"""A selection of measured questions: chosen by a histogram of accuracies, written out again, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perl.config import ResampleConfig
from perl.data.dataset import Dataset
from perl.data.resample import LEVELS, parse_histogram, resample, shares_of
from perl.data.rows import write_rows
from perl.report.style import BLUE, GREY, INK, STYLE, VERMILION


def write_selection(
    dataset: Dataset,
    indices: Sequence[int],
    accuracies: Sequence[float],
    output: Path,
    config: ResampleConfig,
    seed: int,
    repeat: bool = False,
) -> list[int]:
    """Write the questions that `resample` keeps to `output`, and a picture beside it.

    Args:
        indices: the questions that were measured, `accuracies` being theirs.

    Returns:
        Which ones those are: places in `accuracies`.
    """
    histogram = parse_histogram(config.histogram)
    chosen = resample(accuracies, histogram, config.size or None, seed, repeat)
    write_rows(dataset, output, [indices[k] for k in chosen], [accuracies[k] for k in chosen])
    _draw(accuracies, chosen, histogram, output)
    return chosen


def _draw(
    accuracies: Sequence[float], chosen: Sequence[int], histogram: Sequence[float], output: Path
) -> None:
    """Accuracies before and after, and what was wanted, as .png and .svg beside `output`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = np.asarray(accuracies, dtype=np.float64)
    before, after = values[~np.isnan(values)], values[list(chosen)]
    places = np.arange(LEVELS)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
        axes = figure.subplots()
        for shift, shown, colour, label in (
            (-0.2, before, GREY, "before"),
            (0.2, after, BLUE, "after"),
        ):
            label = f"{label}: {len(shown)} questions, mean {shown.mean():.2f}"
            axes.bar(places + shift, shares_of(shown), 0.38, color=colour, label=label)
        axes.plot(places + 0.2, histogram, "_", color=VERMILION, ms=13, mew=2.2, label="target")
        axes.set_title("Accuracy of the questions")
        axes.set_xlabel("accuracy of a question over its rollouts")
        axes.set_ylabel("share of questions")
        axes.set_xticks(places, [f"{k / (LEVELS - 1):.1f}" for k in places])
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.tick_params(colors=INK)
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(output.with_suffix(".png"))
        figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
