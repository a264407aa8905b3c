"""What the operations should take on an H200: computed, from operations, bytes and instructions. Nothing is measured on a GPU.

    python -m benchmarks.expected [--write docs/kernels.md]

Instructions are counted in the machine code of what the public functions launch (`machine_code.py`), launches in a call of
theirs, bytes and operations by hand here; what is assumed of the machine is `MACHINE`, and stands below the table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine_code
from benchmarks.harness.options import Parser, exit_code
from benchmarks.report.tables import figure, table
from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from perl_kernels.head import block_rows

N, V, WIDTHS = 8192, 151_936, (4096, 2048)
"""In bfloat16."""
HEADING = "## What it should take on an H200"


class Machine(NamedTuple):
    """An H200, as assumed."""

    flops: float = 790e12
    """A second, of a large product."""
    products: float = 0.97
    """Of that, in the products of a loss."""
    bandwidth: float = 4.3e12
    """Bytes a second, of a large copy."""
    instructions: float = 0.8 * 132 * 128 * 1.755e9
    """A second: lanes of 132 multiprocessors at 1.755 GHz, which issue four times in five."""
    again: float = 0.5
    """The share of a row's second reading that memory serves and the second-level cache does not."""
    launch: float = 4e-6
    """Seconds of a launch that is neither a product nor a sweep over logits."""
    memory: int = 139 * 2**30


MACHINE = Machine()


class Instructions(NamedTuple):
    """For each element of a row of logits, in the two loops over it."""

    stats: float
    gradient: float


class Cost(NamedTuple):
    """Of launches one after the other."""

    seconds: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def __add__(self, other: Any) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def product(n: int, h: int, wide: int = 0) -> Cost:
    """One of the three products of n rows. `wide`: bytes more for sums in fp32, half of them hidden behind the work."""
    work = 2 * n * h * V / (MACHINE.products * MACHINE.flops)
    moved = 2 * (n * h + h * V + n * V)
    seconds = max(work, moved / MACHINE.bandwidth) + wide / 2 / MACHINE.bandwidth
    return Cost(seconds, moved + wide, 1)


def sweep(n: int, passes: float, instructions: float) -> Cost:
    """Over n rows of logits, which are moved `passes` times."""
    moved = 2 * passes * n * V
    issued = instructions * n * V / MACHINE.instructions
    return Cost(max(moved / MACHINE.bandwidth, issued), moved, 1)


def operations(i: Instructions, launches: dict[str, int]) -> dict[str, tuple[float, Cost]]:
    """Seconds of the bound, and the cost, of each operation.

    Args:
        launches: all of each operation; those beyond products and sweeps are counted by `MACHINE.launch`.
    """
    stats, gradient = sweep(N, 1, i.stats), sweep(N, 2, i.gradient)
    read = 2 * N * V / MACHINE.bandwidth
    found = {
        "token_logprobs, forward": (read, stats),
        "token_logprobs, backward": (2 * read, gradient),
        "grpo_loss": (2 * read, stats + gradient),
        "grpo_loss, in place": (2 * read, _stats_and_gradient(N, i)),
    }
    for h in WIDTHS:
        flops = 2 * N * h * V / MACHINE.flops
        forward, hidden, weight = Cost(), Cost(), Cost()
        for number, n in enumerate(blocks()):
            forward += product(n, h) + sweep(n, 1, i.stats)
            hidden += product(n, h) + _stats_and_gradient(n, i) + product(n, h)
            sums = 0 if len(blocks()) == 1 else 8 if number else 4
            weight += product(n, h, sums * h * V)
        if len(blocks()) > 1:  # From fp32 to the dtype of the head.
            weight += Cost(6 * h * V / MACHINE.bandwidth, 6 * h * V, 1)
        found[f"linear_token_logprobs, forward, H = {h}"] = (flops, forward)
        found[f"linear_grpo_loss, frozen head, H = {h}"] = (2 * flops, hidden)
        found[f"linear_grpo_loss, H = {h}"] = (3 * flops, hidden + weight)
    for name, (bound, cost) in found.items():
        more = max(0, launches[name.partition(", H")[0]] - cost.launches)
        found[name] = bound, cost + Cost(more * MACHINE.launch, 0.0, more)
    return found


def _stats_and_gradient(n: int, i: Instructions) -> Cost:
    """In one launch, the second reading in part from the cache."""
    return sweep(n, 2 + MACHINE.again, i.stats + i.gradient)


def blocks() -> list[int]:
    """Rows of each block of N on this machine, as the functions choose them."""
    budget = MACHINE.memory // 32
    rows = block_rows(N, V, torch.bfloat16, torch.device("cpu"), memory_budget=budget)
    return [min(rows, N - start) for start in range(0, N, rows)]


def counted() -> tuple[Instructions, dict[str, int]]:
    """Of the functions as they are, compiled for an H200 and not launched; few rows in as many blocks."""
    n, h = 8 * len(blocks()), 16
    dtype, chunk_size = torch.bfloat16, 8
    logits, hidden, weight = (
        torch.zeros(size, dtype=dtype, requires_grad=True) for size in ((n, V), (n, h), (V, h))
    )
    targets, upstream = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    backend: Any = {"backend": "triton"}
    loss: Any = (torch.zeros(2), torch.tensor([0, n // 2, n]), PolicyLoss())
    options: Any = {"old_logprobs": torch.zeros(n), **backend}
    linear: Any = {"chunk_size": chunk_size, **options}
    frozen = weight.detach()

    def logprobs() -> Any:
        return token_logprobs(logits, targets, **backend).logprobs

    calls: dict[str, Callable[[], Any]] = {
        "token_logprobs, forward": logprobs,
        "token_logprobs, forward and backward": lambda: logprobs().backward(upstream),
        "grpo_loss": lambda: grpo_loss(logits, targets, *loss, **options).loss.backward(),
        "grpo_loss, in place": lambda: grpo_loss(
            logits, targets, *loss, inplace=True, **options
        ).loss.backward(),
        "linear_token_logprobs, forward": torch.no_grad()(
            lambda: linear_token_logprobs(hidden, weight, targets, chunk_size=chunk_size, **backend)
        ),
        "linear_grpo_loss, frozen head": lambda: linear_grpo_loss(
            hidden, frozen, targets, *loss, **linear
        ).loss.backward(),
        "linear_grpo_loss": lambda: linear_grpo_loss(
            hidden, weight, targets, *loss, **linear
        ).loss.backward(),
    }
    with machine_code.pretended(90) as launched:
        found = {name: _launches(call, launched) for name, call in calls.items()}
        both = found.pop("token_logprobs, forward and backward")
        found["token_logprobs, backward"] = both - found["token_logprobs, forward"]
        launched.clear()
        calls["grpo_loss, in place"]()
    (code,) = (
        machine_code._read(launch.compiled, launch.elements, 90)["loops"]
        for launch in launched
        if launch.kernel == "row_loss_kernel"
    )
    return Instructions(*(loop.instructions for loop in code)), found


def _launches(call: Callable[[], Any], launched: list[Any]) -> int:
    """Triton's, and operators of PyTorch that do something and have none such within them."""
    call()  # The first one in a process does more.
    launched.clear()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler announces itself on stderr.
    profiler: Any = torch.autograd.profiler.profile()
    with profiler:
        call()
    events = [event for event in profiler.function_events if event.cpu_parent is None]
    return len(launched) + sum(map(_working, events))


_FREE = frozenset(
    [
        "alias",
        "as_strided",
        "detach",
        "detach_",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "item",
        "is_nonzero",
        "lift_fresh",
        "narrow",
        "ne",
        "_local_scalar_dense",
        "new_empty",
        "numpy_T",
        "permute",
        "reshape",
        "resolve_conj",
        "resolve_neg",
        "result_type",
        "select",
        "set_",
        "slice",
        "split",
        "squeeze",
        "t",
        "to",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "view_as",
    ]
)
"""Operators that launch nothing; what `ne` compares is on the host."""
_CPU = ("aten::min", "aten::max", "aten::diff", "torch::autograd::AccumulateGrad")
"""What is done with values of CPU tensors only, and what adds to the gradients of the call before."""


def _working(event: Any) -> int:
    if event.name in _CPU:
        return 0
    within = sum(map(_working, event.cpu_children))
    operator = event.name.startswith("aten::") and event.name[6:] not in _FREE
    return within or int(operator)


def markdown(i: Instructions, launches: dict[str, int]) -> str:
    lines = [
        [
            name,
            str(cost.launches),
            figure(cost.bytes / 1e9),
            figure(1e3 * cost.seconds),
            figure(1e3 * bound),
            figure(100 * bound / cost.seconds),
        ]
        for name, (bound, cost) in operations(i, launches).items()
    ]
    return table(["computed, not measured", "launches", "GB", "ms", "bound", "%"], lines)


def assumptions(i: Instructions) -> str:
    m = MACHINE
    return (
        f"N = {N:,}, V = {V:,}, bfloat16, {len(blocks())} block(s). Assumed of an H200: {m.flops / 1e12:.0f} TFLOP/s of a large "
        f"product, {m.products:.0%} of it in these; {m.bandwidth / 1e12} TB/s of a copy; {m.instructions / 1e12:.1f} tera "
        f"instructions a second; {m.again:.0%} of a row's second reading from memory; {1e6 * m.launch:.0f} us for every launch that "
        f"is neither a product nor a row kernel. Counted in the machine code: {i.stats:.1f} instructions an element for the "
        f"statistics and {i.gradient:.1f} for the gradient. The bound: operations at the first rate, or logits read and gradients "
        "written once at the second."
    )


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(arguments))


def run(arguments: list[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.expected", description="Computed times on an H200.")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace the table in it")
    given = parser.parse_args(arguments)
    found = counted()
    text = f"{markdown(*found)}\n\n{assumptions(found[0])}\n"
    if given.write:
        document = given.write.read_text()
        before, heading, rest = document.partition(f"{HEADING}\n")
        _, after, others = rest.partition("\n## ")
        given.write.write_text(f"{before}{heading}\n{text}{after}{others}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
