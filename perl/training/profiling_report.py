"""What a profile says: the figures for profile.json, the table, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from perl.config import Config
from perl.report.metrics import mean
from perl.training.profiling_clock import OTHER
from perl.training.profiling_session import Profile, Step

_NAMES = {
    "logprobs": "log-probs",
    "cold_start": "cold start",
    "vision": "vision, forward",
    "vision.backward": "vision, backward",
    "language_model": "language model, forward",
    "language_model.backward": "language model, backward",
    "loss": "loss, forward",
    "loss.backward": "loss, backward",
    "prompts": "language model, prompts",
    "tokens": "language model, tokens",
}
_WORK = {
    "completions": "completion{s}",
    "tokens/prompt": "prompt token{s}",
    "tokens/completion": "completion token{s}",
    "tokens": "token{s} trained on",
    "packing/rows": "row{s}",
    "packing/tokens": "token{s} in rows",
    "throughput/images_encoded": "image{s} through the tower",
    "images/shown": "image{s} shown",
}
"""What a step worked on, by its name in the metrics."""
_DROPPED = {
    "equal_rewards": "with equal rewards (filter.zero_variance)",
    "outside_band": "outside of filter.min_accuracy to filter.max_accuracy",
}
"""Why training would have dropped a group."""

_LEADING = 10
"""Operators that are listed."""


def figures(found: Profile, config: Config) -> dict[str, Any]:
    """All figures, for profile.json; seconds and counts are means over the timed steps.

    Args:
        found: of this process.
        config: what was run.
    """
    steps, cuda = found.timed, found.peak_device_bytes > 0
    seconds = mean(s.times.seconds for s in steps)
    work = {name: mean(_work(s, found.processes).get(name) for s in steps) for name in _WORK}
    out = {
        "seconds_per_step": seconds,
        "stages": _stages(found, cuda),
        "work_per_step": {k: v for k, v in work.items() if not math.isnan(v)},
        "tokens_per_second": _tokens(work) / seconds,
        "groups_without_signal": mean(s.row.get("groups/zero_variance") for s in steps),
        "groups": mean(s.row.get("groups/seen") for s in steps),
        "groups_training_drops": {k: mean(s.dropped.get(k, 0) for s in steps) for k in _DROPPED},
        "rollout_batches": mean(s.row.get("groups/tries") for s in steps),
        "steps": [_step(s) for s in steps],
        "traced_steps": [_step(s) for s in found.traced],
        "completions_cut": mean(s.row.get("length/truncated") for s in steps),
        "operators": _operators(found, cuda),
        "traced_seconds": found.trace.seconds,
        "traced_in_part": sorted(found.trace.cut),
        "traces": [path.name for path in found.trace.files],
        "ranges_without_end": sorted(found.unended),
        "peak_rss_bytes": found.peak_rss_bytes,
    }
    if cuda:
        out["peak_device_bytes"] = found.peak_device_bytes
    if cuda and found.traced:
        out["device_idle"] = found.trace.idle
    return out | {"hints": list(_hints(out, config, found.shares_images))}


def _stages(found: Profile, cuda: bool) -> dict[str, dict[str, Any]]:
    """By stage; device figures are means over the traced steps, None where a part was not traced to its end."""
    steps, traced = found.timed, found.traced
    times = [s.times.by_stage() for s in steps]
    device = found.trace.by_stage([i for s in traced for i in s.times.intervals])
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*(n for t in times for n in t), *device]):
        out[name] = {
            "seconds": mean(t.get(name, 0.0) for t in times),
            "calls": mean(s.times.calls.get(name, 0) for s in steps),
        }
        if cuda and traced:
            whole = name.partition("/")[0] not in found.trace.cut
            work = device.get(name)
            out[name] |= {
                "device_seconds": (work.seconds if work else 0.0) / len(traced) if whole else None,
                "launches": (work.launches if work else 0) / len(traced) if whole else None,
            }
    return out


def _work(step: Step, processes: int) -> dict[str, Any]:
    """What one process worked on."""
    row = step.row
    if "length/mean" not in row:
        return row | {"tokens": row["tokens"] / processes}  # A cold start counts those of all.
    own = {k: v for k, v in row.items() if k != "tokens"}  # The loss counts the completions' again.
    return own | {"completions": row["tokens/completion"] / row["length/mean"]}


def _tokens(work: dict[str, float]) -> float:
    """Tokens of prompts and completions, as the metrics count them; of a cold start those trained on."""
    counted = [work[k] for k in ("tokens/prompt", "tokens/completion", "tokens")]
    return sum(n for n in counted if not math.isnan(n))


def _step(step: Step) -> dict[str, Any]:
    return {
        "seconds": step.times.seconds,
        "stages": step.times.by_stage(),
        "calls": step.times.calls,
        "metrics": step.row,
    }


def _operators(found: Profile, cuda: bool) -> list[dict[str, Any]]:
    """Those with the most time of their own: on the device where there is one."""
    by = "device_seconds" if cuda else "cpu_seconds"
    rows = [{"name": name, **asdict(o)} for name, o in found.trace.operators.items()]
    steps = max(1, len(found.traced))
    for row in rows:
        row |= {k: row[k] / steps for k in ("calls", "cpu_seconds", "device_seconds")}
    return sorted(rows, key=lambda row: -row[by])[:_LEADING]


def _hints(out: dict[str, Any], config: Config, shares_images: bool) -> Iterator[str]:
    """What follows from the figures."""
    total, stages = out["seconds_per_step"], out["stages"]

    def share(*names: str) -> float:
        return sum(stages[n]["seconds"] for n in names if n in stages) / total

    rollout = share(*(n for n in stages if n.partition("/")[0] == "rollout"))
    tower = share(*(n for n in stages if n.rpartition("/")[2] in ("vision", "vision.backward")))
    backward = share(*(n for n in stages if n.endswith("/vision.backward")))
    sync = share(*(n for n in stages if n.rpartition("/")[2] == "sync"))
    sampled = out["work_per_step"].get("completions", 0)
    if rollout > 0.4 and sampled > config.rollout.batch_size:
        yield (
            f"rollout {rollout:.0%}: {sampled:.0f} completions a step are sampled {config.rollout.batch_size} at a "
            "time; a larger rollout.batch_size takes fewer passes and more memory"
        )
    if tower > 0.2 and backward:
        yield (
            f"vision {tower:.0%}: model.freeze_vision = true would leave out its backward ({backward:.0%})"
            + (", and the features made in the rollout would serve the update" * shares_images)
        )
    if sync > 0.2:
        yield f"sync {sync:.0%}: the host waits for the device or for the other processes"
    if out.get("device_idle", 0) > 0.3 and out["traced_seconds"]:
        yield (
            f"the device idles {out['device_idle']:.0%} of the traced time: there the host does not keep up, "
            "which the profiler makes worse"
        )
    if out["completions_cut"] > 0.5:
        yield (
            f"{out['completions_cut']:.0%} of the completions run to rollout.max_new_tokens, as those of an untrained "
            "model do; model.path of a trained one gives the lengths of training"
        )
    if out["rollout_batches"] > 1:
        yield (
            f"a step rolls out {_number(out['rollout_batches'])} times on average, as examples over the prompt budget "
            "and groups without two rewards leave too few in one batch"
        )
    dropped = out["groups_training_drops"]
    if sum(dropped.values()):
        reasons = " and ".join(f"{_number(n)} {_DROPPED[k]}" for k, n in dropped.items() if n)
        again = (
            f"and rolls out up to {config.filter.max_tries} times a step for others"
            if config.filter.max_tries > 1
            else "and takes its step with fewer"
        )
        yield (
            f"of {_number(out['groups'])} groups a step, training would drop {reasons}; they were kept here, so that "
            f"every step trains on all that it rolls out. Training goes without them {again}"
        )
    if out["ranges_without_end"]:
        yield (
            f"the end of {', '.join(out['ranges_without_end'])} was not seen: its seconds are more than it took"
        )


def _number(value: float) -> str:
    """With a decimal where it is no whole number."""
    return f"{value:,.1f}".removesuffix(".0")


def print_report(out: dict[str, Any], title: str) -> None:
    """The tables, on standard output."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(out, title))
    for line in _summary(out):
        console.print(line, markup=False)
    if out["operators"]:
        console.print(_operator_table(out))
    for hint in out["hints"]:
        console.print(f"- {hint}", markup=False)


def _table(out: dict[str, Any], title: str) -> Any:
    device = any("device_seconds" in figures for figures in out["stages"].values())
    table = _new_table(
        title, "stage", "s/step", "share", "calls", *(("device s", "launches") * device)
    )
    total = out["seconds_per_step"]
    for name, rows in _tree(out["stages"]):
        parts = [row for _, row in rows]
        if len(rows) > 1 or rows[0][0] != name:
            # A row for the whole, then its parts.
            own = next((row["calls"] for part, row in rows if part == name), 0)
            table.add_row(
                _NAMES.get(name, name), *_cells(_sum(parts) | {"calls": own}, total, device)
            )
            for part, row in rows:
                row, label = (
                    (row | {"calls": 0}, OTHER) if part == name else (row, _NAMES.get(part, part))
                )
                table.add_row(f"  {label}", *_cells(row, total, device))
        else:
            table.add_row(_NAMES.get(name, name), *_cells(parts[0], total, device))
    table.add_section()
    whole = _sum(list(out["stages"].values()))
    table.add_row("step", *_cells(whole, total, device))
    return table


def _tree(stages: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Parts of a step in their sequence, each with the stages in it, `other` last."""
    order = dict.fromkeys(name.partition("/")[0] for name in stages)
    out = []
    for part in sorted(order, key=lambda p: (p == OTHER, list(order).index(p))):
        inside = [n for n in stages if n.partition("/")[0] == part]
        inside.sort(key=lambda n: (n == part, _rank(n)))
        out.append((part, [(n.rpartition("/")[2], stages[n]) for n in inside]))
    return out


def _rank(stage: str) -> int:
    names = list(_NAMES)
    last = stage.rpartition("/")[2]
    return names.index(last) if last in names else len(names)


def _sum(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"seconds": sum(r["seconds"] for r in rows), "calls": 0}
    for key in ("device_seconds", "launches"):
        known = [r.get(key) for r in rows]
        out[key] = None if None in known else sum(k for k in known if k is not None)
    return out


def _cells(row: dict[str, Any], total: float, device: bool) -> Iterator[str]:
    yield f"{row['seconds']:.3f}"
    yield f"{row['seconds'] / total:.1%}"
    yield f"{row['calls']:.0f}" if row["calls"] else ""
    if device:
        yield "-" if row["device_seconds"] is None else f"{row['device_seconds']:.3f}"
        yield "-" if row["launches"] is None else f"{row['launches']:.0f}"


def _summary(out: dict[str, Any]) -> Iterator[str]:
    seconds = [s["seconds"] for s in out["steps"]]
    lasted = " to ".join(dict.fromkeys(f"{s:.2f}" for s in (min(seconds), max(seconds))))
    yield (
        f"timed: {len(seconds)} of {lasted} s; {out['tokens_per_second']:.0f} tokens/s; "
        f"peak memory {_memory(out)}"
    )
    work = (
        f"{value:,.0f} {_WORK[name].format(s='' if round(value) == 1 else 's')}"
        for name, value in out["work_per_step"].items()
    )
    yield f"a step: {', '.join(work)}"
    if not out["traced_steps"]:
        return
    count, part = len(out["traced_steps"]), out["traced_in_part"]
    if part:
        yield f"traced: {count} more; of {', '.join(part)} only the first passes (--forwards)"
    else:
        longer = mean(s["seconds"] for s in out["traced_steps"])
        yield f"traced: {count} more, {longer:.2f} s with what the profiler takes"
    if "device_idle" in out:
        yield f"in the traced time the device is idle for {out['device_idle']:.0%}"


def _memory(out: dict[str, Any]) -> str:
    host = f"{out['peak_rss_bytes'] / 2**30:.2f} GiB of the process"
    if "peak_device_bytes" not in out:
        return host
    return f"{out['peak_device_bytes'] / 2**30:.2f} GiB of the device, {host}"


def _operator_table(out: dict[str, Any]) -> Any:
    device = "device_idle" in out
    heads = ("calls/step", "device s", "host s") if device else ("calls/step", "s/step")
    table = _new_table("operators by the time of their own, traced", "operator", *heads)
    for row in out["operators"]:
        times = (row["device_seconds"], row["cpu_seconds"]) if device else (row["cpu_seconds"],)
        table.add_row(row["name"], f"{row['calls']:.0f}", *(f"{t:.3f}" for t in times))
    return table


def _new_table(title: str, first: str, *others: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
