"""All benchmarks by one command: table, pictures, and a file of every figure.

    python benchmarks/run.py --quick

Microbenchmarks (`cases/`, under pytest-benchmark), a training step three ways (`bench_train_step.py`), and a whole
optimizer step beside TRL's trainer (`bench_trainer.py`) run one after the other on the device that is there, and
`results/<device>/<date>-<commit>.json`, `.md` and pictures are written. Nothing is fetched. A case that would start after its
time is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

from benchmarks.harness.options import (  # noqa: E402
    Parser,
    count,
    device_of,
    environment,
    exit_code,
    positive,
)
from perl.types import UserError  # noqa: E402

QUICK_MINUTES, FULL_MINUTES, CPU_MINUTES = 4.5, 7.5, 20.0
_USAGE_ERROR, _NOTHING_SELECTED = 4, 5
"""Exit codes of pytest."""

STEPS = {"train_step": "bench_train_step.py", "trainer": "bench_trainer.py"}
"""Scripts that write a report of their own."""


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="All benchmarks: table, pictures, and a file of every figure.")
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller cases: minutes on two CPU cores")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add(
        "--threads",
        type=count,
        metavar="N",
        help="CPU threads; default: OMP_NUM_THREADS, else all cores",
    )
    add(
        "--only",
        metavar="WORDS",
        help="microbenchmarks alone whose names an expression of pytest's -k finds, as in 'linear_loss and not frozen'; "
        "python -m pytest benchmarks --collect-only -q lists the names",
    )
    add("--passes", type=count, metavar="N", help="turns of each provider; default: 3, quick 2")
    add(
        "--minutes",
        type=positive,
        metavar="M",
        help="what has not started by then is left out, and named; default: "
        f"{FULL_MINUTES}, on a CPU {CPU_MINUTES:g}, with --quick {QUICK_MINUTES}",
    )
    add(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="wheels of packages that are not installed, as `make bench-wheels` collects them",
    )
    add(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> int:
    """0: done; 1: a result of this repository's was wrong, or it failed; 130: interrupted. What was found by then is written."""
    from perl.files import replacing

    # Before minutes are spent on what then cannot be kept.
    try:
        given.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=given.output):
            pass
    except OSError as error:
        reason = f"nothing can be written there ({error.strerror}); name another folder"
        raise UserError(f"--output {given.output}: {reason}") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        variables = environment()
        if given.wheels:
            # QuACK looks for a folder of this name, and CUTLASS for what its .pth file would add.
            site = _unpacked(given.wheels, folder / "site-packages")
            added = [site, os.path.join(site, "nvidia_cutlass_dsl", "dsl_packages")]
            sys.path += added
            variables["PYTHONPATH"] = os.pathsep.join(
                filter(None, [variables.get("PYTHONPATH"), *added])
            )
        results = measure(given, folder, variables)
        file = _file(results, given.output)
        with replacing(file) as written:
            written.write_text(json.dumps(results, indent=1) + "\n")
        from benchmarks.report.__main__ import main as report

        code = report([str(file)])
    if results.get("interrupted"):
        print("interrupted: what was found by then is written", file=sys.stderr)
        return 130
    wrong = [r for r in results["rows"] if r["ours"] and r["status"] in ("refused", "failed")]
    for row in wrong:
        name = f"{row['op']}, {row['case']}, {row['provider']}"
        print(f"{row['status']}: {name}: {row['reason']}", file=sys.stderr)
    return code or int(bool(wrong))


def measure(given: argparse.Namespace, folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Everything for the file."""
    started = time.monotonic()
    given.device = device_of(given.device)
    cuda = given.device == "cuda"
    if not cuda:
        # TRL's trainer takes a GPU that it sees.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    default = QUICK_MINUTES if given.quick else FULL_MINUTES if cuda else CPU_MINUTES
    seconds = 60 * (given.minutes or default)
    for_steps = 0.0 if given.only else min(seconds / 2, 60 if given.quick else 220)
    # Before minutes in which files may change, or a day end.
    version, today = commit(), date.today().isoformat()
    rows, steps = folder / "rows.json", {}
    load = os.getloadavg()[0]
    if load > 1:
        print(f"this machine is busy (load {load:.1f}): its times will say little", file=sys.stderr)
    interrupted = False
    try:
        _microbenchmarks(given, rows, variables, seconds - for_steps)
        for waiting, name in zip((2, 1), () if given.only else STEPS, strict=False):
            left = max(30.0, seconds - (time.monotonic() - started))
            steps[name] = _step(name, given, folder, variables, left / waiting)
    except KeyboardInterrupt:
        interrupted = True
    if not rows.exists():
        raise UserError("no case was finished; nothing is written")
    return {
        "schema": 1,
        "date": today,
        "commit": version,
        "mode": "quick" if given.quick else "full",
        "minutes": round((time.monotonic() - started) / 60, 2),
        **json.loads(rows.read_text()),
        "load": [load, os.getloadavg()[0]],
        **({"only": given.only} if given.only else {}),
        **({"steps": steps} if steps else {}),
        **({"interrupted": True} if interrupted else {}),
    }


def _unpacked(wheels: Path, folder: Path) -> str:
    """The folder with those wheels' packages that are not installed; they are pure Python or fit this machine."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise UserError(
            f"--wheels {wheels}: there is no .whl file; make bench-wheels collects them"
        )
    installed = {_normal(d.name) for d in distributions()}
    for wheel in found:
        if _normal(wheel.name.partition("-")[0]) in installed:
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        except zipfile.BadZipFile as error:
            raise UserError(f"{wheel} is damaged ({error}); fetch it again") from error
    return str(folder)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _microbenchmarks(
    given: argparse.Namespace, file: Path, variables: dict[str, str], seconds: float
) -> None:
    """Machine, peaks and rows into `file`, case by case, so that a crash loses what was running alone."""
    options = [
        f"--passes={given.passes or (2 if given.quick else 3)}",
        f"--results={file}",
        f"--minutes={seconds / 60}",
        f"--device={given.device}",
    ]
    options += ["--quick"] * given.quick
    options += [f"--threads={given.threads}"] if given.threads else []
    options += ["-k", given.only] if given.only else []
    quiet = ["-q", "--no-header", "--no-summary", "--benchmark-quiet", "--benchmark-disable-gc"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *quiet, *plugins, *options]
    try:
        # The last case may start when time is nearly over.
        code = subprocess.run(command, cwd=ROOT, env=variables, timeout=seconds + 120).returncode
    except subprocess.TimeoutExpired:
        print("the microbenchmarks were stopped: a case did not end in time", file=sys.stderr)
        return
    if code == _USAGE_ERROR:
        raise UserError(f"--only {given.only}: pytest's -k cannot read that")
    if code == _NOTHING_SELECTED:
        raise UserError(f"--only {given.only}: no microbenchmark has that in its name")
    if code not in (0, 1):
        print(f"the microbenchmarks ended with exit code {code}", file=sys.stderr)


def _step(
    name: str, given: argparse.Namespace, folder: Path, variables: dict[str, str], seconds: float
) -> dict[str, Any]:
    """A script's report, or why there is none."""
    file = folder / f"{name}.json"
    script = str(ROOT / "benchmarks" / STEPS[name])
    command = [sys.executable, script, f"--json={file}", f"--device={given.device}"]
    command += ["--quick"] * given.quick
    try:
        done = subprocess.run(command, env=variables, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {seconds:.0f} s; give --minutes more"}
    if not file.exists():
        return {"failed": f"python benchmarks/{STEPS[name]} ended with exit code {done.returncode}"}
    return json.loads(file.read_text())


def commit() -> str:
    """Short hash of what is measured, with a + where files differ from it; `unknown` without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        revision = git("rev-parse", "--short=9", "HEAD")
        changed = git("status", "--porcelain", "--", "kernels", "perl", "benchmarks/*.py")
    except FileNotFoundError:
        return "unknown"
    return revision + "+" * bool(changed) if revision else "unknown"


def device_folder(output: Path, machine: dict[str, Any]) -> Path:
    """Of the results of `benchmarks.harness.device.machine`."""
    name = machine["device"] + (
        "" if machine["kind"] == "cuda" else f" {machine['threads']} threads"
    )
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    folder = output / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file(results: dict[str, Any], output: Path) -> Path:
    """`<output>/<device>/<date>-<commit>.json`, with -quick and -part where it is that."""
    folder = device_folder(output, results["machine"])
    version = results["commit"].replace("+", "-changed")
    # A part, or small sizes, must not take the place of everything.
    kind = "-quick" * (results["mode"] == "quick") + "-part" * ("only" in results)
    return folder / f"{results['date']}-{version}{kind}.json"


if __name__ == "__main__":
    sys.exit(main())
