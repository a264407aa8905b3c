"""One optimizer step of GRPO three ways: padded, packed, and packed with shared prompts and images.

    python benchmarks/bench_train_step.py --json out.json

All three take the same weights, completions and advantages, and run forward and backward of the same loss
(`perl.model.head.HeadLoss`: no logits are kept, and only completion tokens reach the head), so packing alone is compared;
`train_step/variants.py` says what each does. A variant whose log-probs or gradients are not those of `padded` ends the
program before anything is timed, with exit code 1.

The setting is the paper's: two questions, of 4 and of 8 images of different sizes, 2 orders x 6 rollouts each, answers
of 512 tokens and images of 330 visual tokens on average. On a GPU a model of the size of Qwen2.5-VL-3B in bfloat16; on a CPU
a tiny one in float32, whose tower and language model have about the same shares in a step, so that the program takes half a
minute.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

# As perl-rl does: threads that wait must not spin where other work is running. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

from benchmarks.harness.models import SHAPES  # noqa: E402
from benchmarks.harness.options import (  # noqa: E402
    busy_line,
    check_writable,
    device_of,
    step_parser,
    step_program,
)
from benchmarks.report.results_file import Steps, TrainStep  # noqa: E402
from benchmarks.report.steps import steps_markdown  # noqa: E402
from benchmarks.train_step.measure import Setting, measure  # noqa: E402
from benchmarks.train_step.workload import Workload  # noqa: E402
from perl.types import UserError  # noqa: E402

NUMBERS = {
    "images": (4, "images of each question; default: 4 8"),
    "orders": (2, "orders of a question's images; default: 2"),
    "rollouts": (6, "completions of each order; default: 6"),
    "completion": (512, "tokens of a completion on average; default: 512"),
    "tokens-per-image": (330, "visual tokens on average; default: 330"),
    "budget": (None, "tokens of a micro-batch, padded or packed; default: 16384, for 7b 8192"),
    "repeats": (0, "timed rounds; default: as many as fit into 12 seconds, at least three"),
}


def main(arguments: list[str] | None = None) -> int:
    return step_program(lambda: parse(arguments), measure, table)


def table(report: dict[str, Any]) -> list[str]:
    return [*steps_markdown(Steps(train_step=TrainStep(**report))), *busy_line()]


def parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    """Options as a setting, and where the report goes."""
    parser = step_parser(
        "One optimizer step padded, packed, and packed with shared prompts and images.",
        quick="questions of 2 and 4 images, completions of 128 tokens",
        models=SHAPES,
        default_models="3b on cuda, tiny on cpu",
        numbers={name: said for name, (_, said) in NUMBERS.items()},
    )
    defaults = {name.replace("-", "_"): value for name, (value, _) in NUMBERS.items()}
    parser.set_defaults(**{**defaults, "images": [4, 8]})
    add = parser.add_argument
    add("--checkpointing", action="store_true", help="recompute activations in the backward")
    add("--freeze-vision", action="store_true", help="do not train the vision tower")
    add(
        "--padded-tower",
        choices=("stock", "packed"),
        default="stock",
        help="attention in the tower of padded: transformers' SDPA, a loop over images and windows, or that of packed rows; default: stock",
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.images, given.completion = [2, 4], 128
    given.device = device_of(given.device)
    check_writable(given.json)
    return _setting(given), given.json


def _setting(given: argparse.Namespace) -> Setting:
    gpu = given.device == "cuda"
    model = given.model or ("3b" if gpu else "tiny")
    possible = math.factorial(min(given.images))
    if given.orders > possible:
        raise UserError(f"--orders {given.orders}: {min(given.images)} images have only {possible}")
    if given.orders * given.rollouts < 2:
        raise UserError("--orders 1 --rollouts 1: a single completion has no advantage; raise one")
    given.model, given.dtype = model, given.dtype or ("bfloat16" if gpu else "float32")
    given.budget = given.budget or (8192 if model == "7b" else 16384)
    given.images = tuple(given.images)
    given.workload = Workload(**{f.name: getattr(given, f.name) for f in fields(Workload)})
    return Setting(**{f.name: getattr(given, f.name) for f in fields(Setting)})


if __name__ == "__main__":
    sys.exit(main())
