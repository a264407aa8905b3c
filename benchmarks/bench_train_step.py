"""One optimizer step of GRPO three ways: padded, packed, and packed with shared prompts and images.

    python benchmarks/bench_train_step.py --json out.json

All three take the same weights, completions and advantages, and run forward and backward of the same loss
(`perl.training.loss.HeadLoss`: no logits are kept, and only completion tokens reach the head), so packing alone is compared;
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
from pathlib import Path

# As perl-rl does: threads that wait must not spin where other work is running. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

import torch  # noqa: E402

from benchmarks import json_file  # noqa: E402
from benchmarks.options import Parser, count  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from benchmarks.train_step.run import (  # noqa: E402
    DTYPES,
    Report,
    Setting,
    run,
)
from benchmarks.train_step.workload import Workload  # noqa: E402
from perl.types import UserError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    try:
        setting, file = parse(arguments)
        report = run(setting)
        print(table(report))
        json_file.write(file, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"error: {error}; nothing is timed", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    """Options as a setting, and where the report goes."""
    cuda = torch.cuda.is_available()
    parser = Parser(
        description="One optimizer step padded, packed, and packed with shared prompts and images."
    )
    add = parser.add_argument
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if cuda else "cpu",
        help="default: cuda if there is one",
    )
    add("--json", type=Path, metavar="FILE", help="write the report here")
    add(
        "--model",
        help=f"{', '.join(SHAPES)} (random weights), or the folder of a Qwen-VL model; default: 3b on cuda, tiny on cpu",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of forward and backward, over float32 weights; default: bfloat16 on cuda, float32 on cpu",
    )
    add(
        "--images",
        type=count,
        nargs="+",
        default=[4, 8],
        metavar="N",
        help="images of each question; default: 4 8",
    )
    add(
        "--orders",
        type=count,
        default=2,
        metavar="N",
        help="orders of a question's images; default: 2",
    )
    add(
        "--rollouts",
        type=count,
        default=6,
        metavar="N",
        help="completions of each order; default: 6",
    )
    add(
        "--completion",
        type=count,
        default=512,
        metavar="N",
        help="tokens of a completion on average; default: 512",
    )
    add(
        "--tokens-per-image",
        type=count,
        metavar="N",
        default=330,
        help="visual tokens on average; default: 330",
    )
    add(
        "--budget",
        type=count,
        metavar="N",
        help="tokens of a micro-batch, padded or packed; default: 16384, for 7b 8192",
    )
    add(
        "--repeats",
        type=count,
        default=0,
        metavar="N",
        help="timed rounds; default: as many as fit into 12 seconds, at least three",
    )
    add("--checkpointing", action="store_true", help="recompute activations in the backward")
    add("--freeze-vision", action="store_true", help="do not train the vision tower")
    add(
        "--padded-tower",
        choices=("stock", "packed"),
        default="stock",
        help="attention in the tower of padded: transformers' SDPA, a loop over images and windows, or that of packed rows; default: stock",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights, lengths and images; default: 0",
    )
    add(
        "--quick",
        action="store_true",
        help="questions of 2 and 4 images, completions of 128 tokens",
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.images, given.completion = [2, 4], 128
    if given.device == "cuda" and not cuda:
        parser.error("--device cuda: there is no GPU that PyTorch can use")
    json_file.check(given.json)
    return _setting(given), given.json


def _setting(given: argparse.Namespace) -> Setting:
    gpu = given.device == "cuda"
    model = given.model or ("3b" if gpu else "tiny")
    possible = math.factorial(min(given.images))
    if given.orders > possible:
        raise UserError(f"--orders {given.orders}: {min(given.images)} images have only {possible}")
    if given.orders * given.rollouts < 2:
        raise UserError("--orders 1 --rollouts 1: a single completion has no advantage; raise one")
    return Setting(
        workload=Workload(
            images=tuple(given.images),
            orders=given.orders,
            rollouts=given.rollouts,
            completion=given.completion,
            tokens_per_image=given.tokens_per_image,
            seed=given.seed,
        ),
        device=given.device,
        model=model,
        dtype=given.dtype or ("bfloat16" if gpu else "float32"),
        budget=given.budget or (8192 if model == "7b" else 16384),
        checkpointing=given.checkpointing,
        freeze_vision=given.freeze_vision,
        padded_tower=given.padded_tower,
        repeats=given.repeats,
    )


def table(report: Report) -> str:
    """The report for people: each variant's figures, and how many times less than padded's they are."""
    setting, ratios = report["setting"], report["ratios"]
    lines = [
        f"{setting['model']} ({setting['parameters'] / 1e6:,.1f} M parameters, {setting['dtype']}) on "
        f"{setting['device_name']}, {setting['threads']} threads, torch {setting['torch']}, transformers "
        f"{setting['transformers']}, packed attention {setting['attention']}",
        f"{setting['sequences']} sequences: prompts of {setting['prompt_tokens']} tokens, completions of "
        f"{setting['mean_completion']:.0f} and images of {setting['mean_tokens_per_image']:.0f} on average; micro-batches of "
        f"{setting['budget']} tokens ({setting['padded_micro_batch']} padded sequences)",
        "",
        f"{'':8}{'LM tokens':>16}{'images':>14}{'TFLOP':>16}{'seconds':>16}{'peak MiB':>16}{'gradients':>11}   tower/LM/head",
    ]
    for name, found in report["variants"].items():
        cells = [
            (f"{found['lm_tokens']}", "lm_tokens", 16),
            (f"{found['images_encoded']}", "images_encoded", 14),
            (f"{found['flops'] / 1e12:.3f}", "flops", 16),
            (f"{found['seconds']:.2f}", "seconds", 16),
            (f"{found['peak_bytes'] / 2**20:.0f}", "peak_bytes", 16),
        ]
        line = "".join(f"{text} ({ratios[name][key]:.2f}x)".rjust(n) for text, key, n in cells)
        parts = "/".join(f"{100 * n / found['flops']:.0f}" for n in found["flops_by_part"].values())
        lines.append(f"{name:8}{line}{found['max_rel_grad_diff']:11.0e}   {parts} %")
    spreads = [
        f"{name} {min(found['seconds_by_round']):.2f} to {max(found['seconds_by_round']):.2f}"
        for name, found in report["variants"].items()
    ]
    rounds = len(report["variants"]["padded"]["seconds_by_round"])
    load = os.getloadavg()[0]
    if load > (os.cpu_count() or 1) + 1:
        lines += ["", f"This machine is busy (load {load:.1f}): the seconds say little."]
    lines += [
        "",
        f"In brackets: how many times less than padded. Seconds: median of {rounds} interleaved round{'s' * (rounds > 1)} ({', '.join(spreads)}). Peak: beyond the "
        "weights. Gradients: largest difference from padded's, relative to each parameter's largest.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
