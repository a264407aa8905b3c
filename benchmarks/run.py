"""All benchmarks by one command: table, pictures, and a file of every figure.

    python benchmarks/run.py --quick

Microbenchmarks (`bench_*.py`, under pytest-benchmark), a training step three ways (`bench_train_step.py`), and a whole
optimiser step beside TRL's trainer (`bench_trainer.py`) run one after the other on the device that is there, and
`results/<device>/<date>-<commit>.json`, `.md` and pictures are written. Nothing is fetched. A case that would start after its
time is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

from perl.types import UserError  # noqa: E402

QUICK_MINUTES, FULL_MINUTES = 4.5, 7.5
STEPS = {"train_step": "bench_train_step.py", "trainer": "bench_trainer.py"}
"""Scripts that write a report of their own."""


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(description="All benchmarks: table, pictures, and a file of every figure.")
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller cases: minutes on two CPU cores")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--threads", type=_count, metavar="N", help="CPU threads; default: all cores")
    add("--only", metavar="WORDS", help="microbenchmarks that pytest's -k finds; no steps")
    add("--passes", type=_count, metavar="N", help="turns of each provider; default: 3, quick 2")
    add(
        "--minutes",
        type=_minutes,
        metavar="M",
        help=f"nothing starts later; default: {FULL_MINUTES}, quick {QUICK_MINUTES}, on a CPU 20",
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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def run(given: argparse.Namespace) -> int:
    """0: done, 1: a wrong result of this repository's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = dict(os.environ, GOMP_SPINCOUNT=os.environ.get("GOMP_SPINCOUNT", "1000"))
        # What a case leaves behind would keep a larger one from its memory.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # glibc gives large blocks back to the system or keeps them, by what came before; a page fault for each page
        # of them makes the difference of a CPU's times. Here they are kept.
        environment.setdefault("MALLOC_MMAP_MAX_", "0")
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
        if given.wheels:
            # QuACK looks for a folder of this name, and CUTLASS for what its .pth file would add.
            site = _unpacked(given.wheels, folder / "site-packages")
            added = [site, os.path.join(site, "nvidia_cutlass_dsl", "dsl_packages")]
            sys.path += added
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [environment.get("PYTHONPATH"), *added])
            )
        code, results = measure(given, folder, environment)
        file = _written(results, given.output)
        from benchmarks.report import main as report

        return report([str(file)]) or code


def measure(
    given: argparse.Namespace, folder: Path, environment: dict[str, str]
) -> tuple[int, dict[str, Any]]:
    """pytest's exit code, and everything for the file."""
    started = time.monotonic()
    cuda = _uses_cuda(given, environment)
    if not cuda:
        # TRL's trainer takes a GPU that it sees.
        environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
    seconds = 60 * (given.minutes or _default_minutes(cuda, given.quick))
    for_steps = 0.0 if given.only else min(seconds / 2, 60 if given.quick else 220)
    code, results = _microbenchmarks(given, folder, environment, seconds - for_steps, cuda)
    if not given.only:
        results["steps"] = {}
        for waiting, name in zip((2, 1), STEPS, strict=True):
            left = max(30.0, seconds - (time.monotonic() - started))
            found = _step(name, given, folder, environment, left / waiting, cuda)
            results["steps"][name] = found
    return code, {
        "schema": 1,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "mode": "quick" if given.quick else "full",
        "minutes": round((time.monotonic() - started) / 60, 2),
        **results,
    }


def _default_minutes(cuda: bool, quick: bool) -> float:
    if quick:
        return QUICK_MINUTES
    return FULL_MINUTES if cuda else 20.0


def _unpacked(wheels: Path, folder: Path) -> str:
    """The folder with the wheels' packages, which are pure Python or fit this machine."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise UserError(
            f"--wheels {wheels}: there is no .whl file; make bench-wheels collects them"
        )
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return str(folder)


def _uses_cuda(given: argparse.Namespace, environment: dict[str, str]) -> bool:
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"torch cannot be imported: {_last_line(done.stderr)}; run make setup")
    there = done.stdout.strip() == "True"
    if given.device == "cuda" and not there:
        raise UserError("--device cuda: there is no GPU that PyTorch can use")
    return there and given.device != "cpu"


def _microbenchmarks(
    given: argparse.Namespace,
    folder: Path,
    environment: dict[str, str],
    seconds: float,
    cuda: bool,
) -> tuple[int, dict[str, Any]]:
    """pytest's exit code, and machine, peaks and rows."""
    file = folder / "rows.json"
    options = [
        f"--passes={given.passes or (2 if given.quick else 3)}",
        f"--results={file}",
        f"--minutes={seconds / 60}",
    ]
    options += ["--quick"] * given.quick + [f"--device={'cuda' if cuda else 'cpu'}"]
    options += [f"--threads={given.threads}"] if given.threads else []
    options += ["-k", given.only] if given.only else []
    quiet = ["-q", "--no-header", "--no-summary", "--benchmark-quiet", "--benchmark-disable-gc"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *quiet, *plugins, *options]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not file.exists():
        raise UserError("the microbenchmarks did not run; what pytest says above tells why")
    results = json.loads(file.read_text())
    if not results["rows"]:
        raise UserError(f"--only {given.only}: no microbenchmark has that in its name")
    return code, results


def _step(
    name: str,
    given: argparse.Namespace,
    folder: Path,
    environment: dict[str, str],
    seconds: float,
    cuda: bool,
) -> dict[str, Any]:
    """A script's report, or why there is none."""
    file = folder / f"{name}.json"
    script = str(ROOT / "benchmarks" / STEPS[name])
    command = [sys.executable, script, f"--json={file}", f"--device={'cuda' if cuda else 'cpu'}"]
    command += ["--quick"] * given.quick
    try:
        done = subprocess.run(command, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {seconds:.0f} s; give --minutes more"}
    if not file.exists():
        return {"failed": f"python benchmarks/{STEPS[name]} ended with exit code {done.returncode}"}
    return json.loads(file.read_text())


def _commit() -> str:
    """Short hash of what is measured, with a + where files differ from it; `unknown` without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=9", "HEAD")
        changed = git("status", "--porcelain", "--", "kernels", "perl", "benchmarks/*.py")
    except FileNotFoundError:
        return "unknown"
    return commit + "+" * bool(changed) if commit else "unknown"


def _written(results: dict[str, Any], output: Path) -> Path:
    """`<output>/<device>/<date>-<commit>.json`"""
    machine = results["machine"]
    name = machine["device"] + ("" if machine["kind"] == "cuda" else f" {machine['threads']} cores")
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    folder = output / slug
    folder.mkdir(parents=True, exist_ok=True)
    commit = results["commit"].rstrip("+") + "-changed" * results["commit"].endswith("+")
    file = folder / f"{results['date']}-{commit}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    return file


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
