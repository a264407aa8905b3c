"""What a call costs the host, beside fifteen eager operators on tensors of the same few elements.

    python -m benchmarks.host_cost [--json FILE]

All take turns; the figures are medians over the turns. Without a GPU the Triton kernels are prepared as for one (sm_90) and not
launched, on tensors of the CPU, so that everything but the launches themselves is in the figure. The other backends
compute on the CPU, so their figures are what the call takes; so are those of the operators, which a GPU's host takes longer for.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine_code
from benchmarks.harness.options import Parser, count, device_of, exit_code
from benchmarks.report.tables import figure, table
from perl.files import write_json
from perl_kernels import (
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    policy_loss,
    token_logprobs,
)
from perl_kernels.dispatch import available_backends

OPERATORS = 15
N, V, H = 64, 128, 32
_CALLS = 10
"""Of a turn."""


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(arguments))


def run(arguments: list[str] | None) -> int:
    given = parse(arguments)
    device = torch.device(device_of(given.device))
    with nullcontext() if device.type == "cuda" else machine_code.pretended(90):
        found = measure(contestants(device), given.rounds, device)
    if given.json:
        write_json(given.json, {"rows": found})
    eager = {row["gradient"]: row["us"] for row in found if row["call"] == "eager"}
    lines = [
        [
            row["call"].replace("eager", f"{OPERATORS} eager operators"),
            row["backend"],
            "forward and backward" if row["gradient"] else "forward",
            figure(row["us"]),
            f"{row['us'] / eager[row['gradient']]:.2f}",
        ]
        for row in found
    ]
    header = ["call", "backend", "", "us", f"of {OPERATORS} operators"]
    print(table(header, lines, words=(0, 1, 2)))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="What a call costs the host.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--rounds", type=count, default=60, metavar="N", help="turns; default: 60")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def measure(
    calls: dict[tuple[str, str, bool], Callable[[], Any]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Microseconds of each call: (name, backend, whether with the backward)."""
    turns: dict[tuple[str, str, bool], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()  # Compiles.
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for key in order:
            call = calls[key]
            call()
            for _ in range(_CALLS):
                # One by one: a longer stretch would often hold a switch to another process.
                start = time.perf_counter()
                call()
                turns[key].append(time.perf_counter() - start)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return [
        {"call": name, "backend": backend, "gradient": gradient, "us": 1e6 * statistics.median(t)}
        for (name, backend, gradient), t in turns.items()
    ]


def contestants(device: torch.device) -> dict[tuple[str, str, bool], Callable[[], Any]]:
    """The operators, and the public functions on every backend."""
    there = {name for name, (can, _) in available_backends().items() if can}
    backends = ["triton", "torch", *["native"] * ("native" in there and device.type == "cpu")]
    found: dict[tuple[str, str, bool], Callable[[], Any]] = {}
    for gradient in (False, True):
        found["eager", "", gradient] = _eager(*_tensors(device, gradient))
        for backend in backends:
            for name, call in _functions(device, gradient, backend).items():
                found[name, backend, gradient] = call
    return found


def _tensors(device: torch.device, gradient: bool) -> tuple[Tensor, ...]:
    """Log-probs [N], others [N], advantages [N], ones [N]."""
    x, old, a = torch.randn(3, N, device=device).unbind()
    return x.requires_grad_(gradient), old, a, torch.ones(N, device=device)


def _eager(x: Tensor, old: Tensor, a: Tensor, ones: Tensor) -> Callable[[], Any]:
    """PPO's clipped loss with a k3 term: fifteen operators."""

    def call() -> Tensor:
        ratio = (x - old).exp()
        policy = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        away = old - x
        k3 = away.exp() - away - 1
        return ((k3 * 0.1 - policy) * ones).sum() / N

    return _stepped(call, x)


def _functions(device: torch.device, gradient: bool, backend: Any) -> dict[str, Callable[[], Any]]:
    x, old, a, _ = _tensors(device, gradient)
    logits, hidden, weight = (
        torch.randn(size, device=device, requires_grad=gradient)
        for size in ((N, V), (N, H), (V, H))
    )
    targets = torch.randint(0, V, (N,), device=device)
    cu_seqlens, sizes = torch.arange(0, N + 1, 8), torch.full((8,), N // 8)
    loss: Any = (a, cu_seqlens, PolicyLoss())
    options: Any = {"old_logprobs": old, "backend": backend}
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "policy_loss": (lambda: policy_loss(x, *loss, **options).loss, [x]),
        "token_logprobs": (
            lambda: token_logprobs(logits, targets, backend=backend).logprobs.sum(),
            [logits],
        ),
        "grpo_loss": (lambda: grpo_loss(logits, targets, *loss, **options).loss, [logits]),
        "linear_grpo_loss": (
            lambda: linear_grpo_loss(hidden, weight, targets, *loss, **options).loss,
            [hidden, weight],
        ),
    }
    found = {name: _stepped(call, *leaves) for name, (call, leaves) in calls.items()}
    if not gradient:
        found["group_advantages"] = lambda: group_advantages(a, sizes, backend=backend)
    return found


def _stepped(call: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """With the backward where there is one."""
    if not leaves[0].requires_grad:
        return call

    def step() -> None:
        call().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


if __name__ == "__main__":
    sys.exit(main())
