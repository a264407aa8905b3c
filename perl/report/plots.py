"""The pictures of a run: one PNG per question a reader asks of its metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perl.report.metrics import Curve, RunLog, curve_of, smoothed, spread

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


@dataclass(frozen=True)
class Panel:
    """What one line chart shows: metrics of a stage over its steps, and held-out points."""

    name: str
    title: str
    unit: str
    caption: str
    lines: tuple[tuple[str, str], ...]
    """(metric, label) of each line."""
    points: tuple[tuple[str, str], ...] = ()
    """(field of an evaluation, label) of each series of markers."""
    scale: Literal["share", "small_share", "zero", "free"] = "zero"
    """share, small_share: per cent, readable span or from 0; zero: from 0; free: as data go."""
    stage: Literal["rl", "cold_start"] = "rl"


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the words that go with it."""

    name: str
    caption: str
    alt: str
    path: Path


PANELS = (
    Panel("curve", "Accuracy and consistency over RL", "accuracy, consistency",
          "Training rollouts as lines, held-out examples in many image orders as markers.",
          (("reward/accuracy", "accuracy, training"), ("consistency", "consistency, training")),
          (("accuracy", "accuracy, held out"), ("consistency", "consistency, held out")), "share"),
    Panel("reward", "Reward", "mean per completion",
          "The weighted reward of a completion and its unweighted parts.",
          (("reward/mean", "weighted sum"),), (), "free"),
    Panel("accuracy", "Accuracy", "right completions",
          "Right completions among training rollouts, and on held-out examples sampled and greedy.",
          (("reward/accuracy", "training"),),
          (("accuracy", "held out, sampled"), ("greedy", "held out, greedy")), "share"),
    Panel("consistency", "Consistency across image orders", "consistency",
          "How often completions of two different image orders choose the same picture.",
          (("consistency", "training"),), (("consistency", "held out"),), "share"),
    Panel("length", "Response length", "tokens per completion",
          "Mean length of a completion.", (("length/mean", "mean"),)),
    Panel("truncated", "Truncated completions", "share of completions",
          "Completions that reached the longest length without an end.",
          (("length/truncated", "truncated"),), (), "small_share"),
    Panel("entropy", "Policy entropy", "nats per token",
          "Mean entropy of the policy at the scored tokens.", (("entropy", "entropy"),)),
    Panel("kl", "KL to the reference model", "nats per token",
          "Distance of the policy from the model that RL started with.", (("kl", "KL"),)),
    Panel("clip_fraction", "Clip fraction", "share of tokens",
          "Tokens whose probability ratio was clipped.",
          (("clip_fraction", "clipped"),), (), "small_share"),
    Panel("grad_norm", "Gradient norm", "L2 norm",
          "Norm of the gradient before clipping.", (("grad_norm", "norm"),)),
    Panel("throughput", "Throughput", "tokens per second",
          "Tokens of a step over the step's time.",
          (("throughput/tokens_per_second", "throughput"),)),
    Panel("sharing", "Work shared", "times less",
          "Tokens and images if each completion had its own prompt, over those that were computed.",
          (("packing/token_sharing", "tokens"), ("packing/image_sharing", "images"))),
    Panel("cold_start", "Cold-start loss", "nats per token",
          "Loss of the supervised steps on demonstrations.",
          (("loss", "loss"),), (), "zero", "cold_start"),
)  # fmt: skip


def draw_pictures(
    runs: Sequence[RunLog], seconds_by_stage: Mapping[str, float], folder: Path
) -> tuple[list[Picture], list[str]]:
    """Draw what the runs have numbers for into `folder`.

    Several runs are seeds of one recipe: a line is their mean, a band their range.
    Returns the pictures, and a sentence for each that could not be drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Picture] = []
    missing: list[str] = []
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
            if any(run.rl for run in runs) and name != "cold_start":  # else one note says it all
                missing.append(title)
        except Exception as error:
            logging.getLogger(__name__).warning("picture %s: %s", name, error)
            troubles.append(f"The picture “{title}” could not be drawn: {error}")
        path.unlink(missing_ok=True)  # never show an older report's picture for these numbers

    with matplotlib.rc_context(STYLE):
        for p in PANELS:
            attempt(p.name, p.title, p.caption, lambda figure, p=p: _draw_panel(figure, p, runs))
        caption = "Groups with equal rewards carry no gradient and are dropped."
        attempt("groups", "Groups kept and filtered", caption, lambda f: _draw_groups(f, runs))
        caption = "Wall-clock time by stage."
        attempt("time", "Where the time went", caption, lambda f: _draw_time(f, seconds_by_stage))
    if missing:
        troubles.append("No numbers recorded for: " + ", ".join(missing) + ".")
    return pictures, troubles


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


def _draw_panel(figure: Figure, panel: Panel, runs: Sequence[RunLog]) -> str:
    """One line chart; returns what it shows in words, empty where there is nothing to show."""
    axes = figure.subplots()
    lines, words = panel.lines, []
    if panel.name == "reward":
        keys = {k for run in runs for row in run.rl for k in row if k.startswith("reward/")}
        parts = sorted(keys - {"reward/mean", "reward/std", "reward/min", "reward/max"})
        lines += tuple((key, key.removeprefix("reward/")) for key in parts)
    for (key, label), colour in zip(lines, COLOURS, strict=False):
        curves = [curve_of(r.rl if panel.stage == "rl" else r.cold_start, key) for r in runs]
        width = 2.0 if panel.points or key == lines[0][0] else 1.5
        words += _draw_line(axes, [c for c in curves if c], label, colour, width)
    for i, (key, label) in enumerate(panel.points):
        curves = [curve_of(run.evaluations, key) for run in runs]
        colour = COLOURS[i] if panel.name == "curve" else (VERMILION, GREEN)[i]
        words += _draw_points(axes, [c for c in curves if c], label, colour, "oD"[i])
    if not words:
        return ""
    _finish(figure, axes, panel.unit, "RL step" if panel.stage == "rl" else "step")
    _set_scale(axes, panel.scale)
    if panel.name == "curve":
        _write_values(axes, panel, runs)
    return "; ".join(words) + "."


def _draw_line(
    axes: Axes, curves: Sequence[Curve], label: str, colour: str, width: float
) -> list[str]:
    """Raw values faint and their average strong; with several seeds their mean and range.

    Where some seeds are shorter the mean goes as far as all of them, and each is drawn thin too:
    a mean over fewer and fewer seeds would jump where one ends.
    """
    if not curves:
        return []
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
    axes.plot(list(line), list(line.values()), color=colour, label=label, lw=width, marker=marker)
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


def _finish(figure: Figure, axes: Axes, ylabel: str, xlabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(handles)))


def _draw_groups(figure: Figure, runs: Sequence[RunLog]) -> str:
    """Stacked: groups trained on, groups of equal rewards, and the rest of those seen."""
    from matplotlib.ticker import MaxNLocator

    def over_seeds(key: str) -> Curve:
        values = spread([curve_of(run.rl, key) for run in runs])
        curve = {step: centre for step, (centre, _, _) in values.items()}
        return smoothed(curve) if len(curve) > 100 else curve

    kept, flat, seen = (over_seeds(f"groups/{k}") for k in ("kept", "zero_variance", "seen"))
    steps = sorted(kept)
    if not steps:
        return ""
    same = [flat.get(s, max(0.0, seen.get(s, kept[s]) - kept[s])) for s in steps]
    rest = [max(0.0, seen.get(s, 0.0) - kept[s] - f) for s, f in zip(steps, same, strict=True)]
    layers = [([kept[s] for s in steps], "kept", BLUE), (same, "equal rewards", "#F0B48A")]
    if max(rest) > 1e-6:
        layers.append((rest, "not needed or unscored", "#D0D0D0"))
    axes = figure.subplots()
    half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
    padded = [steps[0] - half, *steps, steps[-1] + half]
    heights, labels, colours = zip(*layers, strict=True)
    heights = [[v[0], *v, v[-1]] for v in heights]
    axes.stackplot(padded, heights, step="mid", linewidth=0, labels=labels, colors=colours)
    axes.set_xlim(padded[0], padded[-1])
    _finish(figure, axes, "groups per step", "RL step")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return _shares((label, sum(values)) for values, label, _ in layers)


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
    return _shares((stage.replace("_", " "), value) for value, stage in reversed(stages))


def _shares(parts: Iterable[tuple[str, float]]) -> str:
    parts = list(parts)
    total = sum(value for _, value in parts) or 1.0
    return ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts) + "."
