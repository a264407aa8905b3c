"""One LoRA step of a model of true size and its export, on a CPU: seconds and resident memory by stage.

    python -m benchmarks.true_size runs/true-size [--layers 4] [--plan FILE] [--json FILE] [--model.dtype bfloat16 ...]

The folder gets the model (random bfloat16 weights; Qwen2.5-VL-3B: 7.5 GB) unless it is there, and a run: one question of two
images of 448 pixels in two orders, two completions of eight tokens each. Further options are keys of the recipe. Resident memory is
what the kernel counts (VmHWM), files that are mapped included, and is counted anew for each stage. Beside it `--plan` shows
what `perl-rl plan --json FILE` computes with the same keys: tensors that live, without its reserve, which is a GPU's. Python, libraries and what
the heap keeps are resident besides; and blocks of logits are of a GPU's size there.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.first.folder import MODEL, make
from benchmarks.harness.options import Parser, count, exit_code
from benchmarks.report.tables import figure, table
from perl.files import write_json
from perl.types import UserError

REWARD = "def f(prompts, **_): return [float(i % 2) for i in range(len(prompts))]\n"
"""A reward that any completions are learned from."""
SIDE = 448

KEYS = (
    f"--model.dtype bfloat16 --model.freeze-vision --model.gradient-checkpointing 1 --model.lora-rank 64 "
    f"--model.min-pixels {SIDE * SIDE} --model.max-pixels {SIDE * SIDE} --data.max-images 2 "
    "--data.max-prompt-tokens 4096 --permutation.orders 2 --permutation.rate 1 --rollout.per-order 2 "
    "--rollout.max-new-tokens 8 --filter.no-zero-variance --filter.max-tries 1 --cold-start.steps 0 "
    "--eval.examples 0 --train.steps 1 --train.examples-per-step 1 --train.tokens-per-micro-batch 2048 "
    "--reward.weights 1 --run.seeds --run.trackers"
)


class Resident:
    """A listener that counts seconds and largest resident memory of the outermost ranges, and of what was before the first.

    It begins a count where the run itself does, and none inside: the run's own figures stay right.
    """

    def __init__(self) -> None:
        self.depth, self.rows = 0, dict[str, dict[str, float]]()
        self._begin("load")

    def enter(self, name: str) -> None:
        if not self.depth:
            if not self.rows:
                self._end()
            self._begin(name)
        self.depth += 1

    def leave(self, name: str) -> None:
        self.depth -= 1
        if not self.depth:
            self._end()

    def _begin(self, name: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.name, self.since = name, (time.perf_counter(), time.process_time())

    def _end(self) -> None:
        row = self.rows.setdefault(
            self.name, {"seconds": 0.0, "cpu_seconds": 0.0, "peak": 0.0, "end": 0.0}
        )
        row["seconds"] += time.perf_counter() - self.since[0]
        row["cpu_seconds"] += time.process_time() - self.since[1]
        now = memory()
        row["peak"], row["end"] = max(row["peak"], now["VmHWM"]), now["VmRSS"]
        row["mapped"] = now["RssFile"]


def memory() -> dict[str, float]:
    """Bytes, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    parts = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024.0 * int(value) for name, value, _ in parts}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="A LoRA step of a model of true size and its export, on a CPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--layers", type=count, help="fewer layers, and as many blocks of the tower"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="of perl-rl plan --json")
    parser.add_argument("--json", type=Path, metavar="FILE")

    def run() -> int:
        given, keys = parser.parse_known_args(arguments)
        if not Path("/proc/self/clear_refs").exists():
            raise UserError("only Linux counts the memory of a stage; run it there")
        show(step(model(given.folder, given.layers), given.folder / "run", keys), given)
        return 0

    return exit_code(run)


def model(folder: Path, layers: int | None) -> Path:
    """The model's folder, made in a process of its own: what it takes is not the step's."""
    from perl.training.roofline.model import CONFIGS

    target = folder / "model"
    if not (target / "config.json").is_file():
        sizes = json.loads(json.dumps(CONFIGS[MODEL]))
        if layers:
            sizes["text_config"]["num_hidden_layers"] = layers
            sizes["vision_config"] |= {"depth": layers, "fullatt_block_indexes": [layers - 1]}
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(sizes, target))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise UserError(f"{target}: the model could not be made; see above")
    return target


def step(model: Path, run: Path, keys: list[str]) -> dict[str, dict[str, float]]:
    """The stages of a run, in their order."""
    from perl.cli import main as command
    from perl.timing import listening

    reward = run.with_name("reward.py")
    reward.write_text(REWARD)
    options = [*KEYS.split(), "--model.path", str(model), "--reward.functions", f"{reward}:f"]
    resident = Resident()
    with listening(resident):
        try:
            command(["train", "demo", *options, "--run.dir", str(run), "--overwrite", *keys])
        except SystemExit as end:
            if end.code:
                raise
    return resident.rows


def show(rows: dict[str, dict[str, float]], given: Any) -> None:
    planned = json.loads(given.plan.read_text()) if given.plan else None
    if given.json:
        write_json(given.json, {"stages": rows, "plan": planned})
    print(stages(rows, planned))


def stages(rows: dict[str, dict[str, float]], planned: dict[str, Any] | None = None) -> str:
    """A table of them, with what a plan computed for those that it knows."""
    header = ["stage", "s", "CPU s", "peak GB", "at its end GB", "of that mapped GB"]
    lines = [
        [name, figure(row["seconds"]), figure(row["cpu_seconds"])]
        + [figure(row[key] / 1e9) for key in ("peak", "end", "mapped")]
        for name, row in rows.items()
    ]
    if planned:
        header.append("planned GB")
        for line in lines:
            parts = planned["memory"].get(line[0])
            live = sum(parts.values()) - parts["reserve"] if parts else 0
            line.append(figure(live / 1e9) if parts else "-")
    return table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
