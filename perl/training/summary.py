"""What a run comes to: numbers before and after RL, where the time went, and the final table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from perl.report.metrics import MEASURES
from perl.timing import peak_rss_bytes
from perl.training.session import Session


def summarise(session: Session) -> dict[str, Any]:
    """The numbers of one run, for `summary.json`; accuracies and consistencies are 0 to 1, None if not measured."""
    results = session.progress.results
    out: dict[str, Any] = {}
    for name in MEASURES:
        for at in ("before", "after"):
            out[f"{name}_{at}"] = (results.get(at) or {}).get(name)
    return out | {
        "seconds": round(session.elapsed, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds_by_stage": {
            k: round(v, 1) for k, v in session.components.watch.total_seconds.items()
        },
        "seed": session.config.run.seed,
        "model": session.config.model.path,
        "parameters": sum(p.numel() for p in session.components.policy.parameters()),
        "processes": session.processes.count,
        "device": str(session.components.accelerator.device),
        "versions": versions(),
    }


def summarise_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds under the same names, and each seed's own numbers under `per_seed`."""
    first = summaries[0]
    out = {
        f"{m}_{at}": _mean([s[f"{m}_{at}"] for s in summaries])
        for m in MEASURES
        for at in ("before", "after")
    }
    stages = dict.fromkeys(name for s in summaries for name in s["seconds_by_stage"])
    return out | {
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


def print_table(summary: dict[str, Any], title: str) -> None:
    """The final table on standard output: before and after RL, mean and range over seeds, and the time by stage."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    runs = summary.get("per_seed", [summary])
    console = Console()
    table = Table(
        title=f"{title}: held out, over image orders",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("percent")
    for heading in ("before RL", "after RL", "change"):
        table.add_column(heading, justify="right")
    labels = {
        "accuracy": "accuracy, T = 1",
        "greedy": "accuracy, greedy",
        "consistency": "consistency",
    }
    for name in MEASURES:
        before, after = ([r[f"{name}_{at}"] for r in runs] for at in ("before", "after"))
        changes = [
            None if b is None or a is None else a - b for b, a in zip(before, after, strict=True)
        ]
        table.add_row(labels[name], _cell(before), _cell(after), _cell(changes, sign=True))
    measured = any(
        r[f"{m}_{at}"] is not None for r in runs for m in MEASURES for at in ("before", "after")
    )
    if measured:
        console.print(table)
    if measured and len(runs) > 1:
        console.print(f"mean (lowest..highest) of {len(runs)} seeds", highlight=False)
    stages = sorted(summary["seconds_by_stage"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages if seconds >= 0.5)
    console.print(
        f"{summary['seconds']:.0f} s in all{': ' if spent else ''}{spent}; "
        f"peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB",
        highlight=False,
    )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from importlib.metadata import version

    return {
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "accelerate")},
    }


def _cell(values: Sequence[float | None], sign: bool = False) -> str:
    numbers = [100 * v for v in values if v is not None]
    if not numbers:
        return "-"
    form = "+.1f" if sign else ".1f"
    text = format(sum(numbers) / len(numbers), form)
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.1f}..{max(numbers):.1f})"


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return round(sum(numbers) / len(numbers), 6) if numbers else None
