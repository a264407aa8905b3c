"""Finished runs side by side: what they learnt, and how long their RL steps took, by stage.

perl-rl train demo --run.seeds 0 --run.dir runs/inprocess
perl-rl train demo --run.seeds 0 --run.dir runs/vllm --rollout.engine vllm --rollout.url http://127.0.0.1:8000
python -m benchmarks.engines runs/inprocess/seed-0 runs/vllm/seed-0       # a table in Markdown
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

Row = Mapping[str, Any]

STAGES = ("rollout", "reward", "logprobs", "update")


def figures(rows: Sequence[Row], parts: int = 4) -> dict[str, str]:
    """What the table says of a run, by the row's title; RL steps in so many parts."""
    steps = [row for row in rows if row["stage"] == "rl"]
    scores = {row["at"]: row for row in rows if row["stage"] == "evaluate"}
    out = {
        f"accuracy {at} RL, sampled and greedy": f"{row['accuracy']:.3f}, {row['greedy']:.3f}"
        for at, row in scores.items()
    }
    size = max(1, len(steps) // parts)
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        title = f"reward, steps {part[0]['step']} to {part[-1]['step']}"
        out[title] = f"{mean(row['reward/mean'] for row in part):.3f}"
    for stage in STAGES:
        seconds = median(row.get(f"time/{stage}", 0.0) for row in steps)
        out[f"seconds of a step, median: {stage}"] = f"{seconds:.2f}"
    out["seconds of a step, median: all"] = f"{median(row['time/step'] for row in steps):.2f}"
    out["seconds of all RL steps"] = f"{sum(row['time/step'] for row in steps):.0f}"
    for name, of in (("mean", mean), ("max", max)):
        found = [row[key] for row in steps if (key := f"rollout/mismatch_{name}") in row]
        out[f"log-probs of engine and trainer apart, {name}"] = f"{of(found):.1e}"
    return out


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.engines")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    runs = parser.parse_args().runs
    found = [
        figures([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        for run in runs
    ]
    print("|", *(f"| {run}" for run in runs), "|")
    print("|---" * (len(runs) + 1) + "|")
    for title in found[0]:
        print(f"| {title} |", " | ".join(each.get(title, "") for each in found), "|")


if __name__ == "__main__":
    main()
