"""The pictures of a run: one PNG per question a reader asks of its metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.report.groups import draw_groups, draw_trained
from perl.report.metrics import Curve, RunLog, curve_of, smoothed, spread
from perl.report.panels import FAULTS, OF_THE_SUM, PANELS, Panel
from perl.report.style import BLUE, COLOURS, GREEN, STYLE, VERMILION, finish, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the words that go with it."""

    name: str
    caption: str
    alt: str
    path: Path


def draw_pictures(
    runs: Sequence[RunLog], seconds_by_stage: Mapping[str, float], folder: Path
) -> tuple[list[Picture], list[str], list[str]]:
    """Draw what the runs have numbers for into `folder`.

    Several runs are seeds of one recipe: a line is their mean, a band their range.
    Returns the pictures, a sentence for each that could not be drawn, and the names of lines that are 0 at every step.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Picture] = []
    missing: list[str] = []
    zero: list[str] = []
    troubles: list[str] = []

    def attempt(name: str, title: str, caption: str, draw: Callable[[Figure], str]) -> None:
        path = folder / f"{name}.png"
        figure = Figure(figsize=(5.8, 3.7) if name == "curve" else (4.7, 3.2), layout="constrained")
        try:
            alt = draw(figure)
            if alt:
                figure.axes[0].set_title(title)
                figure.savefig(path, dpi=220)
                pictures.append(Picture(name, caption, f"{title}. {alt}", path))
                return
            # Without RL one note says it all; a run may have no cold start, and should have no faults.
            optional = name in ("cold_start", "faults", "parts", "trained", "mfu", "mismatch")
            if any(run.rl for run in runs) and not optional and title not in zero:
                missing.append(title)
        except Exception as error:
            logging.getLogger(__name__).warning("picture %s: %s", name, error)
            troubles.append(f"The picture “{title}” could not be drawn: {error}")
        path.unlink(missing_ok=True)  # never show an older report's picture for these numbers

    with matplotlib.rc_context(STYLE):
        for p in PANELS:
            attempt(
                p.name, p.title, p.caption, lambda figure, p=p: _draw_panel(figure, p, runs, zero)
            )
        caption = "What became of the groups that were rolled out. Equal rewards carry no gradient."
        attempt("groups", "Groups rolled out", caption, lambda f: draw_groups(f, runs))
        caption = "Where the groups that were trained on come from, beside those rolled out."
        attempt("trained", "Groups trained on", caption, lambda f: draw_trained(f, runs))
        caption = "Wall-clock time by stage."
        attempt("time", "Where the time went", caption, lambda f: _draw_time(f, seconds_by_stage))
    if missing:
        troubles.append("No numbers recorded for: " + ", ".join(missing) + ".")
    return pictures, troubles, zero


def filter_pictures(runs: Sequence[RunLog]) -> list[Picture]:
    """What the filter stages have drawn of their data, for each run."""
    return [
        Picture(
            f"filter-{run.name}-{path.stem}",
            f"Stage {path.stem}: questions by the accuracy of their rollouts, before and after; "
            "marks show the target.",
            f"Histogram of the accuracies of the questions that the stage {path.stem} measured and kept.",
            path,
        )
        for run in runs
        for path in sorted((run.folder / "filtered").glob("*.png"))
    ]


def _draw_panel(figure: Figure, panel: Panel, runs: Sequence[RunLog], zero: list[str]) -> str:
    """One line chart; returns what it shows in words, empty where there is nothing to show.

    A line that is 0 at every step is left out and, unless it counts faults, named in `zero`.
    """
    axes = figure.subplots()
    words: list[str] = []
    drawn = 0
    for key, label in (*panel.lines, *_rest(panel, runs)):
        curves = [curve_of(r.rl if panel.stage == "rl" else r.cold_start, key) for r in runs]
        curves = [c for c in curves if c and max(map(abs, c.values())) >= panel.least]
        # A measure or a sum of rewards that stays at 0 is what a reader looks for.
        shown = (
            panel.scale == "share" or key == "reward/mean" or any(any(c.values()) for c in curves)
        )
        if curves and not shown:
            whole = len(panel.lines) == 1 and not panel.rest
            if panel.rest != FAULTS:
                zero.append(panel.title if whole else f"{panel.title}: {label}")
            continue
        again, number = divmod(drawn, len(COLOURS))
        style: dict[str, Any] = {
            "color": COLOURS[number],
            "lw": 2.0 if panel.points or not drawn else 1.5,
            "ls": ("-", "--", ":")[min(again, 2)],
        }
        words += _draw_line(axes, curves, label, style)
        drawn += bool(curves)
    for i, (key, label) in enumerate(panel.points):
        curves = [curve_of(run.evaluations, key) for run in runs]
        as_line = panel.name in ("curve", "reward")  # Each belongs to the line of that number.
        colour = COLOURS[i] if as_line else (VERMILION, GREEN)[i]
        words += _draw_points(axes, [c for c in curves if c], label, colour, "oD"[i])
    if not words:
        return ""
    steps = "RL step" if panel.stage == "rl" else "step"
    finish(figure, axes, panel.unit, steps, alone=bool(panel.rest))
    _set_scale(axes, panel.scale)
    if panel.name == "curve":
        _write_values(axes, panel, runs)
    return "; ".join(words) + "."


def _rest(panel: Panel, runs: Sequence[RunLog]) -> list[tuple[str, str]]:
    """Metrics and labels of the lines that a panel has beside its own."""
    if not panel.rest:
        return []
    keys = {key for run in runs for row in run.rl for key in row if key.startswith(panel.rest)}
    if panel.rest != FAULTS:
        # Parts have scales of their own, which would press the scores flat.
        parts = {key for key in keys if key.rpartition("/")[0] in keys}
        faults = {key for key in keys if key.startswith(FAULTS)}
        keys = parts - faults if panel.name == "parts" else keys - parts - faults - OF_THE_SUM
    return [(key, key.removeprefix(panel.rest)) for key in sorted(keys)]


def _draw_line(
    axes: Axes, curves: Sequence[Curve], label: str, style: Mapping[str, Any]
) -> list[str]:
    """Raw values faint and their average strong; with several seeds their mean and range.

    Where some seeds are shorter the mean goes as far as all of them, and each is drawn thin too:
    a mean over fewer and fewer seeds would jump where one ends.
    """
    if not curves:
        return []
    colour = style["color"]
    if len(curves) == 1:
        raw, line = curves[0], smoothed(curves[0])
        if line != raw:
            axes.plot(list(raw), list(raw.values()), color=colour, alpha=0.25, linewidth=0.9)
    else:
        curves = [smoothed(c) for c in curves]
        shared = set(curves[0]).intersection(*curves[1:])
        band = {step: b for step, b in spread(curves).items() if step in shared}
        line = {step: centre for step, (centre, _, _) in band.items()} or max(curves, key=len)
        for curve in curves if len(shared) < max(map(len, curves)) else ():
            axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.4, linewidth=0.9)
        low, high = [b[1] for b in band.values()], [b[2] for b in band.values()]
        axes.fill_between(list(band), low, high, color=colour, alpha=0.18, linewidth=0)
    marker = "o" if len(line) == 1 else None
    axes.plot(list(line), list(line.values()), label=label, marker=marker, **style)
    steps = list(line)
    return [_words(label, {step: line[step] for step in (steps[0], steps[-1])})]


def _draw_points(
    axes: Axes, curves: Sequence[Curve], label: str, colour: str, marker: str
) -> list[str]:
    """Held-out measurements as markers; with several seeds their mean, whiskers for the range."""
    if not curves:
        return []
    points = spread(curves)
    steps, centre = list(points), [p[0] for p in points.values()]
    below = [max(0.0, c - low) for c, low, _ in points.values()]  # rounding may put a mean outside
    above = [max(0.0, high - c) for c, _, high in points.values()]
    if len(curves) > 1:
        axes.errorbar(steps, centre, yerr=[below, above], fmt="none", ecolor=colour, capsize=3)
    # Two points alone, joined, would look like a measured line.
    line = ":" if max(map(len, curves)) > 2 else "none"
    style: dict[str, Any] = {"marker": marker, "ms": 7, "mec": "white", "color": colour}
    axes.plot(steps, centre, ls=line, lw=1.2, clip_on=False, label=label, **style)
    return [_words(label, dict(zip(steps, centre, strict=True)))]


def _words(label: str, values: Curve) -> str:
    return f"{label}: " + ", ".join(f"{v:.3g} at step {step:g}" for step, v in values.items())


def _write_values(axes: Axes, panel: Panel, runs: Sequence[RunLog]) -> None:
    """Write the first and last held-out values beside their markers, apart where they are close."""
    found = [spread([curve_of(run.evaluations, key) for run in runs]) for key, _ in panel.points]
    low, high = axes.get_ylim()
    for i, points in enumerate(found):
        other = found[1 - i]
        for step in sorted({min(points), max(points)} if points else ()):
            value, shift = points[step][0], 0
            gap = value - other[step][0] if step in other else 1.0
            if abs(gap) < 0.06 * (high - low):
                shift = 6 if gap > 0 or (gap == 0 and i == 0) else -6
            side, aligned = (-8, "right") if step == min(points) else (8, "left")
            look: dict[str, Any] = {"color": COLOURS[i], "fontweight": "bold", "va": "center"}
            place = {"xytext": (side, shift), "textcoords": "offset points", "ha": aligned}
            axes.annotate(f"{100 * value:.0f} %", (step, value), **place, **look)
    start, end = axes.get_xlim()
    axes.set_xlim(start - 0.1 * (end - start), end + 0.08 * (end - start))


def _set_scale(axes: Axes, scale: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    if scale == "share":
        middle, half = (low + high) / 2, max(0.1, 0.56 * (high - low))
        shift = max(0.0, -0.02 - middle + half) - max(0.0, middle + half - 1.02)
        axes.set_ylim(max(-0.02, middle - half + shift), min(1.02, middle + half + shift))
    elif scale == "small_share":
        axes.set_ylim(0, max(0.01, 1.1 * high))
    elif scale == "zero" and low >= 0:
        axes.set_ylim(0, 1.1 * high if high > 0 else 1)
    if scale.endswith("share"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))


def _draw_time(figure: Figure, seconds: Mapping[str, float]) -> str:
    """One bar per stage, the longest on top."""
    stages = sorted(((v, k) for k, v in seconds.items() if v > 0))
    if not stages:
        return ""
    longest, total = stages[-1][0], sum(seconds.values())
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, name = next(u for u in units if longest >= 2 * u[0] or u[0] == 1)
    axes = figure.subplots()
    widths = [value / unit for value, _ in stages]
    bars = axes.barh([s.replace("_", " ") for _, s in stages], widths, color=BLUE, height=0.65)
    axes.bar_label(bars, [f"{100 * v / total:.0f} %" for v, _ in stages], padding=4, fontsize=9)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.15 * widths[-1])
    room = max(0.0, (3 - len(stages)) / 2)
    axes.set_ylim(-0.6 - room, len(stages) - 0.4 + room)
    axes.set_xlabel(name)
    return shares((stage.replace("_", " "), value) for value, stage in reversed(stages))
