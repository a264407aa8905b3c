"""Memory by stage as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perl.report.style import COLOURS, INK, STYLE


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """A bar for each stage, made of what its memory is for, and a line where that of the GPU ends, into a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    kept, limit = found["memory"], found["memory_of_gpu"] / 1e9
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        left = dict.fromkeys(kept, 0.0)
        parts = [p for p in next(iter(kept.values())) if any(kept[stage][p] for stage in kept)]
        for number, part in enumerate(parts):
            again, colour = divmod(number, len(COLOURS))
            widths = [kept[stage][part] / 1e9 for stage in kept]
            look: dict[str, Any] = {
                "color": COLOURS[colour],
                "hatch": "///" * again,
                "edgecolor": "white",
            }
            axes.barh(list(kept), widths, left=list(left.values()), label=part, height=0.6, **look)
            left = {stage: left[stage] + kept[stage][part] / 1e9 for stage in kept}
        axes.axvline(limit, color=INK, linewidth=1.2)
        axes.annotate(
            f"{limit:.0f} GB",
            (limit, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
        )
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.05 * max(limit, *left.values()))
        axes.set_xlabel("GB of one GPU, computed")
        axes.set_title(title, pad=22)
        figure.legend(loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=220, format="png")
