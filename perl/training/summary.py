"""What a run comes to: numbers before and after RL, where the time went, and the final table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from perl.config import names_of
from perl.evaluation.evaluate import accuracy_of
from perl.files import read_rows
from perl.model.sharding import spread
from perl.report.metrics import MEASURES, mean, stage_bytes, step_medians
from perl.report.tables import print_table
from perl.timing import peak_rss_bytes
from perl.training.roofline.devices import peak_of
from perl.training.session import Session

_COMMON = ("model", "accuracy_by", "parameters", "processes", "weights", "device", "versions")
_ENDS = ("_before", "_after")


def summarise(session: Session) -> dict[str, Any]:
    """The numbers of one run, for `summary.json`; accuracies and consistencies are 0 to 1, None if not measured."""
    components, best = session.components, session.progress.best
    before, after = (session.progress.results.get(at) or {} for at in ("before", "after"))
    names = [*MEASURES, *(k for k in {**before, **after} if k.startswith("reward/"))]
    ends = (
        (name, end, row) for name in names for end, row in zip(_ENDS, (before, after), strict=True)
    )
    rows = [row for row in read_rows(session.folder.metrics) if row]
    medians = step_medians([row for row in rows if row.get("stage") == "rl"])
    compared = any(name.startswith("mfu/") for name in medians)
    in_all = {f"memory/{key}": most for key, most in components.watch.total_bytes.items()}
    device = components.accelerator.device
    return {
        **{f"{name}{end}": row.get(name) for name, end, row in ends},
        "accuracy_by": (accuracy_of(session.config) or ("", None))[1],
        "seconds": round(session.elapsed, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds_by_stage": {k: round(v, 1) for k, v in components.watch.total_seconds.items()},
        "bytes_by_stage": stage_bytes([*rows, in_all]),
        "median_step": medians,
        "peak_flops": vars(peak_of(device, components.policy.dtype)) if compared else None,
        "best": best and {"by": session.config.run.keep_best, **best},
        "seed": session.config.run.seed,
        "model": session.config.model.path,
        "parameters": sum(p.numel() for p in components.policy.parameters()),
        "processes": session.processes.count,
        "weights": spread(components.policy.sharding, session.processes.count),
        "device": str(device),
        "versions": versions(),
    }


def summarise_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds under the same names, and each seed's own numbers under `per_seed`."""
    first = summaries[0]
    measured = dict.fromkeys(name for s in summaries for name in s if name.endswith(_ENDS))
    means = {name: round(mean([s.get(name) for s in summaries]), 6) for name in measured}
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
        **{name: first.get(name) for name in _COMMON},
    }


def print_summary(summary: dict[str, Any], title: str) -> None:
    """The final table on standard output: before and after RL, mean and range over seeds, and the time by stage."""
    runs = summary.get("per_seed", [summary])
    rows, rewards = [["percent", "before RL", "after RL", "change"]], []
    names = dict.fromkeys(k.rpartition("_")[0] for r in runs for k in r if k.endswith(_ENDS))
    by = summary.get("accuracy_by")
    again = {f"reward/{n}" for n in (by, *names_of([by]))} if by else set()
    for name in names:
        before, after = ([r.get(f"{name}{end}") for r in runs] for end in _ENDS)
        if name in again or all(value is None for value in (*before, *after)):
            continue
        pairs = zip(before, after, strict=True)
        changes = [None if b is None or a is None else a - b for b, a in pairs]
        of_reward = name.startswith("reward")
        scale, digits = (1, 3) if of_reward else (100, 1)
        cells = [_cell(values, scale, digits) for values in (before, after)]
        row = [_label(name, summary), *cells, _cell(changes, scale, digits, sign="+")]
        (rewards if of_reward else rows).append(row)
    if rows[1:] or rewards:
        print_table([*rows, *rewards], f"{title}: held out, over image orders", rules=[len(rows)])
        if len(runs) > 1:
            print(f"mean (lowest..highest) of {len(runs)} seeds")
    for best in filter(None, (run.get("best") for run in runs)):
        print(f"best {best['by']}: {best['value']:.4g} at step {best['step']:.0f}, in models/best")
    for run in runs:
        medians = run.get("median_step", {})
        if "tokens_per_second_per_gpu" in medians:
            print(_step_line(medians, run.get("peak_flops"), run["device"]))
    stages = sorted(summary["seconds_by_stage"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages if seconds >= 0.5)
    print(
        f"{summary['seconds']:.0f} s in all{': ' if spent else ''}{spent}; "
        f"peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


def _step_line(medians: dict[str, float], peak: dict[str, Any] | None, device: str) -> str:
    """Of a run's RL steps, as in `a step, median: 120.3 s, 2000 tokens/s per GPU, MFU 23.2 % of 989 TFLOP/s (datasheet)`."""
    tokens, each = medians["tokens_per_second_per_gpu"], "GPU" if "cuda" in device else "process"
    line = f"a step, median: {medians['step']:.1f} s, {tokens:.0f} tokens/s per {each}"
    if peak is None:
        return line
    mfu, tflops = 100 * medians["mfu/step"], peak["flops"] / 1e12
    return f"{line}, MFU {mfu:.1f} % of {tflops:.3g} TFLOP/s ({peak['source']})"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("perl-rl", "torch", "transformers", "accelerate")}


def _label(name: str, summary: dict[str, Any]) -> str:
    """How a row is called: accuracy by the function that says what is right, as it is written."""
    if name in ("accuracy", "greedy"):
        by = summary.get("accuracy_by") or "accuracy"
        return f"{by}, {'greedy' if name == 'greedy' else 'T = 1'}"
    if name == "consistency":
        return name
    return "reward, T = 1" if name == "reward" else name


def _cell(values: Sequence[float | None], scale: int = 100, digits: int = 1, sign: str = "") -> str:
    numbers = [scale * v for v in values if v is not None]
    if not numbers:
        return "-"
    text = f"{sum(numbers) / len(numbers):{sign}.{digits}f}"
    if len(numbers) == 1:
        return text
    return f"{text} ({min(numbers):.{digits}f}..{max(numbers):.{digits}f})"
