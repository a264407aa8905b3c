"""Does permuting image orders help? Plain GRPO against one, two and three more orders, at equal rollouts.

    python docs/experiments/permutation.py --runs runs/permutation --jobs 2

A tiny Qwen2.5-VL learns the bundled task from imperfect demonstrations (240 steps, 40 % wrong
conclusions), once from data whose right picture stands in any slot ("fair") and once from data where
it stands in the first one 60 % of the time ("biased"). From each start RL goes on over data of the
same kind, with 12 rollouts per question spread over 1, 2, 3 or 4 image orders, with groups of equal
rewards kept or dropped. All arms see the same questions and sample equally often. What comes out is
measured on held-out questions in all orders of their images.

Runs that are there are not repeated: a run that was interrupted goes on when the command is given
again. `permutation_report.py` draws the pictures and writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

ROLLOUTS = 12
"""Per question, as in the paper."""
ORDERS = (1, 2, 3, 4)
STARTS = {"fair": 0.0, "biased": 0.6}
"""Share of right pictures in the first slot of the training questions."""
EXAMPLES = 100
"""Held-out questions."""


@dataclass(frozen=True)
class Arm:
    """One run: a start, a number of orders (the paper's n_s + 1), a filter and a seed."""

    start: str
    orders: int
    drop: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.start}-orders{self.orders}-{'drop' if self.drop else 'keep'}-seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/permutation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("runs/permutation/results.json"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seeds)
    # Seed by seed, so that whatever is finished is a whole experiment with fewer seeds.
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in seeds:
            list(pool.map(lambda start, s=seed: cold_start(args.runs, start, s), STARTS))
            arms = [Arm(s, o, d, seed) for s, o, d in product(STARTS, ORDERS, (False, True))]
            list(pool.map(lambda arm: reinforce(args.runs, arm, args.steps), arms))
            write_results(args.runs, args.output)
            print(f"seed {seed} done: {args.output}", flush=True)


def cold_start(runs: Path, start: str, seed: int) -> None:
    """Supervised training on imperfect demonstrations."""
    folder = runs / f"{start}-start-seed{seed}"
    options = ["--train.steps", "0", "--cold-start.steps", "240"]
    train(folder, seed, STARTS[start], options)
    measure(folder, folder / "models" / "cold_start")


def reinforce(runs: Path, arm: Arm, steps: int) -> None:
    """RL from the start of the same seed."""
    folder = runs / arm.name
    options = [
        *("--model.path", str(runs / f"{arm.start}-start-seed{arm.seed}" / "models/cold_start")),
        *("--cold-start.steps", "0", "--train.steps", str(steps)),
        *("--permutation.orders", str(arm.orders)),
        *("--rollout.per-order", str(ROLLOUTS // arm.orders)),
        # One try: dropped groups are not refilled, so that all arms sample equally often.
        *("--filter.max-tries", "1"),
        "--filter.zero-variance" if arm.drop else "--filter.no-zero-variance",
    ]
    train(folder, arm.seed, STARTS[arm.start], options)
    measure(folder, folder / "models" / "final")


def train(folder: Path, seed: int, first_slot: float, options: list[str]) -> None:
    """`perl-rl train demo` with changes, or its rest if it was interrupted."""
    if (folder / "summary.json").exists():
        return
    common = [
        *("--run.dir", str(folder), "--run.seeds", "--run.seed", str(seed), "--run.trackers"),
        *("--eval.examples", "0", "--data.first-slot", str(first_slot), "--resume"),
    ]
    call(["-m", "perl", "train", "demo", *common, *options])


def measure(folder: Path, model: Path) -> None:
    """Measure a model in a process of its own."""
    if not (folder / "measured.json").exists():
        call([__file__, "--measure", str(model), str(folder / "measured.json")])


def call(arguments: list[str]) -> None:
    """Run Python in a process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def measured(model: Path) -> dict[str, float]:
    """How right, how consistent and how biased a model's answers are, over all orders of the images.

    Every picture stands in every slot equally often, so an unbiased model names the first slot as
    often as it is right there: `first_slot` is the share of answers that name it, `first_slot_right`
    the share of orders in which it is right. All numbers are 0 to 1, of completions sampled at
    temperature 1 but for `greedy` and `greedy_first_slot`.
    """
    import torch

    from perl.config import EVAL_SEED, DataConfig, ModelConfig
    from perl.data.dataset import load_examples
    from perl.evaluation.agreement import Reading, agreement, chosen_picture
    from perl.model.loading import load_policy, load_processor
    from perl.permutation import all_orders, permute
    from perl.report.metrics import mean
    from perl.rewards.reading import equal, extract_answer
    from perl.rollout.engine import SamplingParams
    from perl.rollout.engines import in_process
    from perl.types import Rollout

    config = ModelConfig(path=str(model))
    policy = load_policy(str(model), config, torch.device("cpu"))
    processor = load_processor(str(model), config)
    engine = in_process(policy, processor, 256, nullcontext)
    rows: defaultdict[str, list[float]] = defaultdict(list)
    data = load_examples("bundled:digits", DataConfig(), "test", EVAL_SEED, EXAMPLES)
    for index in range(EXAMPLES):
        example = data[index]
        variants = [permute(example, order) for order in all_orders(example, 24, EVAL_SEED)]
        prompts = [processor.encode(v) for v in variants]
        picks = []
        for name, params in (
            ("", SamplingParams(2, 1.0, 40)),
            ("greedy_", SamplingParams(1, 0.0, 40)),
        ):
            completions = engine.generate(prompts, params, EVAL_SEED + index)
            for variant, prompt, mine in zip(variants, prompts, completions, strict=True):
                texts = [processor.decode(c.token_ids) for c in mine]
                answers = [extract_answer(text) for text in texts]
                rows[f"{name}accuracy"].append(fmean(equal(a, variant.answer) for a in answers))
                rows[f"{name}first_slot"].append(fmean(equal(a, "A") for a in answers))
                if not name:
                    rows["first_slot_right"].append(variant.answer == "A")
                    picks.append(
                        [
                            chosen_picture(
                                Rollout(variant, prompt, c.token_ids, c.logprobs, text, c.finished),
                                Reading(),
                            )
                            for c, text in zip(mine, texts, strict=True)
                        ]
                    )
        rows["consistency"].append(agreement(picks))
    return {name: mean(values) for name, values in rows.items()}


def write_results(runs: Path, output: Path) -> None:
    """Collect what is measured so far."""
    from perl.files import write_json

    rows: list[dict[str, Any]] = []
    for path in sorted(runs.glob("*/measured.json")):
        numbers = json.loads(path.read_text())
        steps = [json.loads(line) for line in (path.parent / "metrics.jsonl").open()]
        rl = [row for row in steps if row["stage"] == "rl"]
        start, what, *_ = path.parent.name.split("-")
        seed = int(path.parent.name.rpartition("seed")[2])
        row: dict[str, Any] = {"start": start, "seed": seed, **numbers}
        if what != "start":
            arm = Arm(start, int(what[6:]), "-drop-" in path.parent.name, seed)
            row |= asdict(arm)
            row["signal"] = fmean(r["groups/kept"] / r["groups/seen"] for r in rl)
            row["rollouts"] = sum(r["groups/seen"] for r in rl) * ROLLOUTS
            row["seconds"] = json.loads((path.parent / "summary.json").read_text())["seconds"]
        rows.append(row)
    write_json(output, {"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[3]).write_text(json.dumps(measured(Path(sys.argv[2]))))
    else:
        main()
