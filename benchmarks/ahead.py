"""Steps whose rollouts are sampled during the update before them, against those that wait: seconds, age and accuracy.

    python -m benchmarks.ahead FOLDER [--delay 1.0] [--steps 20] [--seeds 0 1 2]

The demo's RL from one cold start, on the server of the tests, which answers each request a while later than it could: what is
measured is how much of that wait an update hides. FOLDER keeps the cold start and the runs. Runs take turns.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from perl.config import Config
from perl.files import RunFolder
from perl.recipe import load_recipe
from perl.report.progress import Display
from perl.training.train import train
from tests.vllm_server import vllm_server


def run(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics of a run; one that is there is not run again."""
    made = RunFolder(folder)
    if not made.summary.exists():
        made.create(overwrite=True)
        train(config, made, Display(enabled=False))
        made.settle()
    return [json.loads(line) for line in made.metrics.read_text().splitlines()]


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    steps = [row for row in rows if row["stage"] == "rl"][1:]
    last = [row for row in rows if row["stage"] == "evaluate"][-1]
    return {
        "seconds of a step": median(row["time/step"] for row in steps),
        "of them waiting for rollouts": median(row["time/rollout"] for row in steps),
        "age in steps": median(row["rollout/age"] for row in steps),
        "accuracy, sampled": last["accuracy"],
        "accuracy, greedy": last["greedy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    demo = load_recipe("demo")
    demo = replace(demo, run=replace(demo.run, seeds=(), seed=0, trackers=()))
    start = options.folder.resolve() / "start"
    begun = replace(
        demo,
        run=replace(demo.run, dir=str(start)),
        train=replace(demo.train, steps=0),
        eval=replace(demo.eval, examples=0),
    )
    run(begun, start)
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for seed in options.seeds:
        for ahead in found:
            folder = options.folder.resolve() / f"ahead-{ahead}-{seed}"
            with vllm_server(start / "models" / "final") as server:
                server.delay = options.delay
                config = replace(
                    demo,
                    run=replace(demo.run, dir=str(folder), seed=seed),
                    model=replace(demo.model, path=str(start / "models" / "final")),
                    cold_start=replace(demo.cold_start, steps=0),
                    train=replace(demo.train, steps=options.steps, examples_per_step=6),
                    eval=replace(demo.eval, examples=30),
                    rollout=replace(demo.rollout, engine="vllm", url=(server.url,), ahead=ahead),
                )
                found[ahead].append(figures(run(config, folder)))
            print(f"ahead = {ahead}, seed {seed}: {found[ahead][-1]}", flush=True)
    print("\n| | ahead = 0 | ahead = 1 |\n|---|---|---|")
    for name in found[0][0]:
        cells = [[f"{run[name]:.3g}" for run in found[ahead]] for ahead in found]
        print(f"| {name} | {' | '.join(', '.join(each) for each in cells)} |")


if __name__ == "__main__":
    main()
