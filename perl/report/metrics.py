"""A run folder read back as data: metrics, evaluations, summary, and the numbers made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from perl.files import read_rows

MEASURES = {
    "accuracy": "Accuracy, sampled",
    "greedy": "Accuracy, greedy",
    "consistency": "Consistency",
    "reward": "Reward",
}
"""Fields of an evaluation, and what a reader calls them."""
HEADLINE = (
    *(f"{measure}_{at}" for measure in MEASURES for at in ("before", "after")),
    "seconds",
    "peak_rss_bytes",
)
"""The keys of summary.json that make the headline."""

Rows = Sequence[Mapping[str, Any]]
Curve = dict[float, float]
"""step -> value, steps ascending."""


@dataclass(frozen=True)
class RunLog:
    """What one run folder holds, as far as it could be read."""

    name: str
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    cold_start: list[dict[str, Any]] = field(default_factory=list)
    rl: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> float:
        """Of RL; 0 without any."""
        return max(curve_of(self.rl, "step"), default=0.0)


def number(value: object) -> float | None:
    """`value` as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def mean(values: Iterable[float | None]) -> float:
    """Mean of what is neither None nor NaN; NaN if nothing is left."""
    kept = [float(v) for v in values if v is not None and not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def curve_of(rows: Rows, key: str) -> Curve:
    """The finite values of one metric by step; a step written again after a resume counts once."""
    found: Curve = {}
    for row in rows:
        step, value = number(row.get("step")), number(row.get(key))
        if step is not None and value is not None:
            found[step] = value
    return dict(sorted(found.items()))


def smoothed(curve: Curve) -> Curve:
    """A centred moving average over about a tenth of the curve; the window is cut at the ends."""
    values = list(curve.values())
    reach = len(values) // 20 if len(values) >= 20 else int(len(values) >= 8)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return {step: mean(window) for step, window in zip(curve, windows, strict=True)}


def spread(curves: Sequence[Curve]) -> dict[float, tuple[float, float, float]]:
    """step -> (mean, lowest, highest) over the curves that have a value there."""
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            by_step.setdefault(step, []).append(value)
    return {s: (mean(v), min(v), max(v)) for s, v in sorted(by_step.items())}


def read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a record of a run; damaged ones are left out and noted."""
    rows = list(read_rows(path))
    if damaged := rows.count({}):
        notes.append(f"{path.name}: {damaged} damaged {plural('line', damaged)} left out.")
    return [row for row in rows if row]


def read_run(folder: Path) -> RunLog:
    """Read the metrics and the summary of one run folder."""
    notes: list[str] = []
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except FileNotFoundError:
        summary = {}
        notes.append("The run has not finished (no summary.json): numbers come from metrics.jsonl.")
    except (OSError, ValueError, RecursionError):
        summary = {}
        notes.append("summary.json cannot be read: numbers come from metrics.jsonl.")
    by_stage: dict[str, list[dict[str, Any]]] = {"cold_start": [], "rl": [], "evaluate": []}
    for row in read_records(folder / "metrics.jsonl", notes):
        by_stage.get(str(row.get("stage")), []).append(row)
    if not any(by_stage.values()):
        notes.append("No metrics recorded.")
    elif not by_stage["rl"]:
        notes.append("No RL step recorded.")
    if not by_stage["evaluate"]:
        notes.append("No evaluation on held-out examples recorded.")
    values = (item for rows in by_stage.values() for row in rows for item in row.items())
    bad = {key for key, value in values if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        notes.append(f"Not finite at some steps, and left out there: {', '.join(sorted(bad))}.")
    summary = summary if isinstance(summary, dict) else {}
    stages = (by_stage["cold_start"], by_stage["rl"], by_stage["evaluate"])
    return RunLog(folder.name, folder, summary, *stages, notes)


def headline(run: RunLog) -> dict[str, float]:
    """A run's headline numbers by summary.json's keys; what is unknown is absent."""
    found: dict[str, float | None] = {}
    rows = [*run.cold_start, *run.rl, *run.evaluations]
    for row in run.evaluations:
        if row.get("at") in ("before", "after"):
            found |= {f"{m}_{row['at']}": number(row.get(m)) for m in MEASURES}
    for name, key in (("seconds", "time/elapsed"), ("peak_rss_bytes", "memory/peak_rss_bytes")):
        values = [number(row.get(key)) for row in rows]
        found[name] = max((v for v in values if v is not None), default=None)
    found |= {k: v for k in HEADLINE if (v := number(run.summary.get(k))) is not None}
    return {key: value for key, value in found.items() if value is not None}


def step_medians(rows: Rows) -> dict[str, float]:
    """Of RL steps: seconds (`step`), tokens a second on one GPU (`tokens_per_second_per_gpu`) and MFU by stage (`mfu/...`)."""
    found = {
        "step": "time/step",
        "tokens_per_second_per_gpu": "throughput/tokens_per_second_per_gpu",
    }
    found |= {k: k for row in rows for k in row if k.startswith("mfu/")}
    values = {
        n: [v for r in rows if (v := number(r.get(key))) is not None] for n, key in found.items()
    }
    return {name: median(known) for name, known in values.items() if known}


def stage_bytes(rows: Rows) -> dict[str, int]:
    """Most memory by stage, as in `update/rss_bytes` and `update/device_bytes`."""
    most: dict[str, int] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("memory/") and key.count("/") == 2 and number(value) is not None:
                name = key.removeprefix("memory/")
                most[name] = max(most.get(name, 0), int(value))
    return most


def stage_seconds(runs: Sequence[RunLog]) -> dict[str, float]:
    """Seconds by stage, the mean over runs; summed up from the steps where no summary has them."""
    totals: dict[str, float] = {}
    for run in runs:
        by_stage = run.summary.get("seconds_by_stage")
        pairs = list(by_stage.items()) if isinstance(by_stage, dict) else []
        if not pairs:
            pairs = [("cold_start", row.get("time/step")) for row in run.cold_start]
            for row in run.rl:
                parts = {k[5:]: number(v) or 0.0 for k, v in row.items() if k.startswith("time/")}
                step = parts.pop("step", 0.0)
                parts.pop("elapsed", None)
                pairs += [*parts.items(), ("other", step - sum(parts.values()))]
        for stage, value in pairs:
            totals[stage] = totals.get(stage, 0.0) + max(0.0, number(value) or 0.0) / len(runs)
    return {stage: v for stage, v in sorted(totals.items(), key=lambda kv: -kv[1]) if v > 0}
