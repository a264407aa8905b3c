"""What two processes with sharded weights compute, beside one process: run by tests/model/test_sharding.py in each of them.

python -m tests.model.sharded MODELS OUT writes findings by name as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from benchmarks.sharding import (
    ALONE,
    Trace,
    compare,
    dealt,
    difference,
    load,
    packed,
    segments_of,
    spread_over,
    trace,
    whole,
)
from perl.config import LossConfig, ModelConfig, TrainConfig
from perl.distributed import Processes, all_processes, shutdown
from perl.model.head import HeadLoss, make_policy_loss
from perl.model.layers import uncompiled
from perl.model.loading import load_processor
from perl.model.packed.pack import empty_row
from perl.model.sharding import gathered
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.training.optimizer import Optimizer, Schedule
from perl.training.saving.checkpoint import CheckpointManager, Progress

PROCESSES = all_processes()
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all weights": ("tiny-qwen2.5-vl", {}, {}),
    "weights whole": ("tiny-qwen2.5-vl", {}, {"whole": True}),
    "adapters": ("tiny-qwen2.5-vl", {"lora_rank": 4, "freeze_vision": True}, {}),
    "adapters, tower": ("tiny-qwen3-vl", {"lora_rank": 4}, {"vision": True}),
    "all, tower": ("tiny-internvl", {"gradient_checkpointing": 0.5}, {"vision": True}),
    "frozen tower": (
        "tiny-qwen3-vl",
        {"freeze_vision": True},
        {"vision": True, "reshard_after_forward": False},
    ),
}
"""Model, what of it is trained, and how it is sharded."""


def steps_of(policy: Any, segments: list[Any], processes: Any) -> list[Any]:
    """All segments; then one completion, which one process has and the others nothing; then one segment for the first process,
    and for the last one without images."""
    one = replace(
        segments[0], completions=segments[0].completions[:1], advantages=segments[0].advantages[:1]
    )
    bare, shown = (dealt(segments[a:b], 1, 0) for a, b in ((3, 4), (4, 5)))
    return [
        packed(policy, processes, segments),
        packed(policy, processes, [one]),
        shown + bare if processes.count == 1 else bare if processes.index else shown,
    ]


def traced(models: str, name: str, alone: bool) -> Trace:
    """Of one process, or of all of them."""
    model, trained, how = CASES[name]
    config = ModelConfig(path=f"{models}/{model}", **trained)
    segments = segments_of(load_processor(config.path, config))
    sharding = None if alone or how.get("whole") else spread_over(PROCESSES.count, **how)
    policy = load(config.path, config, sharding)
    accelerator = ALONE if alone else PROCESSES.accelerator
    return trace(policy, accelerator, steps_of(policy, segments, Processes(accelerator)))


def rollouts(models: str) -> dict[str, Any]:
    """Of a policy before and after an optimizer step, in processes that ask for different prompts and lengths."""
    config = ModelConfig(path=f"{models}/tiny-qwen2.5-vl")
    processor = load_processor(config.path, config)
    segments = segments_of(processor)
    prompts = [s.prompt for s in segments]
    params = SamplingParams(n=2, max_new_tokens=3 + 6 * PROCESSES.index, temperature=1.0)
    policies = [load(config.path, config, s) for s in (None, spread_over(PROCESSES.count))]
    plain, sharded = policies
    tower = len(sharded.vision.weights)
    found: dict[str, Any] = {"tokens": [], "whole": [], "left": []}
    for _ in range(2):
        told = []
        for policy in policies:
            with gathered(policy), gathered(policy):  # The last one is sharded.
                engine = InProcessEngine(policy, processor, 4096)
                mine = prompts[: 2 * PROCESSES.index]  # The first process has none.
                made = engine.generate(mine, params, 7)
                told.append([c.token_ids.tolist() for own in made for c in own])
                weights = list(policy.parameters())
        found["tokens"].append(told[0] == told[1])
        shards = [w for w in weights if w not in set(sharded.vision.weights)]
        found["whole"].append(sum(w.numel() for w in shards))
        found["left"].append(sum(w.untyped_storage().nbytes() for w in shards))
        with suppress(ZeroDivisionError), gathered(sharded):
            failing = sharded.core.language_model.norm.register_forward_hook(lambda *_: 1 / 0)
            sharded(empty_row(3))
        failing.remove()
        found["noted"] = len(sharded._get_fsdp_state()._comm_ctx.post_forward_order)
        found["whole after an error"] = (
            sum(not isinstance(w, DTensor) for w in sharded.parameters()) - tower
        )
        same = trace(plain, ALONE, [dealt(segments, 1, 0)])
        mine = [dealt(segments, PROCESSES.count, PROCESSES.index)]
        found["after"] = compare(trace(sharded, PROCESSES.accelerator, mine), same)
    return found


def resumed(models: str, kind: Any, folder: Path) -> dict[str, Any]:
    """A second step behind a checkpoint that is being written: the very weights of it again, and those of one process."""
    config = ModelConfig(path=f"{models}/tiny-qwen2.5-vl")
    segments = segments_of(load_processor(config.path, config))
    train = TrainConfig(lr=1e-3, optimizer=kind)
    manager = CheckpointManager(folder / kind, 1, PROCESSES, asynchronous=True)
    loss = make_policy_loss(LossConfig(kl_coef=0.0, surrogate="reinforce", dual_clip=0), 64)

    def second(accelerator: Any, sharding: Any, path: Path | None = None) -> dict[str, Any]:
        """Whole weights and state behind it; without a checkpoint it is written in between."""
        processes, index = accelerator.num_processes, accelerator.process_index
        policy = load(config.path, config, sharding)
        head, schedule = HeadLoss(policy, torch.tensor([3]), 1.0), Schedule(1e-3, "constant", 0, 2)
        optimizer = Optimizer(accelerator, head, schedule, train)
        if path is None:
            optimizer.step(0, dealt(segments, processes, index), loss)
            manager.save(policy, optimizer, Progress("rl", 1))
        else:
            manager.restore_model(path, policy)
            manager.restore_optimizer(path, policy, optimizer)
        optimizer.step(1, dealt(segments[:3], processes, index), loss)
        manager.wait()
        tensors = {name: p.detach() for name, p in policy.named_parameters()}
        return {name: whole(t) for name, t in (tensors | optimizer.state()).items()}

    how = spread_over(PROCESSES.count, vision=True)
    expected = second(PROCESSES.accelerator, how)
    path = folder / kind / "step-1"
    again, alone = second(PROCESSES.accelerator, how, path), second(ALONE, None, path)
    weights = [{n: t for n, t in each.items() if "/" not in n} for each in (alone, expected)]
    return {
        "same": sum(torch.equal(again[name], tensor) for name, tensor in expected.items()),
        "all": len(expected),
        "in 8 bits": sum("codes" in name for name in expected),
        "alone": difference(*weights),
    }


def main(models: str, out: Path) -> None:
    found: dict[str, Any] = {}
    # What one process computes is dealt out.
    own = list(CASES)[PROCESSES.index :: PROCESSES.count]
    dealt_out = PROCESSES.gather([{name: traced(models, name, alone=True) for name in own}])
    alone = {name: of_one for part in dealt_out for name, of_one in part.items()}
    for name in CASES:
        together = traced(models, name, alone=False)
        found[name] = compare(together, alone.pop(name)) | {"gradients": len(together.gradients[0])}
    found["rollouts"] = rollouts(models)
    for kind in ("adamw", *(["adamw_8bit"] if find_spec("torchao") else [])):
        with uncompiled():
            found[kind] = resumed(models, kind, out.parent)
    every = PROCESSES.gather([found])
    if PROCESSES.index == 0:
        out.write_text(json.dumps(every))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
