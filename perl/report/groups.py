"""Pictures of what became of the groups that a run rolled out, and of those that it trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perl.report.metrics import Curve, RunLog, curve_of, smoothed, spread
from perl.report.style import BLUE, INK, PURPLE, finish, shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_groups(figure: Figure, runs: Sequence[RunLog]) -> str:
    """Stacked: groups trained on, those over the batch, groups of equal rewards, and the rest of those seen."""
    kept = _over_seeds(runs, "kept")
    flat, seen, over = (_over_seeds(runs, name) for name in ("zero_variance", "seen", "overflow"))
    own = {step: max(0.0, value - over.get(step, 0.0)) for step, value in kept.items()}
    same = {s: flat.get(s, max(0.0, seen.get(s, k) - k)) for s, k in kept.items()}
    rest = {s: max(0.0, seen.get(s, 0.0) - k - same[s]) for s, k in kept.items()}
    layers = [
        (own, "trained on", BLUE),
        (over, "over the batch", "#56B4E9"),
        (same, "equal rewards", "#F0B48A"),
        (rest, "not needed or unscored", "#D0D0D0"),
    ]
    return _draw_layers(figure, layers, always=("trained on", "equal rewards"))


def draw_trained(figure: Figure, runs: Sequence[RunLog]) -> str:
    """Stacked: groups of the step, of earlier steps, and replayed ones; a line for those rolled out. Empty where all that was
    trained on is of its own step: `draw_groups` shows that."""
    kept, over, seen = (_over_seeds(runs, name) for name in ("kept", "overflow", "seen"))
    reused, replayed = (_over_seeds(runs, name) for name in ("reused", "replayed"))
    if not any((*reused.values(), *replayed.values())):
        return ""
    own = {step: max(0.0, value - over.get(step, 0.0)) for step, value in kept.items()}
    layers = [
        (own, "of the step", BLUE),
        (reused, "left from the step before", "#56B4E9"),
        (replayed, "replayed", PURPLE),
    ]
    return _draw_layers(figure, layers, line=(seen, "rolled out"))


def _over_seeds(runs: Sequence[RunLog], name: str) -> Curve:
    values = spread([curve_of(run.rl, f"groups/{name}") for run in runs])
    curve = {step: centre for step, (centre, _, _) in values.items()}
    return smoothed(curve) if len(curve) > 100 else curve


def _draw_layers(
    figure: Figure,
    layers: Sequence[tuple[Curve, str, str]],
    always: Sequence[str] = (),
    line: tuple[Curve, str] | None = None,
) -> str:
    """Groups per step, one layer on top of the other; of those that are 0 throughout only `always`."""
    from matplotlib.ticker import MaxNLocator

    steps = sorted(layers[0][0])
    if not steps:
        return ""
    stacked = [
        ([curve.get(s, 0.0) for s in steps], label, colour) for curve, label, colour in layers
    ]
    stacked = [layer for layer in stacked if layer[1] in always or max(layer[0]) > 1e-6]
    axes = figure.subplots()
    half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
    padded = [steps[0] - half, *steps, steps[-1] + half]
    heights, labels, colours = zip(*stacked, strict=True)
    heights = [[v[0], *v, v[-1]] for v in heights]
    axes.stackplot(padded, heights, step="mid", linewidth=0, labels=labels, colors=colours)
    if line:
        values = [line[0].get(s, 0.0) for s in steps]
        values = [values[0], *values, values[-1]]
        axes.step(padded, values, where="mid", color=INK, lw=1.2, ls="--", label=line[1])
    axes.set_xlim(padded[0], padded[-1])
    axes.set_ylim(bottom=0)
    finish(figure, axes, "groups per step", "RL step")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return shares((label, sum(values)) for values, label, _ in stacked)
