"""What two processes with sharded weights compute, beside one process: run by tests/model/test_sharding.py in each of them.

python -m tests.model.sharded MODELS OUT writes findings by name as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from benchmarks.sharding import (
    ALONE,
    Trace,
    compare,
    dealt,
    load,
    packed,
    segments_of,
    spread_over,
    trace,
)
from perl.config import ModelConfig
from perl.distributed import Processes, all_processes, shutdown
from perl.model.loading import load_processor
from perl.model.packed.pack import empty_row
from perl.model.sharding import gathered
from perl.rollout.engine import InProcessEngine, SamplingParams

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


def traced(models: str, name: str) -> tuple[Trace, Trace]:
    """Of the two processes, and of one."""
    model, trained, how = CASES[name]
    config = ModelConfig(path=f"{models}/{model}", **trained)
    segments = segments_of(load_processor(config.path, config))
    single = load(config.path, config)
    alone = trace(single, ALONE, steps_of(single, segments, Processes(ALONE)))
    sharding = None if how.get("whole") else spread_over(PROCESSES.count, **how)
    policy = load(config.path, config, sharding)
    mine = steps_of(policy, segments, PROCESSES)
    return trace(policy, PROCESSES.accelerator, mine), alone


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


def main(models: str, out: Path) -> None:
    found: dict[str, Any] = {}
    for name in CASES:
        pair = traced(models, name)
        found[name] = compare(*pair) | {"gradients": len(pair[0].gradients[0])}
    found["rollouts"] = rollouts(models)
    every = PROCESSES.gather([found])
    if PROCESSES.index == 0:
        out.write_text(json.dumps(every))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
