"""Which part of a training step waits for pictures, with and without processes that read ahead (`data.workers`).

    python -m benchmarks.pixel_waits [--workers 2] [--json FILE]

`perl-rl train` runs on questions over smooth pictures, half JPEG and half PNG, with a tiny model, in turn with each number of workers;
figures are medians over the steps behind the first, whose pictures nobody could read ahead.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness.options import Parser, count, environment, exit_code
from benchmarks.report.tables import figure, percent, table
from perl.files import write_json
from perl.model.tiny import make_tiny_model
from perl.types import UserError, one_line

QUESTION = "which image is the darkest ?"
RECIPE = """
recipe = "default"
run.trackers = []
model = {{path = "{root}/model", max_pixels = {pixels}}}
data = {{train = "{root}/data.jsonl", max_prompt_tokens = 100000, eval = "", instruction = ""}}
permutation.orders = 1
rollout = {{per_order = 2, max_new_tokens = {tokens}}}
reward = {{functions = ["repetition"], weights = [1.0]}}
filter.zero_variance = false
loss.kl_coef = 0.0
train = {{steps = {steps}, examples_per_step = {questions}, tokens_per_micro_batch = 110000}}
"""


def main() -> int:
    parser = Parser(
        "benchmarks.pixel_waits", description="Which part of a training step waits for pictures."
    )
    for name, default, what in (
        ("images", 8, "of a question"),
        ("side", 512, "pixels of an image's side"),
        ("questions", 4, "of a step"),
        ("steps", 5, "of a run"),
        ("rounds", 2, "runs of each"),
        ("workers", 2, "to compare with none"),
        ("tokens", 96, "most of a completion: they decide how long a step is"),
    ):
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{what} ({default})")
    parser.add_argument("--json", type=Path, help="where to write every step")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tiny_model("tiny-qwen2.5-vl", QUESTION.split(), root / "model", seed=0)
        _write_questions(root, options)
        for number in range(options.rounds):
            for workers in (0, options.workers):
                rows += _run(root / f"{number}-{workers}", workers, options)
    if options.json:
        write_json(options.json, {"options": {**vars(options), "json": None}, "rows": rows})
    print(table(("workers", "step s", "waits s", "share %"), _lines(rows)))
    return 0


def _write_questions(root: Path, options: Any) -> None:
    rng, lines = np.random.default_rng(0), []
    for number in range(options.questions * (options.steps + 1)):
        names = [f"{number}-{k}.{'png' if k % 2 else 'jpg'}" for k in range(options.images)]
        for name in names:
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((options.side,) * 2, Image.Resampling.BICUBIC).save(root / name)
        row = {"images": names, "question": "<image> " * options.images + QUESTION, "answer": "1"}
        lines.append(json.dumps({**row, "kind": "none"}) + "\n")
    (root / "data.jsonl").write_text("".join(lines))


def _run(folder: Path, workers: int, options: Any) -> list[dict[str, Any]]:
    """What each step but the first took."""
    recipe = RECIPE.format(root=folder.parent, pixels=options.side**2, **vars(options))
    (folder.parent / "recipe.toml").write_text(recipe)
    command = [sys.executable, "-m", "perl", "train", str(folder.parent / "recipe.toml")]
    command += ["--run.dir", str(folder), "--data.workers", str(workers)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"with data.workers = {workers}: {one_line(done.stderr[-400:], 400)}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["stage"] == "rl"][1:]
    return [
        {
            "workers": workers,
            "step": row["time/step"],
            "waits": row["time/data"] + row["time/preprocess"],
        }
        for row in steps
    ]


def _lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    out = []
    for workers in dict.fromkeys(row["workers"] for row in rows):
        own = [row for row in rows if row["workers"] == workers]
        step, waits = (statistics.median(row[name] for row in own) for name in ("step", "waits"))
        share = statistics.median(row["waits"] / row["step"] for row in own)
        out.append([str(workers), figure(step), figure(waits), percent(share)])
    return out


if __name__ == "__main__":
    sys.exit(exit_code(main))
