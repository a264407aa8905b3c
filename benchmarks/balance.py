"""How long processes wait for each other in a step of sharded weights, by the plan of their rows; computed, nothing is run.

    python -m benchmarks.balance [--draws 20]

Completions have lengths as rollouts have them: log-normal around a median of their question, cut at 2,048 tokens. FLOPs are those of
Qwen2.5-VL-7B with a trained tower. In row i all processes wait for the one whose row i is longest; `sums` are rows that
each process packs by itself, after groups moved until all have as much in the step, `rows` those that are planned together.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.harness.options import Parser, count, exit_code
from benchmarks.report.tables import percent, table
from perl.model.packed.plan import Load, plan
from perl.training.parallel.balancing import ModelFlops, balance
from perl.training.parallel.rows import GroupSize, Part, plan_rows, row_flops, rows_in

FLOPS = ModelFlops(
    token=6.525e9,  # 28 layers of 3584 x (2 x 3584 + 2 x 512 + 3 x 18944)
    pair=2.0 * 28 * 28 * 128,
    scored=152_064 * 3584,
    visual=4 * 0.63e9 + 0.045e9,
)
BUDGET = 32_768
LONGEST = 2048

Draw = Callable[[np.random.Generator], list[GroupSize]]


@dataclass(frozen=True)
class Case:
    name: str
    processes: int
    groups: Draw
    budget: int = BUDGET


def groups(held: Sequence[int], rng: np.random.Generator, mixed: bool = False) -> list[GroupSize]:
    """As many of each process, of 2 orders x 6 completions behind 1,700 tokens with 6 images, or behind 1 to 8 images."""
    out = []
    for owner, number in enumerate(held):
        for _ in range(number):
            images = int(rng.integers(1, 9)) if mixed else 6
            median = np.exp(rng.normal(5.9, 0.5))
            lengths = median * np.exp(rng.normal(0.0, 0.8, (2, 6)))
            orders = np.clip(lengths, 8, LONGEST).astype(int).tolist()
            prompt = 100 + 267 * images
            loads = tuple(Load(prompt, tuple(order)) for order in orders)
            out.append(GroupSize(owner, loads, images * 256))
    return out


def few(rng: np.random.Generator) -> list[GroupSize]:
    """A batch that filters have left 0 to 4 groups a process of."""
    return groups(rng.integers(0, 5, 8).tolist(), rng)


CASES = (
    Case("128 questions on 8", 8, lambda rng: groups([16] * 8, rng)),
    Case("the same, rows of 16,384", 8, lambda rng: groups([16] * 8, rng), 16_384),
    Case("128 with 1 to 8 images on 8", 8, lambda rng: groups([16] * 8, rng, mixed=True)),
    Case("36 on 4", 4, lambda rng: groups([9] * 4, rng)),
    Case("one of 8 has none", 8, lambda rng: groups([0] + [16] * 7, rng)),
    Case("0 to 4 groups on each of 8", 8, few),
    Case("5 groups on 8", 8, lambda rng: groups([1] * 5 + [0] * 3, rng)),
    Case("1,024 on 64", 64, lambda rng: groups([16] * 64, rng)),
)


def main() -> int:
    parser = Parser("benchmarks.balance", description="How long processes wait for each other.")
    parser.add_argument("--draws", type=count, default=20, help="batches of each kind (20)")
    options = parser.parse_args()
    lines = [line(case, options.draws) for case in CASES]
    head = ("batch", "groups", "waits: sums", "rows", "time", "moved: sums", "rows", "rows: sums")
    head += ("rows", "plan")
    print(table(head, lines))
    print("waits: % of a step's rows; time: of rows planned together, over that of sums;")
    print(
        "moved: groups, or parts of them; rows: of a process; plan: CPU milliseconds in each process"
    )
    return 0


def line(case: Case, draws: int) -> list[str]:
    """Means over batches; the plan's time is the median."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        sizes = case.groups(rng)
        if not sizes:
            continue
        alone = packed_alone(sizes, case.processes, case.budget)
        started = time.process_time()
        joint = plan_rows(sizes, case.processes, FLOPS, case.budget)
        seconds = time.process_time() - started
        found.append(
            (len(sizes), *measured(sizes, alone, case), *measured(sizes, joint, case), seconds)
        )
    count, waits, longest, moved, rows, waits2, longest2, moved2, rows2, _ = map(
        statistics.mean, zip(*found, strict=True)
    )
    plan_time = 1000 * statistics.median(f[-1] for f in found)
    numbers = (
        f"{moved:.0f}",
        f"{moved2:.0f}",
        f"{rows:.1f}",
        f"{rows2:.1f}",
        f"{plan_time:.0f} ms",
    )
    return [
        case.name, f"{count:.0f}", percent(waits), percent(waits2), f"{longest2 / longest:.2f}", *numbers
    ]  # fmt: skip


def measured(
    sizes: Sequence[GroupSize], parts: Sequence[Part], case: Case
) -> tuple[float, float, float, float]:
    """The share that processes wait, FLOPs of the longest rows, groups that moved and rows of a process."""
    flops = row_flops(sizes, parts, case.processes, FLOPS)
    longest = flops.max(0).sum()
    moved = {(p.group, p.process) for p in parts if p.process != sizes[p.group].owner}
    return 1 - flops.mean(0).sum() / longest, longest, len(moved), rows_in(parts)


def packed_alone(sizes: Sequence[GroupSize], processes: int, budget: int) -> list[Part]:
    """Groups moved until processes have as much, then packed by each as they come."""
    held = [[g for g, size in enumerate(sizes) if size.owner == p] for p in range(processes)]
    owners = balance([[cost(sizes[g]) for g in own] for own in held])
    moved: list[list[int]] = [[] for _ in range(processes)]
    for own, to in zip(held, owners, strict=True):
        for g, process in zip(own, to, strict=True):
            moved[process].append(g)
    parts = []
    for process, own in enumerate(moved):
        segments = [(g, i) for g in own for i in range(len(sizes[g].loads))]
        loads = [replace(sizes[g].loads[i], group=g) for g, i in segments]
        for row, shares in enumerate(plan(loads, budget)):
            for share in shares:
                g, i = segments[share.segment]
                parts.append(Part(g, (replace(share, segment=i),), process, row))
    return parts


def cost(size: GroupSize) -> float:
    return sum(FLOPS.text(x.prompt, x.completions) for x in size.loads) + size.visual * FLOPS.visual


if __name__ == "__main__":
    sys.exit(exit_code(main))
