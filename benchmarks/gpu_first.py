"""The first run on a GPU by one command, in parts of at most ten minutes each.

    python benchmarks/gpu_first.py                   # every part that is not done yet
    python benchmarks/gpu_first.py tilings --again   # one of them anew
    python benchmarks/gpu_first.py sanitizer         # by name alone: everything runs many times slower

A part is a process of its own, so that a kernel that leaves the GPU unusable ends that part and no other. What it finds is
written to `results/<device>/first/<part>.json` line by line. A part that is done there, on the same commit, is not run again
without `--again`. Exit code 1: a part failed or found something wrong; 2: there is no GPU.

`--dry-run` goes through the same code on a CPU with small shapes, in PyTorch or, with TRITON_INTERPRET=1, in interpreted
kernels; the commands of other programs are only printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

import torch  # noqa: E402

from benchmarks.first import kernels, trainer  # noqa: E402
from benchmarks.first.bench import Bench, write  # noqa: E402
from benchmarks.harness.device import machine  # noqa: E402
from benchmarks.harness.options import Parser, environment, exit_code  # noqa: E402
from benchmarks.run import commit, device_folder  # noqa: E402
from perl.types import UserError  # noqa: E402

SECONDS = 600.0
"""Of a part."""

_COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def tests(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """The kernels' own, which take real sizes on a GPU, and those of the trainer that need one."""
    together = importlib.util.find_spec("xdist") is not None
    processes = [f"--numprocesses={min(14, os.cpu_count() or 1)}"] * together
    report = f"--junitxml={folder / 'tests.xml'}"
    quiet = ["-q", "-p", "no:cacheprovider", "--timeout=300"]
    quiet = quiet if importlib.util.find_spec("pytest_timeout") else quiet[:-1]
    return [
        [
            sys.executable,
            "-m",
            "pytest",
            *quiet,
            *processes,
            report,
            "tests/kernels",
            "tests/model/test_gpu.py",
        ]
    ]


def counters(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """What the row kernels do by the hardware's counters."""
    chosen = [
        "--clock-control=none",
        "--kernel-name=regex:row_",
        f"--metrics={','.join(_COUNTERS)}",
    ]
    into = ["--csv", f"--log-file={folder / 'counters.csv'}"]
    return [["ncu", *chosen, *into, *_inside("once", given, folder / "once.json")]]


def peers(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Everything beside everybody, as `make bench` does it."""
    wheels = [f"--wheels={given.wheels}"] if given.wheels else []
    program = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    return [[*program, f"--output={given.output}", "--minutes=7.5", *wheels]]


def host(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """What a call costs the host."""
    program = [sys.executable, "-m", "benchmarks.host_cost", "--device=cuda"]
    return [[*program, f"--json={folder / 'host_cost.json'}"]]


def sanitizer(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    return [
        [
            *("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"),
            f"--log-file={folder / tool}.log",
            *_inside("tiny", given, folder / "tiny.json"),
        ]
        for tool in ("memcheck", "racecheck", "initcheck")
    ]


def micro_batches(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """One step of 3B and of 7B padded, packed and shared."""
    program = [sys.executable, str(ROOT / "benchmarks" / "bench_train_step.py"), "--device=cuda"]
    return [
        [*program, f"--model={model}", f"--json={folder / f'train_step_{model}.json'}", *more]
        for model, more in (("3b", []), ("7b", ["--images", "4", "--checkpointing"]))
    ]


def true_size(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """A step of a model of 3B with random weights, profiled: two questions of six images of 361 tokens."""
    made = folder / "true-size-3b"
    tokenizer = [f"--tokenizer={given.tokenizer}"] if given.tokenizer else []
    make = [sys.executable, "-m", "benchmarks.first.folder", str(made), *tokenizer]
    options = (
        "--data.train bundled:digits --data.eval= --data.min-images 6 --data.max-images 6 --data.instruction= "
        "--model.min-pixels 262144 --rollout.max-new-tokens 256 --train.examples-per-step 2 --warmup 1 --steps 2"
    )
    profile = [sys.executable, "-m", "perl", "profile", "default", "--model.path", str(made)]
    into = ["--output", str(folder / "profile-3b"), "--overwrite"]
    return [make, [*profile, *options.split(), *into]]


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": kernels.ceilings,
    "correct": kernels.correct,
    "operations": kernels.operations,
    "tilings": kernels.tilings,
    "once": kernels.once,
    "tiny": kernels.tiny,
    "patches": trainer.patches,
    "attention": trainer.attention,
    "decode": trainer.decode,
    "layers": trainer.layers,
    "repeat": trainer.repeat,
    "segments": trainer.segments,
}
"""What runs in a process of this file."""
PROGRAMS: dict[str, Callable[[argparse.Namespace, Path], list[list[str]]]] = {
    "tests": tests,
    "host": host,
    "counters": counters,
    "peers": peers,
    "micro_batches": micro_batches,
    "true_size": true_size,
    "sanitizer": sanitizer,
}
"""What runs in others, by commands."""
ALL = (
    *("ceilings", "correct", "tests", "operations", "tilings", "host", "counters", "peers"),
    *("patches", "attention", "decode", "layers", "repeat", "segments"),
    *("micro_batches", "true_size"),
)
"""The default, in the order of what is needed first: the kernels, then the training step."""


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="The first run on a GPU, in parts of at most ten minutes each.")
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(ALL)}, which are the default; sanitizer",
    )
    add("--again", action="store_true", help="also what is done")
    add("--dry-run", action="store_true", help="the same code on a CPU with small shapes")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: benchmarks/results, of a dry run a folder for temporary files",
    )
    add("--wheels", type=Path, metavar="DIR", help="of peers, as `make bench-wheels` collects them")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json of Qwen2.5 for the model of true size; default: one of words",
    )
    add("--inside", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    for name in given.parts:
        if name not in {**PARTS, **PROGRAMS}:
            raise UserError(f"{name}: no such part; there are {', '.join(ALL)} and sanitizer")
    return given


def run(given: argparse.Namespace) -> int:
    """0: what was asked for is done, and right; else 1."""
    if not given.dry_run and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU that PyTorch can use; make gpu-first ARGS=--dry-run goes through the same code "
            "on a CPU"
        )
    device = torch.device("cpu" if given.dry_run else "cuda")
    if given.inside:
        bench = Bench(device, given.inside, [])
        PARTS[given.parts[0]](bench)
        return int(any("wrong" in line for line in bench.lines))
    about = {"commit": commit(), "date": date.today().isoformat(), "machine": machine(device)}
    own = Path(tempfile.gettempdir()) / "perl-gpu-first"
    output = given.output or (own if given.dry_run else ROOT / "benchmarks" / "results")
    folder = device_folder(output, about["machine"]) / "first"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {name: _part(name, given, folder, about) for name in given.parts or ALL}
    print("; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome in ("failed", "out of time") for outcome in outcomes.values()))


def _part(name: str, given: argparse.Namespace, folder: Path, about: dict[str, Any]) -> str:
    """How it ends: `done`, `failed`, `out of time`, `missing` if a program is, `not run`."""
    file = folder / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    done = before.get("outcome") == "done" and before["commit"] == about["commit"]
    if done and not given.again:
        return f"done before, {before['date']}"
    commands = PROGRAMS[name](given, folder) if name in PROGRAMS else [_inside(name, given, file)]
    file.unlink(missing_ok=True)
    start, outcome = time.monotonic(), "done"
    for command in commands:
        print(f"{name}: {' '.join(command)}", flush=True)
        if given.dry_run and name in PROGRAMS:
            outcome = "not run"
            continue
        if shutil.which(command[0]) is None:
            outcome = "missing"
            break
        # Whatever it has started ends with it, so that nothing is timed beside it.
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
        try:
            code = process.wait(max(1.0, SECONDS - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            outcome = "out of time"
            break
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcome = "failed" if code else outcome
    if outcome == "not run":
        return outcome
    lines = json.loads(file.read_text())["lines"] if file.exists() else []
    seconds = round(time.monotonic() - start, 1)
    write(file, {**about, "outcome": outcome, "seconds": seconds, "lines": lines})
    return outcome


def _inside(name: str, given: argparse.Namespace, file: Path) -> list[str]:
    dry = ["--dry-run"] * given.dry_run
    return [sys.executable, str(Path(__file__).resolve()), name, *dry, f"--inside={file}"]


if __name__ == "__main__":
    sys.exit(main())
