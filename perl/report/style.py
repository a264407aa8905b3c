"""How the pictures of a report look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#9A9A9A"
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY)
INK = "#222222"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8A8A8A",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
}


def finish(figure: Figure, axes: Axes, ylabel: str, xlabel: str, alone: bool = False) -> None:
    """Labels, whole steps, and a legend below where there are several lines, or for one `alone`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1 or alone:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(handles)))


def shares(parts: Iterable[tuple[str, float]]) -> str:
    """In words what share of all each part is."""
    parts = list(parts)
    total = sum(value for _, value in parts) or 1.0
    return ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts) + "."
