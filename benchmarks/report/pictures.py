"""Pictures of results as SVG: others beside ours, and time and memory over the number of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.cases import Case, Series, by_op, series
from benchmarks.report.results_file import Results, Row
from perl.files import replacing
from perl.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Text stays text, in the reader's fonts; no date, and the same names in each file.
_SVG: dict[Any, Any] = {
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",
}
_PEERS = ("#5F5F5F", VERMILION, GREEN, ORANGE, PURPLE, "#56B4E9", "#7A4419")
"""Told apart with every kind of colour vision; blue is ours alone."""
_MARKERS, _DASHES = "osD^vPX", ("-", "--", ":", "-.")
_WIDTH, _MOST_TICKS = 9.5, 6
_LEAST_ROW, _LANE = 0.38, 0.105
"""Inches: the height of a case, and what a marker in it needs."""
_LEGEND_COLUMNS = 3
_LEAST_BYTES = 2**16
"""Where a logarithmic axis of memory begins."""


_Look = dict[str, Any]
"""Options of `Axes.plot`."""


@dataclass(frozen=True)
class Picture:
    path: Path
    alt: str


def draw(results: Results, stem: Path) -> list[Picture]:
    """Draw what there are figures of to `stem` with `-ratio.svg`, `-bound.svg` and `-memory.svg` behind it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    looks = _looks(results.rows)
    device = f"Measured on {results.machine.get('device', 'an unknown device')}"
    over_rows = [s for s in series(results.rows) if s.axis == "N"]
    parts: dict[str, tuple[str, Callable[[Figure], bool]]] = {
        "ratio": ("Time over ours", lambda f: _draw_ratios(f, results.rows, looks)),
        "bound": (
            "Share of the bound over N",
            lambda f: _draw_panels(
                f, over_rows, looks, _share, _finish_share, ("share of the bound", device)
            ),
        ),
        "memory": (
            "Memory over N",
            lambda f: _draw_panels(
                f, over_rows, looks, _held, _finish_held, ("MiB beyond the inputs", device)
            ),
        ),
    }
    pictures = []
    with rc_context({**STYLE, **_SVG}):
        for name, (what, fill) in parts.items():
            path = stem.with_name(f"{stem.name}-{name}.svg")
            figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
            if fill(figure):
                with replacing(path) as temporary:
                    figure.savefig(
                        temporary, format="svg", metadata={"Date": None, "Creator": None}
                    )
                pictures.append(Picture(path, what))
            else:
                path.unlink(missing_ok=True)  # An older report's does not show these figures.
    return pictures


def _looks(rows: Sequence[Row]) -> dict[str, _Look]:
    """The style of each provider's line, in the order of the rows: colours and markers tell packages apart, markers and
    dashes the providers of one package."""
    packages: dict[str, dict[str, None]] = {}
    for row in rows:
        packages.setdefault("" if row.ours else row.package_name, {})[row.provider] = None
    others = itertools.cycle(_PEERS)
    looks: dict[str, _Look] = {}
    for place, (package, members) in enumerate(packages.items()):
        colour = next(others) if package else BLUE
        for i, provider in enumerate(members):
            strong = not package and i % len(_DASHES) == 0
            looks[provider] = {
                "color": colour,
                "marker": _MARKERS[(place + place // len(_MARKERS) + i) % len(_MARKERS)],
                "ls": _DASHES[i % len(_DASHES)],
                "lw": 2.6 if strong else 1.5,
                "ms": 6.5 if strong else 5,
                "mec": "white",
                "mew": 0.6,
                "zorder": 3 if package else 4,
            }
    return looks


def _draw_ratios(figure: Figure, rows: Sequence[Row], looks: Mapping[str, _Look]) -> bool:
    """A panel for each operation, a line for each case, a marker for each of the others.

    Without series: those over N have pictures of their own; others are drawn where an operation has nothing else.
    """
    ops: dict[str, list[Case]] = {}
    for op, cases in by_op(rows).items():
        found = [c for c in cases if any(not r.ours and c.ratio(r) for r in c.rows)]
        one_size = [c for c in found if not c.axis]
        if shown := one_size or [c for c in found if c.axis != "N"]:
            ops[op] = shown
    if not ops:
        return False
    providers = {op: _compared(cases, looks) for op, cases in ops.items()}
    heights = [len(c) * max(_LEAST_ROW, _LANE * (len(providers[op]) + 1)) for op, c in ops.items()]
    names = {name for each in providers.values() for name in each}
    lines = -(-(len(names) + 1) // _LEGEND_COLUMNS)
    figure.set_size_inches(_WIDTH, 0.7 + 0.2 * lines + sum(0.75 + height for height in heights))
    panels = figure.subplots(len(ops), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (op, cases) in zip(panels, ops.items(), strict=True):
        _draw_cases(axes, cases, providers[op], looks)
        references = dict.fromkeys(c.reference.provider for c in cases if c.reference)
        axes.set_title(f"{op}: time over {' or '.join(references)}", fontsize=10, loc="right")
    axes = panels[-1]
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.6), max(high, 1.7))
    _label_logarithms(axes.xaxis, axes.get_xlim(), "x")
    axes.set_xlabel("left of 1: faster than ours; right of 1: slower (logarithmic)")
    _legend(figure, list(panels))
    return True


def _compared(cases: Sequence[Case], looks: Mapping[str, _Look]) -> list[str]:
    """The others with a ratio in one of these cases."""
    found = {r.provider for c in cases for r in c.rows if not r.ours and c.ratio(r)}
    return [provider for provider in looks if provider in found]


def _draw_cases(
    axes: Axes, cases: Sequence[Case], shown: Sequence[str], looks: Mapping[str, _Look]
) -> None:
    axes.axvline(1, color=BLUE, lw=2.2, zorder=2, label="ours")
    for provider in shown:
        # Each in a lane of its own within a case's line: equal times would hide one another.
        shift = (shown.index(provider) + 1) / (len(shown) + 1) - 0.5
        points = [
            (ratio, place + shift)
            for place, case in enumerate(cases)
            for row in case.rows
            if row.provider == provider and (ratio := case.ratio(row))
        ]
        style = {**looks[provider], "ls": "", "ms": 6.5}
        axes.plot(*zip(*points, strict=True), label=provider, **style)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=9)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.grid(visible=False, axis="y")
    for place in range(1, len(cases)):
        axes.axhline(place - 0.5, color="#E4E4E4", lw=0.8, zorder=0)


def _label_logarithms(axis: Axis, limits: tuple[float, float], unit: str) -> None:
    """As many labels as leave at least two in view."""
    from matplotlib.ticker import LogLocator, NullFormatter

    width = limits[1] / limits[0]
    steps = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if width < 8 else (1, 2, 5) if width < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(lambda value, _: f"{value:,g}{unit}")
    axis.set_minor_formatter(NullFormatter())


def _share(row: Row) -> float | None:
    """Of the bound, in percent."""
    return 100 * row.fraction if row.fraction else None


def _held(row: Row) -> float | None:
    """MiB, with a least that a logarithmic axis can show."""
    held = row.peak_extra_bytes
    return None if held is None else max(_LEAST_BYTES, held) / 2**20


def _finish_share(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_ylim(0, max(100, 1.05 * axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def _finish_held(axes: Axes, rows: Sequence[Row]) -> None:
    logits = {
        row.shape["N"]: row.shape["N"] * row.shape["V"] * row.shape["itemsize"] / 2**20
        for row in rows
        if row.shape.keys() >= {"N", "V", "itemsize"}
    }
    if len(logits) > 1:
        style = {"color": GREY, "ls": (0, (1, 1)), "lw": 1.2, "zorder": 1}
        axes.plot(*zip(*sorted(logits.items()), strict=True), label="the logits alone", **style)
    axes.set_yscale("log")
    _label_logarithms(axes.yaxis, axes.get_ylim(), "")


def _draw_panels(
    figure: Figure,
    found: Sequence[Series],
    looks: Mapping[str, _Look],
    value: Callable[[Row], float | None],
    finish: Callable[[Axes, Sequence[Row]], None],
    words: tuple[str, str],
) -> bool:
    """A panel for each operation, N to the right, a line for each provider.

    Args:
        words: the unit, and a caption below the panels.
    """
    unit, caption = words
    ops: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in found:
        pairs = [(x, value(row)) for x, row in zip(one.sizes, one.rows, strict=True)]
        if line := [(x, y) for x, y in pairs if y is not None]:
            ops.setdefault(one.op, {})[one.provider] = line
    if not ops:
        return False
    columns = min(2, len(ops))
    lines = -(-len(ops) // columns)
    figure.set_size_inches(_WIDTH if columns > 1 else 6.5, 1.3 + 3.3 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(ops) :]:
        axes.remove()
    for axes, (op, providers) in zip(grid, ops.items(), strict=False):
        for provider, line in providers.items():
            axes.plot(*zip(*line, strict=True), label=provider, **looks[provider])
        axes.set_xscale("log", base=2)
        ticks = _apart(sorted({x for line in providers.values() for x, _ in line}))
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        rows = [row for one in found if one.op == op for row in one.rows]
        axes.set_title("\n".join(filter(None, [op, _setting(rows)])), fontsize=10)
        axes.set_xlabel("N")
        axes.set_ylabel(unit)
        finish(axes, rows)
    figure.supxlabel(caption, fontsize=9)
    _legend(figure, list(grid[: len(ops)]))
    return True


def _setting(rows: Sequence[Row]) -> str:
    """What is the same along the series over N: `H = 128, V = 9,496, float32`."""
    sizes = {key: {row.shape[key] for row in rows if key in row.shape} for key in ("H", "V")}
    words = [f"{key} = {min(at):,}" for key, at in sizes.items() if len(at) == 1]
    return ", ".join([*words, *sorted({row.dtype for row in rows} - {""})])


def _apart(sizes: Sequence[float]) -> list[float]:
    """Those sizes whose labels have room beside one another on a logarithmic axis, the largest among them."""
    least = (sizes[-1] / sizes[0]) ** (1 / _MOST_TICKS)
    ticks = [sizes[-1]]
    for size in reversed(sizes):
        if ticks[-1] / size >= least:
            ticks.append(size)
    return ticks[::-1]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, each provider once."""
    named: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=_LEGEND_COLUMNS)
