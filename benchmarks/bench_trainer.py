"""A whole optimizer step of PeRL's trainer beside one of TRL's GRPOTrainer.

    python benchmarks/bench_trainer.py --json out.json

Both start from the same weights and take the same questions over several images, the same reward, loss, optimizer and
number of completions of the same length; `DIFFERENCES` in `trainer/measure.py` says where their work differs. Each runs its
own code: PeRL's reinforcement stage, and `GRPOTrainer.train`. Before anything is timed, one step of TRL's is repeated by
PeRL on the completions that TRL sampled; if loss or gradients differ, the program ends with exit code 1.

PeRL rolls a question out in several orders of its images. TRL has no such thing: there each ordered prompt is a
prompt of its own, and the advantages of both are over its completions. `--orders 1` leaves that out.

Where TRL cannot be imported, the report says so and the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from pathlib import Path
from typing import Any

# As perl-rl does: threads that wait must not spin where other work is running. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

import torch  # noqa: E402

from benchmarks.harness.options import (  # noqa: E402
    busy_line,
    check_writable,
    step_parser,
    step_program,
)
from benchmarks.report.results_file import Steps, Trainer  # noqa: E402
from benchmarks.report.steps import steps_markdown  # noqa: E402
from benchmarks.trainer.measure import measure  # noqa: E402
from benchmarks.trainer.start import MODELS, Setting  # noqa: E402
from perl.report.progress import Display  # noqa: E402
from perl.types import UserError  # noqa: E402

_PAPER = {"images": [4, 8], "orders": 2, "per_order": 6}
_TINY = {"model": "tiny", "completion": 64, "tokens_per_image": 64, "steps": 3, "rounds": 3}
_SMALL = {"model": "0.6b", "completion": 128, "tokens_per_image": 256, "steps": 2, "rounds": 2}
DEFAULTS = {"cpu": {**_PAPER, **_TINY}, "cuda": {**_PAPER, **_SMALL}}
QUICK = {
    "model": "tiny",
    "images": [2, 3],
    "orders": 2,
    "per_order": 3,
    "completion": 12,
    "tokens_per_image": 9,
    "steps": 2,
    "rounds": 2,
}
NUMBERS = {
    "images": "images of each question; default: 4 8",
    "orders": "orders of a question's images; default: 2",
    "per-order": "completions of each order; default: 6",
    "completion": "tokens of a completion; default: 64 on cpu, 128 on cuda",
    "tokens-per-image": "visual tokens, rounded up to a square; default: 64 on cpu, 256 on cuda",
    "budget": "tokens of a micro-batch, padded or packed; default: 16384",
    "steps": "timed steps of each trainer in a round, behind one to warm up; default: 3, on cuda 2",
    "rounds": "rounds of both trainers; default: 3, on cuda 2",
}


def main(arguments: list[str] | None = None) -> int:
    return step_program(lambda: parse(arguments), lambda s: measure(s, Display()), table)


def table(report: dict[str, Any]) -> list[str]:
    if not report["available"]:
        return [f"not compared: {report['reason']}"]
    return [*steps_markdown(Steps(trainer=Trainer(**report))), *busy_line()]


def parse(arguments: list[str] | None) -> tuple[Setting, Path | None]:
    """Options as a setting, and where the report goes."""
    parser = step_parser(
        "A whole optimizer step of PeRL's trainer beside one of TRL's.",
        quick="a small setting, for a look at whether all works",
        models=MODELS,
        default_models="0.6b on cuda, tiny on cpu",
        numbers=NUMBERS,
    )
    parser.add_argument(
        "--trl-attention",
        choices=("sdpa", "flash_attention_2", "eager"),
        help="of TRL's model, in tower and language model; default: flash_attention_2 in bfloat16 on cuda where flash-attn "
        "is installed, else sdpa",
    )
    given = parser.parse_args(arguments)
    check_writable(given.json)
    return _setting(given), given.json


def _setting(given: argparse.Namespace) -> Setting:
    device = _device(given.device)
    dtype = given.dtype or ("bfloat16" if device == "cuda" else "float32")
    defaults = {**(QUICK if given.quick else DEFAULTS[device]), "budget": 16384}
    chosen = {k: v for k, v in vars(given).items() if k in defaults and v is not None}
    values: dict[str, Any] = {**defaults, **chosen}
    setting = Setting(
        device=device,
        dtype=dtype,
        seed=given.seed,
        trl_attention=_trl_attention(given.trl_attention, device, dtype),
        **{**values, "images": tuple(values["images"])},
    )
    few, many = min(setting.images), max(setting.images)
    if few < 2 or many > 26:
        raise UserError(f"--images {few if few < 2 else many}: the bundled questions have 2 to 26")
    if setting.orders > math.factorial(few):
        raise UserError(f"--orders {setting.orders}: {few} images have only {math.factorial(few)}")
    if setting.per_order < 2:
        raise UserError("--per-order 1: a single completion has no advantage in TRL; raise it")
    return setting


def _trl_attention(wanted: str | None, device: str, dtype: str) -> str:
    """What is wanted; else flash attention where it can run, as PeRL's is on a GPU."""
    possible = device == "cuda" and dtype == "bfloat16"
    if wanted == "flash_attention_2" and not possible:
        raise UserError("--trl-attention flash_attention_2: it needs a GPU and bfloat16")
    if wanted == "flash_attention_2" or (wanted is None and possible):
        try:
            importlib.import_module("flash_attn")
            return "flash_attention_2"
        except Exception as error:  # Built for another PyTorch it fails in any way.
            if wanted:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"--trl-attention {wanted}: no flash-attn ({reason})") from error
    return wanted or "sdpa"


def _device(wanted: str | None) -> str:
    """Both trainers take the GPU that PyTorch sees, and TRL refuses more than one in a process."""
    count = torch.cuda.device_count()
    if wanted == "cuda" and not count:
        raise UserError("--device cuda: there is no GPU that PyTorch can use")
    if wanted == "cpu" and count:
        raise UserError("--device cpu: hide the GPU from both trainers with CUDA_VISIBLE_DEVICES=")
    if count > 1:
        raise UserError(f"{count} GPUs are visible; choose one with CUDA_VISIBLE_DEVICES=0")
    return "cuda" if count else "cpu"


if __name__ == "__main__":
    sys.exit(main())
