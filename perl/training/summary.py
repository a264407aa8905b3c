"""What a run comes to: numbers before and after RL, where the time went, and the final table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from perl.report.metrics import MEASURES, mean
from perl.report.tables import print_table
from perl.timing import peak_rss_bytes
from perl.training.session import Session

_LABELS = {
    "accuracy": "accuracy, T = 1",
    "greedy": "accuracy, greedy",
    "consistency": "consistency",
}
_MEASURED = [f"{measure}_{at}" for measure in MEASURES for at in ("before", "after")]


def summarise(session: Session) -> dict[str, Any]:
    """The numbers of one run, for `summary.json`; accuracies and consistencies are 0 to 1, None if not measured."""
    results, components = session.progress.results, session.components
    measured, best = (name.rpartition("_") for name in _MEASURED), session.progress.best
    return {
        **{f"{name}_{at}": (results.get(at) or {}).get(name) for name, _, at in measured},
        "seconds": round(session.elapsed, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds_by_stage": {k: round(v, 1) for k, v in components.watch.total_seconds.items()},
        "best": best and {"by": session.config.run.keep_best, **best},
        "seed": session.config.run.seed,
        "model": session.config.model.path,
        "parameters": sum(p.numel() for p in components.policy.parameters()),
        "processes": session.processes.count,
        "device": str(components.accelerator.device),
        "versions": versions(),
    }


def summarise_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds under the same names, and each seed's own numbers under `per_seed`."""
    first = summaries[0]
    means = {name: round(mean([s[name] for s in summaries]), 6) for name in _MEASURED}
    stages = dict.fromkeys(name for s in summaries for name in s["seconds_by_stage"])
    return {
        **{name: None if math.isnan(value) else value for name, value in means.items()},
        "seconds": round(sum(s["seconds"] for s in summaries), 1),
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in summaries),
        "seconds_by_stage": {
            name: round(sum(s["seconds_by_stage"].get(name, 0.0) for s in summaries), 1)
            for name in stages
        },
        "seeds": [s["seed"] for s in summaries],
        "per_seed": list(summaries),
        **{name: first[name] for name in ("model", "parameters", "device", "versions")},
    }


def print_summary(summary: dict[str, Any], title: str) -> None:
    """The final table on standard output: before and after RL, mean and range over seeds, and the time by stage."""
    runs = summary.get("per_seed", [summary])
    rows = [["percent", "before RL", "after RL", "change"]]
    for name in MEASURES:
        before, after = ([r[f"{name}_{at}"] for r in runs] for at in ("before", "after"))
        pairs = zip(before, after, strict=True)
        changes = [None if b is None or a is None else a - b for b, a in pairs]
        rows.append([_LABELS[name], _cell(before), _cell(after), _cell(changes, sign="+")])
    if any(run[name] is not None for run in runs for name in _MEASURED):
        print_table(rows, f"{title}: held out, over image orders")
        if len(runs) > 1:
            print(f"mean (lowest..highest) of {len(runs)} seeds")
    for best in filter(None, (run.get("best") for run in runs)):
        print(f"best {best['by']}: {best['value']:.4g} at step {best['step']:.0f}, in models/best")
    stages = sorted(summary["seconds_by_stage"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages if seconds >= 0.5)
    print(
        f"{summary['seconds']:.0f} s in all{': ' if spent else ''}{spent}; "
        f"peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("perl-rl", "torch", "transformers", "accelerate")}


def _cell(values: Sequence[float | None], sign: str = "") -> str:
    numbers = [100 * v for v in values if v is not None]
    if not numbers:
        return "-"
    text = f"{sum(numbers) / len(numbers):{sign}.1f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.1f}..{max(numbers):.1f})"
