"""Whether several processes, with weights whole or in shards, take the very steps of one: losses, gradients and weights.

    python -m benchmarks.sharding [OUT.md]

Spawns 1, 2 and 4 processes that talk by gloo. Each takes five steps of the trainer's own `Optimizer` on the same
groups, packed and dealt out by the trainer's own `Session.pack`; the gradients of every step and the weights at the end are held to those of one process. A
difference is ||a - b|| / ||b|| over all trained weights together, in float32; AdamW divides small gradients by
their own size, so that rounding becomes visible in weights whose gradient is nothing but rounding.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

from perl.config import LossConfig, ModelConfig, TrainConfig
from perl.data.tasks import vocabulary
from perl.distributed import Processes, all_processes, shutdown
from perl.model.head import HeadLoss, make_policy_loss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.pack import empty_row, pack_row
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.sharding import Sharding
from perl.model.tiny import make_tiny_model
from perl.training.optimizer import Optimizer, Schedule
from perl.training.session import Session
from perl.types import Message, PackedBatch, Segment

CPU = torch.device("cpu")
MODELS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl")
STEPS = 5
BUDGET = 64
"""Tokens of a row, so that the groups are several."""


@dataclass
class Trace:
    """What some steps computed; the same in all processes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Whole ones, of each step, by the weight's name."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """At the end."""


def segments_of(processor: Processor) -> list[Segment]:
    """Five prompts of zero to three images with three completions each; the fourth has no image."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in ((28, 28), (90, 60), (56, 140))
    ]
    shown = ((0, 1), (1, 0), (2, 0, 1), (), (2,))
    out = []
    for number, images in enumerate(shown):
        text = "<image> " * len(images) + "which image shows two ?"
        prompt = processor.encode_messages((Message("user", text),), [pictures[i] for i in images])
        completions = tuple(rng.integers(20, 60, n) for n in (5, 2, 3))
        out.append(Segment(prompt, completions, (1.0, -0.5, 2.0), number))
    return out


def dealt(segments: Sequence[Segment], processes: int, index: int) -> list[PackedBatch]:
    """A process's rows, one a segment, and empty ones, so that all have equally many."""
    rows = [pack_row([s]) for s in segments[index::processes]]
    most = -(-len(segments) // processes)
    return rows + [empty_row(len(segments[0].prompt.position_ids))] * (most - len(rows))


def packed(policy: Policy, processes: Any, segments: Sequence[Segment]) -> list[PackedBatch]:
    """A process's rows as the trainer makes them of groups of one segment, every n-th of which it holds."""
    session: Any = SimpleNamespace(
        config=SimpleNamespace(train=TrainConfig(tokens_per_micro_batch=BUDGET)),
        components=SimpleNamespace(policy=policy),
        processes=processes,
    )
    own = [[segment] for segment in segments[processes.index :: processes.count]]
    return Session.pack(session, own)[0]


def trace(policy: Policy, accelerator: Any, steps: Sequence[Sequence[PackedBatch]]) -> Trace:
    """Steps on this process's rows of each."""
    train = TrainConfig(lr=1e-3, max_grad_norm=0.0)
    head = HeadLoss(policy, torch.tensor([3]), 1.0)
    stepper = Optimizer(accelerator, head, Schedule(train.lr, "constant", 0, STEPS), train)
    names: dict[torch.Tensor, str] = {p: n for n, p in policy.named_parameters()}
    out = Trace()

    def keep(*_: Any) -> None:
        grads = {names[w]: (w if hasattr(w, "full_tensor") else m).grad for w, m in masters.items()}
        out.gradients.append({n: whole(g) for n, g in grads.items() if g is not None})

    masters = stepper.masters
    stepper.adamw.register_step_pre_hook(keep)
    loss = make_policy_loss(LossConfig(kl_coef=0.0, surrogate="reinforce", dual_clip=0), 64)
    for number, batches in enumerate(steps):
        row = stepper.step(number, batches, loss)
        out.losses.append(row["loss"])
        out.norms.append(row["grad_norm"])
    out.weights = {names[w]: whole(w) for w in masters}
    return out


def whole(tensor: Any) -> torch.Tensor:
    """A copy in float32; all processes take part in that of a sharded one."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().float().clone()


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """||one - other|| / ||other|| over all of them; infinite where one has what the other lacks."""
    names = {n for n, t in one.items() if t.any()} | {n for n, t in other.items() if t.any()}
    if not names <= one.keys() & other.keys():
        return float("inf")
    off = sum(float((one[n] - other[n]).double().square().sum()) for n in names)
    size = sum(float(other[n].double().square().sum()) for n in names)
    return (off / size) ** 0.5 if size else 0.0


def compare(one: Trace, other: Trace) -> dict[str, float]:
    """The largest relative differences of losses, norms, gradients of any step, and of the weights at the end."""
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True)),
        "norm": max(abs(a - b) / abs(b) for a, b in zip(one.norms, other.norms, strict=True)),
        "gradient": max(map(difference, one.gradients, other.gradients)),
        "weights": difference(one.weights, other.weights),
    }


ALONE: Any = SimpleNamespace(num_processes=1, process_index=0, device=CPU)
"""What an optimizer of one process asks of accelerate."""


def spread_over(processes: int, shards: int = 0, **how: Any) -> Sharding:
    """As `train.sharding = fsdp` spreads weights in float32; all processes call it."""
    shards = shards or processes
    shape = (shards,) if shards == processes else (processes // shards, shards)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return Sharding(mesh, **{"dtype": torch.float32, **how})


def load(folder: str, config: ModelConfig, sharding: Sharding | None = None) -> Policy:
    torch.manual_seed(0)  # Of the adapters.
    return load_policy(folder, config, CPU, sharding)


def spawn(processes: int, module: str, *arguments: object) -> None:
    """Run a module in so many processes that know of each other, as torchrun would start them.

    Raises:
        RuntimeError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=os.environ | shared | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in map(str, range(processes))
    ]
    try:
        codes = [process.wait(600) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise RuntimeError(f"exit codes of {module}: {codes}")


def main(out: str) -> None:
    """The table, written to a file too."""
    lines = [
        "| model | trained | tower | processes | weights | loss | gradient norm | gradients | weights after 5 steps |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            make_tiny_model(name, vocabulary(), Path(folder) / name, 0)
        for processes in (2, 4):
            spawn(processes, "benchmarks.sharding", "--worker", folder)
        for file in sorted(Path(folder).glob("*.rows")):
            lines += file.read_text().splitlines()
    text = "\n".join(lines)
    print(text)
    Path(out).write_text(f"{(__doc__ or '').strip()}\n\n{text}\n", encoding="utf-8")


def work(folder: str) -> None:
    """All cases, in one of several processes."""
    processes = all_processes()
    rows = []
    for name in MODELS:
        for rank in (0, 4):
            for frozen in (False, True):
                path = f"{folder}/{name}"
                config = ModelConfig(path=path, lora_rank=rank, freeze_vision=frozen)
                segments = segments_of(load_processor(path, config))
                single = load(path, config)
                alone = trace(single, ALONE, [packed(single, Processes(ALONE), segments)] * STEPS)
                spreads = {"whole": None, "sharded": spread_over(processes.count)}
                if processes.count == 4:
                    spreads["sharded 2 x 2"] = spread_over(4, 2)
                for how, sharding in spreads.items():
                    policy = load(path, config, sharding)
                    mine = [packed(policy, processes, segments)] * STEPS
                    off = compare(trace(policy, processes.accelerator, mine), alone)
                    cells = [
                        name,
                        f"LoRA {rank}" if rank else "all",
                        "frozen" if frozen else "trained",
                        processes.count,
                        how,
                        *(f"{value:.1e}" for value in off.values()),
                    ]
                    rows.append("| " + " | ".join(map(str, cells)) + " |")
    if processes.index == 0:
        Path(folder, f"{processes.count}.rows").write_text("\n".join(rows) + "\n")
    shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main(sys.argv[1] if sys.argv[1:] else "benchmarks/results/sharding.md")
