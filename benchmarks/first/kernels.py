"""The kernels on their own: ceilings, correctness, times against bounds, tilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.first.bench import Bench
from benchmarks.harness.contest import Refused, Run, Work
from benchmarks.harness.device import Peaks, free_memory, peak_memory, synchronize
from benchmarks.harness.head_problem import (
    Head,
    HeadProblem,
    LogitsLogprobsProblem,
    LogitsProblem,
    LogprobsProblem,
    head,
    make_problem,
)
from benchmarks.providers import ours
from perl_kernels import PolicyLoss, group_advantages, rows_triton
from perl_kernels.dispatch import engine
from perl_kernels.values import Coefficients, LossInputs, Prepared, Scoring

MODELS = ("Qwen3-VL-8B", "Qwen2.5-VL-3B")
"""Heads of 4096 and 2048 features over 151,936 tokens."""
_REPEATS = 6
_POISON = 2**31
"""Bytes of NaN that are freed before a call: what it does not write must not look like a number."""

_TILINGS = tuple((loads, warps) for warps in (4, 8, 16) for loads in (1, 2, 4))
"""Loads of 128 bits and warps of a block."""


def _head_of(bench: Bench, model: str, n: int) -> Head:
    return Head("tiny", 24, 32, 517, 2) if bench.dry else head(model, n, 2)


def ceilings(bench: Bench) -> None:
    """A copy, and the products that the loss consists of, in the dtypes that it could take."""
    peaks = bench.peaks()
    bench.say("copy", tb_per_s=peaks.bytes_per_s / 1e12)
    bench.say("product of squares", tflops=peaks.flops_per_s / 1e12)
    for model in MODELS[:1] if bench.dry else MODELS:
        for n in (8192,) if bench.dry else (4096, 8192):
            size = _head_of(bench, model, n)
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
        size = _head_of(bench, model, 8192)
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
    size = _head_of(bench, "Qwen2.5-VL-3B", 8192)
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

    p = make_problem(LogitsProblem, _head_of(bench, "Qwen2.5-VL-3B", 8192), bench.device)
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
    size = _head_of(bench, "Qwen2.5-VL-3B", 8192)
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
