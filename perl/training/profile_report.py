"""What a profile says: the figures for profile.json, the tables, and what follows from them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from perl.config import Config
from perl.report.metrics import mean, number
from perl.report.tables import print_table
from perl.timing import OTHER, PREFIX, stage_of
from perl.training.summary import versions

Step = dict[str, Any]
"""A lap of a `StageClock`, with the step's line of `metrics`."""


def figures(timed: Sequence[Step], traced: Sequence[Step], config: Config) -> dict[str, Any]:
    """What one or more `timed` steps say, means over them, with the steps `traced` under the profiler."""
    stages = dict.fromkeys(name for step in timed for name in step["stages"])
    names = [k for k, value in timed[0]["metrics"].items() if number(value) is not None]
    metrics = {name: mean(step["metrics"].get(name) for step in timed) for name in names}
    seconds = mean(step["seconds"] for step in timed)
    # A cold start counts the tokens that are trained on.
    trained = metrics.get("tokens", 0.0) / seconds
    return {
        "stage": config.stages[0].name,
        "seconds_per_step": seconds,
        "stages": {
            name: {
                "seconds": mean(step["stages"].get(name, 0.0) for step in timed),
                "calls": mean(step["calls"].get(name, 0) for step in timed),
            }
            for name in stages
        },
        "metrics": metrics,
        "tokens_per_second": metrics.get("throughput/tokens_per_second", trained),
        "steps": timed,
        "traced_steps": traced,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions(),
    }


def add_device(out: dict[str, Any], events: Iterable[Any], cut: Iterable[str]) -> None:
    """What the GPU did in the traced steps: by stage, and for how much of the time nothing.

    Work belongs to the stage in which it was launched, whenever it ran. Stages of a part that was not traced to its end
    have None.

    Args:
        out: `figures`; `device_seconds` and `launches` are added to each stage, and `device_idle`.
        events: torch's `FunctionEvent`s, times in microseconds.
        cut: the parts that were not traced to their end.
    """
    events, steps = sorted(events, key=lambda e: e.time_range.start), len(out["traced_steps"])
    seconds: defaultdict[str, float] = defaultdict(float)
    launches: defaultdict[str, int] = defaultdict(int)
    open_ranges: list[Any] = []
    busy, reached = 0.0, 0.0
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if event.device_type.name != "CPU":
            # Not a name that somebody gave to a time, but an operator, a kernel or a copy.
            if not event.key.startswith(PREFIX) and not event.is_user_annotation:
                busy += max(0.0, end - max(start, reached))
                reached = max(reached, end)
            continue
        open_ranges = [r for r in open_ranges if r.time_range.end > start]
        if event.name.startswith(PREFIX):
            open_ranges.append(event)
        kernels = [k for k in event.kernels if not k.name.startswith(PREFIX)]
        stage = stage_of([r.name.removeprefix(PREFIX) for r in open_ranges])
        seconds[stage] += sum(k.duration for k in kernels) / 1e6
        launches[stage] += len(kernels)
    for name, stage in out["stages"].items():
        whole = name.partition("/")[0] not in cut
        stage["device_seconds"] = seconds[name] / steps if whole else None
        stage["launches"] = launches[name] / steps if whole else None
    if not cut:
        out["device_idle"] = 1 - busy / 1e6 / sum(step["seconds"] for step in out["traced_steps"])


def hints(out: dict[str, Any], config: Config) -> Iterator[str]:
    """What follows from the figures."""
    metrics, total = out["metrics"], out["seconds_per_step"]

    def share(*endings: str) -> float:
        taken = (s["seconds"] for n, s in out["stages"].items() if n.rpartition("/")[2] in endings)
        return sum(taken) / total

    parts = (s["seconds"] for n, s in out["stages"].items() if n.partition("/")[0] == "rollout")
    rollout, sampling = sum(parts) / total, config.rollout
    if rollout > 0.4:
        sampled = metrics["tokens/completion"] / metrics["length/mean"]
        kept = metrics["tokens/prompt"] / sampling.per_order + sampled * sampling.max_new_tokens
        if kept > sampling.kv_cache_tokens:
            yield (
                f"rollout {rollout:.0%}: {sampled:.0f} completions a step and their prompts may have {kept:.0f} tokens, of "
                f"which rollout.kv_cache_tokens = {sampling.kv_cache_tokens} are kept at a time; a larger one takes fewer "
                "decode steps and more memory"
            )
    tower, backward = share("vision", "vision.backward"), share("vision.backward")
    if tower > 0.2 and backward:
        yield (
            f"vision {tower:.0%}: model.freeze_vision = true would leave out its backward ({backward:.0%}), and the "
            "features made in the rollout would serve the update"
        )
    if (cut := metrics.get("length/truncated", 0)) > 0.5:
        yield (
            f"{cut:.0%} of the completions run to rollout.max_new_tokens, as those of an untrained model do; "
            "model.path of a trained one gives the lengths of training"
        )
    if equal := metrics.get("groups/zero_variance"):
        yield (
            f"{equal:.1f} of {metrics['groups/seen']:.1f} groups a step have equal rewards; they were kept here, so that "
            "every step trains on all that it rolls out. Training drops them with filter.zero_variance"
        )


def print_report(out: dict[str, Any], recipe: str) -> None:
    """The tables and the hints, on standard output."""
    where = f"{out['device']}, {out['threads']} threads, torch {out['versions']['torch']}"
    rows = list(_stage_rows(out))
    print_table(rows, f"{recipe}, stage {out['stage']}: a step on {where}", rules=[len(rows) - 1])
    seconds = ", ".join(f"{step['seconds']:.2f}" for step in out["steps"])
    peak = f"{out['peak_rss_bytes'] / 2**30:.2f} GiB of the process"
    if "peak_device_bytes" in out:
        peak += f", {out['peak_device_bytes'] / 2**30:.2f} GiB of the device"
    print(f"timed: {seconds} s; {out['tokens_per_second']:.0f} tokens/s; peak memory {peak}")
    if out["processes"] > 1:
        print(f"times and memory of the first of {out['processes']} processes; tokens of all")
    for step in out["traced_steps"]:
        parts = ", ".join(out["traced_in_part"])
        only = f"; of {parts} only the first passes (--forwards)" if parts else ""
        print(f"traced: {step['seconds']:.2f} s under the profiler{only}")
    if "device_idle" in out:
        print(f"the device is idle for {out['device_idle']:.0%} of the traced time")
    for hint in out["hints"]:
        print(f"- {hint}")


def _stage_rows(out: dict[str, Any]) -> Iterator[list[str]]:
    """Parts of a step as they came, each with the stages in it, `other` last."""
    stages, total = out["stages"], out["seconds_per_step"]
    device = any("launches" in stage for stage in stages.values())

    def row(label: str, names: Sequence[str], calls: float) -> list[str]:
        seconds = sum(stages[n]["seconds"] for n in names)
        cells = [label, f"{seconds:.3f}", f"{seconds / total:.1%}", f"{calls:.0f}" if calls else ""]
        for key, form in (("device_seconds", ".3f"), ("launches", ".0f")) if device else ():
            values = [stages[n][key] for n in names]
            cells.append("-" if None in values else format(sum(values), form))
        return cells

    yield ["stage", "s/step", "share", "calls", *(["device s", "launches"] if device else [])]
    parts = dict.fromkeys(name.partition("/")[0] for name in stages)
    for part in sorted(parts, key=lambda name: name == OTHER):
        inside = [name for name in stages if name.startswith(f"{part}/")]
        yield row(part, [part, *inside], stages[part]["calls"])
        for name in inside:
            yield row(f"  {name.removeprefix(f'{part}/')}", [name], stages[name]["calls"])
        if inside:
            yield row(f"  {OTHER}", [part], 0)
    yield row("step", list(stages), 0)
