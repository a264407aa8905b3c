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
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness.contest import Refused, Run, Work  # noqa: E402
from benchmarks.harness.device import (  # noqa: E402
    Peaks,
    clock,
    cool,
    free_memory,
    machine,
    measure_peaks,
    peak_memory,
    synchronize,
)
from benchmarks.harness.head_problem import (  # noqa: E402
    Head,
    HeadProblem,
    LogitsLogprobsProblem,
    LogitsProblem,
    LogprobsProblem,
    head,
    make_problem,
)
from benchmarks.harness.options import Parser, environment, exit_code  # noqa: E402
from benchmarks.providers import ours  # noqa: E402
from benchmarks.run import commit, device_folder  # noqa: E402
from perl.files import replacing  # noqa: E402
from perl.types import UserError  # noqa: E402
from perl_kernels import PolicyLoss, group_advantages, rows_triton  # noqa: E402
from perl_kernels.dispatch import engine  # noqa: E402
from perl_kernels.values import Coefficients, LossInputs, Prepared, Scoring  # noqa: E402

SECONDS = 600.0
"""Of a part."""

MODELS = ("Qwen3-VL-8B", "Qwen2.5-VL-3B")
"""Heads of 4096 and 2048 features over 151,936 tokens."""
_REPEATS = 6
_POISON = 2**31
"""Bytes of NaN that are freed before a call: what it does not write must not look like a number."""

_TILINGS = tuple((loads, warps) for warps in (4, 8, 16) for loads in (1, 2, 4))
"""Loads of 128 bits and warps of a block."""
_COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


class Bench(NamedTuple):
    """Where a part runs, and the file that it fills."""

    device: torch.device
    file: Path
    lines: list[dict[str, Any]]

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def backend(self) -> Any:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "torch" if self.dry and not interpreted else "triton"

    def say(self, name: str, wrong: str = "", **figures: Any) -> None:
        """A line of the report, which is whole at any time; `wrong` is what must not be."""
        self.lines.append({"name": name, **figures, **({"wrong": wrong} if wrong else {})})
        _write(self.file, {"lines": self.lines})
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}
        said = [f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict)]
        print(f"{name}: {', '.join(said + [f'WRONG: {wrong}'] * bool(wrong))}", flush=True)

    def seconds(self, call: Callable[[], Any], rounds: int = 7) -> float:
        """The median of a call, with cold caches."""
        call()
        spans = []
        for _ in range(1 if self.dry else rounds):
            cool(self.device)
            start = clock(self.device)()
            call()
            spans.append((start, clock(self.device)()))
        return statistics.median(end - start for start, end in spans)

    def peaks(self) -> Peaks:
        return Peaks(1e10, 1e10, "float32") if self.dry else measure_peaks(self.device)

    def head(self, model: str, n: int) -> Head:
        return Head("tiny", 24, 32, 517, 2) if self.dry else head(model, n, 2)


def ceilings(bench: Bench) -> None:
    """A copy, and the products that the loss consists of, in the dtypes that it could take."""
    peaks = bench.peaks()
    bench.say("copy", tb_per_s=peaks.bytes_per_s / 1e12)
    bench.say("product of squares", tflops=peaks.flops_per_s / 1e12)
    for model in MODELS[:1] if bench.dry else MODELS:
        for n in (8192,) if bench.dry else (4096, 8192):
            size = bench.head(model, n)
            for name, call in _products(make_problem(LogitsProblem, size, bench.device)).items():
                seconds = bench.seconds(call)
                _, extra = peak_memory(call, bench.device)
                tflops = 2 * size.N * size.H * size.V / seconds / 1e12
                figures = {"ms": 1e3 * seconds, "tflops": tflops, "extra_mib": extra >> 20}
                bench.say(f"{name}, {size.case}, H = {size.H}", **figures)
            free_memory()


def _products(p: Any) -> dict[str, Callable[[], Any]]:
    x, w, z = p.hidden.detach(), p.weight.detach(), p.logits
    found: dict[str, Callable[[], Any]] = {
        "logits": lambda: x @ w.T,
        "grad hidden": lambda: z @ w,
        "grad weight": lambda: z.T @ x,
    }
    if x.device.type == "cpu":
        return found
    wide = torch.zeros_like(w, dtype=torch.float32)
    fp32: Any = {"out_dtype": torch.float32}
    return found | {
        "logits in fp32": lambda: torch.mm(x, w.T, **fp32),
        "grad weight in fp32": lambda: torch.mm(z.T, x, **fp32, out=wide),
        "grad weight added in fp32": lambda: torch.addmm(wide, z.T, x, **fp32, out=wide),
    }


def correct(bench: Bench) -> None:
    """Results against fp64, from memory full of NaN, repeated to the bit, without a synchronisation."""
    sizes = [(2048, 1024, 151_936), (1000, 512, 151_665), (778, 256, 32_001)]
    for n, h, v in [(24, 32, 517), (24, 32, 33)] if bench.dry else sizes:
        size = Head(f"V = {v}", n, h, v, 2)
        for level in ("token", "sequence"):
            p = make_problem(HeadProblem, size, bench.device, level)
            for options in ({}, {"chunk_size": n // 3}, {"logits_dtype": torch.float32}):
                words = ", ".join([level, *(f"{k} {v}" for k, v in options.items())])
                run = ours.linear_loss(p, bench.backend, **options)
                _check(bench, f"linear_grpo_loss, {size.case}, {words}", p, run)
            q = make_problem(LogitsProblem, size, bench.device, level)
            for inplace in (False, True):
                run = ours.logits_loss(q, bench.backend, inplace=inplace)
                _check(bench, f"grpo_loss, {size.case}, {level}, inplace {inplace}", q, run)
        p = make_problem(LogprobsProblem, size, bench.device)
        _check(bench, f"linear_token_logprobs, {size.case}", p, ours.logprobs(p, bench.backend))
        q = make_problem(LogitsLogprobsProblem, size, bench.device)
        _check(bench, f"token_logprobs, {size.case}", q, ours.logits_logprobs(q, bench.backend))


def _check(bench: Bench, name: str, problem: HeadProblem, run: Run) -> None:
    error, wrong, first = None, "", {}
    for repeat in range(2 if bench.dry else _REPEATS):
        if run.reset:
            run.reset()
        poison = torch.full((1 if bench.dry else _POISON // 4,), torch.nan, device=bench.device)
        del poison
        with _no_synchronisation(bench.device):
            found = run.read(run.call())
        if repeat == 0:
            first = {key: tensor.clone() for key, tensor in found.items()}
            try:
                error = problem.prove(first)
            except Refused as refused:
                wrong = str(refused)
        elif not all(torch.equal(first[key], tensor) for key, tensor in found.items()):
            wrong = wrong or f"repeat {repeat} differs from the first"
    bench.say(name, wrong, relative_error=error, repeats_equal=not wrong)


@contextmanager
def _no_synchronisation(device: torch.device) -> Iterator[None]:
    """An error where the host waits for the GPU."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def operations(bench: Bench) -> None:
    """Each operation: time against its bound, memory beyond the inputs, kernels."""
    peaks = bench.peaks()
    for model in MODELS[:1] if bench.dry else MODELS:
        size = bench.head(model, 8192)
        cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("token", {}, {}),
            ("one block", {}, {"chunk_size": size.N}),
            ("blocks of 4096", {}, {"chunk_size": min(4096, size.N // 2)}),
            ("fp32 logits", {}, {"logits_dtype": torch.float32}),
            ("frozen head", {"frozen": True}, {}),
            ("sequence", {"level": "sequence"}, {}),
        ]
        for words, options, extra in cases:
            p = make_problem(HeadProblem, size, bench.device, **options)
            run = ours.linear_loss(p, bench.backend, **extra)
            work = HeadProblem.work(size, bool(options.get("frozen")))
            _measure(bench, f"linear_grpo_loss, {size.case}, {words}", run, work, peaks)
        p = make_problem(LogprobsProblem, size, bench.device)
        run, work = ours.logprobs(p, bench.backend), LogprobsProblem.work(size)
        _measure(bench, f"linear_token_logprobs, {size.case}", run, work, peaks)
    size = bench.head("Qwen2.5-VL-3B", 8192)
    p = make_problem(LogitsProblem, size, bench.device)
    for inplace in (True, False):
        run = ours.logits_loss(p, bench.backend, inplace=inplace)
        _measure(bench, f"grpo_loss, inplace {inplace}", run, LogitsProblem.work(size), peaks)
    q = make_problem(LogitsLogprobsProblem, size, bench.device)
    run, work = ours.logits_logprobs(q, bench.backend), LogitsLogprobsProblem.work(size)
    _measure(bench, "token_logprobs", run, work, peaks)


def _measure(bench: Bench, name: str, run: Run, work: Work, peaks: Peaks) -> None:
    free_memory()
    run.once(bench.device)
    _, memory = peak_memory(run.call, bench.device)
    # A call that writes over its inputs has the same work to do on what it wrote.
    seconds = bench.seconds(run.call)
    if run.reset:
        run.reset()
    kernels = _kernels(run.call, bench.device)
    bench.say(
        name,
        ms=1e3 * seconds,
        of_bound=peaks.seconds(work) / seconds,
        peak_mib=memory >> 20,
        launches=sum(count for count, _ in kernels.values()),
        longest={
            name[:80]: f"{count} in {us / 1e3:.3f} ms"
            for name, (count, us) in list(kernels.items())[:8]
        },
    )


def _kernels(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kernel, the longest first; of operators on a CPU."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    count, spent = Counter[str](), Counter[str]()
    for event in profiler.events() or ():
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            count[event.name] += 1
            spent[event.name] += event.device_time if cuda else event.self_cpu_time_total
    return {name: (count[name], us) for name, us in spent.most_common()}


def tilings(bench: Bench) -> None:
    """The row kernels with other blocks than their own."""
    peaks, own = bench.peaks(), rows_triton._tiling

    def other(loads: int, warps: int, *given: Any) -> Any:
        return own(*given)._replace(repeats=loads, warps=warps)

    p = make_problem(LogitsProblem, bench.head("Qwen2.5-VL-3B", 8192), bench.device)
    assert isinstance(p, LogitsProblem)
    for dtype in (torch.bfloat16, torch.float32):
        tile = p.logits.to(dtype)
        for name, (passes, call) in _row_kernels(bench, p, tile).items():
            for chosen in (None, *_TILINGS):
                words = f"{chosen[0]} loads, {chosen[1]} warps" if chosen else "as it comes"
                with mock.patch.object(
                    rows_triton, "_tiling", partial(other, *chosen) if chosen else own
                ):
                    seconds = bench.seconds(call)
                bound = passes * tile.nbytes / peaks.bytes_per_s
                line = f"{name}, {dtype}, {words}"
                bench.say(line, ms=1e3 * seconds, of_bound=bound / seconds)


def _row_kernels(
    bench: Bench, p: HeadProblem, tile: Tensor
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """How often each has to move the logits, and a call."""
    rows, out = engine(bench.backend).rows, torch.empty_like(tile)
    scoring, each = Scoring(p.targets, None, 1.0, None), torch.ones_like(p.old)
    stats, by = rows.row_stats(tile, scoring), Coefficients(each, None)
    loss = PolicyLoss(), Prepared(each, each, each[:1] > 0), LossInputs(p.cu_seqlens, old=p.old)
    return {
        "row_stats": (1, lambda: rows.row_stats(tile, scoring)),
        "row_gradient": (2, lambda: rows.row_gradient(tile, scoring, stats, by, out)),
        "row_loss": (2, lambda: rows.row_loss(tile, scoring, *loss, out)),
    }


def once(bench: Bench) -> None:
    """The row kernels at full size through the public functions, for ncu."""
    size = bench.head("Qwen2.5-VL-3B", 8192)
    p = make_problem(LogitsProblem, size, bench.device)
    for inplace in (False, True):
        ours.logits_loss(p, bench.backend, inplace=inplace).call()
    ours.logits_logprobs(p, bench.backend).call()
    synchronize(bench.device)
    bench.say("row kernels", done=True)


def tiny(bench: Bench) -> None:
    """Every function once at odd sizes, for compute-sanitizer."""
    size = Head("tiny", 42, 64, 517 if bench.dry else 9001, 2)
    for level in ("token", "sequence"):
        p = make_problem(HeadProblem, size, bench.device, level)
        for extra in ({}, {"chunk_size": 16}, {"softcap": 30.0, "temperature": 0.7}):
            ours.linear_loss(p, bench.backend, **extra).call()
        q = make_problem(LogitsProblem, size, bench.device, level)
        for inplace in (False, True):
            ours.logits_loss(q, bench.backend, inplace=inplace).call()
    ours.logprobs(make_problem(LogprobsProblem, size, bench.device), bench.backend).call()
    rewards, sizes = torch.rand(64, device=bench.device), torch.full((8,), 8, device=bench.device)
    group_advantages(rewards, sizes, backend=bench.backend)
    synchronize(bench.device)
    bench.say("every function", done=True)


def tests(given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """The kernels' own, which take real sizes on a GPU."""
    together = importlib.util.find_spec("xdist") is not None
    processes = [f"--numprocesses={min(14, os.cpu_count() or 1)}"] * together
    report = f"--junitxml={folder / 'tests.xml'}"
    quiet = ["-q", "-p", "no:cacheprovider", "--timeout=300"]
    quiet = quiet if importlib.util.find_spec("pytest_timeout") else quiet[:-1]
    return [[sys.executable, "-m", "pytest", *quiet, *processes, report, "tests/kernels"]]


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


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "correct": correct,
    "operations": operations,
    "tilings": tilings,
    "once": once,
    "tiny": tiny,
}
"""What runs in a process of this file."""
PROGRAMS: dict[str, Callable[[argparse.Namespace, Path], list[list[str]]]] = {
    "tests": tests,
    "host": host,
    "counters": counters,
    "peers": peers,
    "sanitizer": sanitizer,
}
"""What runs in others, by commands."""
ALL = ("ceilings", "correct", "tests", "operations", "tilings", "host", "counters", "peers")
"""The default, in the order of what is needed first."""


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
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    add("--wheels", type=Path, metavar="DIR", help="of peers, as `make bench-wheels` collects them")
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
    folder = device_folder(given.output, about["machine"]) / "first"
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
            return "not run"
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
    lines = json.loads(file.read_text())["lines"] if file.exists() else []
    seconds = round(time.monotonic() - start, 1)
    _write(file, {**about, "outcome": outcome, "seconds": seconds, "lines": lines})
    return outcome


def _inside(name: str, given: argparse.Namespace, file: Path) -> list[str]:
    dry = ["--dry-run"] * given.dry_run
    return [sys.executable, str(Path(__file__).resolve()), name, *dry, f"--inside={file}"]


def _write(file: Path, found: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
