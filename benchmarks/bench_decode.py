"""Completions of prompts with several images: PeRL's engine beside transformers' `generate(num_return_sequences=n)`.

    python benchmarks/bench_decode.py --json out.json

Both have equal weights in one dtype, and sample at temperature 1 from all tokens but those that stand for images: all
completions to the full length, and once more with tokens that end them, at unlike steps. A side whose log-probs are not those
of the sequence alone, through transformers' model in fp64 without a cache, ends the program before anything is timed, with
exit code 1.

Beside the seconds stand counts of a decode step that need no clock, of a model with the heads of Qwen2.5-VL-7B in bfloat16;
`counts` in decode/measure.py says what each is.

The setting is the paper's, on a CPU a fifth of it: two questions, of 4 and of 8 images, 6 completions each, prompts that are three
to six times as long as an answer. On a CPU the model is a tiny one with 28 and 4 heads.
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

from benchmarks.decode.measure import Setting, measure  # noqa: E402
from benchmarks.harness.models import SHAPES  # noqa: E402
from benchmarks.harness.options import (  # noqa: E402
    busy_line,
    check_writable,
    device_of,
    step_parser,
    step_program,
)
from benchmarks.report.tables import figure, scientific, table, times  # noqa: E402
from benchmarks.train_step.workload import Workload  # noqa: E402
from perl.types import UserError  # noqa: E402

DEFAULTS = {
    "cpu": {"model": "tiny-7b", "dtype": "float32", "tokens": 96, "tokens_per_image": 62},
    "cuda": {"model": "3b", "dtype": "bfloat16", "tokens": 512, "tokens_per_image": 330},
}
NUMBERS = {
    "images": "images of each question; default: 4 8",
    "prompts": "prompts of each question, with its images in as many orders; default: 1",
    "rollouts": "completions of each prompt; default: 6",
    "tokens": "tokens of a completion; default: 512, on cpu 96",
    "tokens-per-image": "visual tokens on average; default: 330, on cpu 62",
    "rounds": "timed rounds; default: 3",
}


def main(arguments: list[str] | None = None) -> int:
    return step_program(lambda: parse(arguments), measure, shown)


def parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    """Options as a setting, and where the report goes."""
    parser = step_parser(
        "Decoding with shared prompts beside transformers' generate.",
        quick="questions of 2 and 3 images, two completions of 32 tokens each, one round",
        models=SHAPES,
        default_models="3b on cuda, tiny-7b on cpu",
        numbers=NUMBERS,
    )
    parser.set_defaults(images=[4, 8], prompts=1, rollouts=6, rounds=3)
    given = parser.parse_args(arguments)
    given.device = device_of(given.device)
    for name, value in DEFAULTS[given.device].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.quick:
        given.images, given.rollouts, given.tokens, given.rounds = [2, 3], 2, 32, 1
    possible = math.factorial(min(given.images))
    if given.prompts > possible:
        raise UserError(
            f"--prompts {given.prompts}: {min(given.images)} images have only {possible} orders"
        )
    check_writable(given.json)
    return _setting(given), given.json


def _setting(given: argparse.Namespace) -> Setting:
    given.images, given.orders = tuple(given.images), given.prompts
    given.completion = given.tokens
    given.workload = Workload(**{f.name: getattr(given, f.name) for f in fields(Workload)})
    return Setting(**{f.name: getattr(given, f.name) for f in fields(Setting)})


def shown(report: dict[str, Any]) -> list[str]:
    setting, stock, ours = (report[name] for name in ("setting", "stock", "ours"))
    names = {
        "seconds": "seconds, all to the full length",
        "seconds_uneven": "seconds, ends at unlike steps",
        "seconds_first_token": "seconds to the first token",
        "bytes_per_cached_token_layer": "bytes a cached token and layer",
        "operators_per_layer": "operators a layer",
        "host_waits_per_step": "host waits a step",
    }
    lines = [
        [said, figure(stock[name]), figure(ours[name]), times(stock[name] / ours[name])]
        for name, said in names.items()
    ]
    off = [scientific(side["max_logprob_diff"]) for side in (stock, ours)]
    prompts = " and ".join(map(str, setting["prompt_tokens"]))
    return [
        f"{setting['model']} in {setting['dtype']} on {setting['device_name']}, {setting['threads']} threads; prompts of "
        f"{prompts} tokens, {setting['rollouts']} completions of {setting['tokens']} tokens each; torch "
        f"{setting['torch']}, transformers {setting['transformers']}.",
        table(
            ["", "transformers' generate", "**PeRL**", "over PeRL"],
            [*lines, ["log-probs differ from fp64 by", *off, ""]],
        ),
        *busy_line(),
    ]


if __name__ == "__main__":
    sys.exit(main())
