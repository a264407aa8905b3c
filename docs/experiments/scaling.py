"""The computed tables of docs/scaling.md; `python docs/experiments/scaling.py` writes them there again.

Nothing runs: FLOPs and bytes are counted by `perl.training.roofline`, as `perl-rl plan` counts them, and what GPUs send one
another by `seconds_sent` below. docs/scaling.md names the assumptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from perl.config import Config
from perl.recipe import load_recipe, plan
from perl.training.parallel.balancing import Met
from perl.training.roofline.devices import device_named
from perl.training.roofline.model import ModelFacts, model_facts
from perl.training.roofline.step import SHARES, Shape, StepWork

DOC = Path(__file__).parents[1] / "scaling.md"
H100, NODE = device_named("H100", 0, 0, 0), 8
BETWEEN_NODES = 50e9
"""Bytes a second for each GPU: InfiniBand NDR, 400 Gb/s; assumed."""
SEVEN, THREE = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
EASYR1 = {SEVEN: (2000, 120, 0.232), THREE: (1800, 120, 0.081)}
"""assets/baselines.md of v0.3.2, 8 x H100: tokens a second on each GPU, seconds a step, MFU of the update."""
THEIR_PROMPT = (1, 334, 100)
"""Images, visual tokens of one, other tokens; their `min_pixels` of 262,144 are 334 tokens. The text is assumed."""


def recipe(**sections: dict[str, Any]) -> Config:
    """The RL stage of perl-7b with these keys changed."""
    [config] = [stage.config for stage in plan(load_recipe("perl-7b")) if stage.kind == "rl"]
    # What sharding sends is counted here.
    sections["train"] = {"sharding": "none"} | sections.get("train", {})
    changed = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, **changed)


@cache
def facts_of_model(path: str) -> ModelFacts:
    return model_facts(recipe(model={"path": path}))


def model_flops(work: StepWork) -> dict[str, float]:
    """Of a step on one GPU, by stage, as `flops/` in metrics.jsonl counts them."""
    f, prompt = work.facts, work.shape.prompt
    one = Met.of(prompt, work.completions)
    met = Met(*(work.prompts * n for n in one))
    images = Counter({work.shape.tokens_per_image: work.questions * work.shape.images})

    def of(passes: int, gradients: bool, encoded: bool) -> float:
        text = sum(f.text_flops(met, gradients).values())
        return passes * text + f.vision_flops(images, gradients) * encoded

    passes = [part.name for part in work.parts() if part.name.startswith("logprobs/")]
    again = "logprobs/reference's vision" in passes
    return {
        "rollout": of(1, False, True),
        "logprobs": of(len(passes) - again, False, again),
        "update": of(1, True, f.tower_trained),
    }


def seconds(work: StepWork, tail: bool) -> dict[str, float]:
    """Of a step on one GPU, by stage, without what is sent.

    Args:
        tail: the last completions of the rollout are as long as may be, and all GPUs wait for them.
    """
    found = Counter[str]()
    for part in work.parts():
        took = part.seconds(H100)
        if part.name == "rollout/decode" and tail:
            mean, most = work.shape.completion_tokens, work.config.rollout.max_new_tokens
            took *= ((work.rounds - 1) * mean + most) / (work.rounds * mean)
        if part.name != "update/sync":
            found[part.name.partition("/")[0]] += took
    return dict(found)


def seconds_sent(work: StepWork) -> float:
    """What GPUs send one another in a step, nothing of it behind computation.

    Weights of the language model lie in shards over a node and once on each node. Each micro-batch gathers the layers in
    bfloat16 for its forward and again for its backward, embeddings and head once; their gradients are reduce-scattered in
    float32 within the node, and summed over nodes. The tower is on every GPU: its gradient is summed once an update. For the
    rollout all is gathered once.
    """
    f, gpus, rows = work.facts, work.gpus, len(work.row_tokens)
    if gpus == 1:
        return 0.0
    shards = min(NODE, gpus)
    nodes, part = gpus // shards, (shards - 1) / shards
    whole, layers = f.weights - f.tower, f.flops.token
    inside = part * (rows * (2 * (layers + whole) + 4 * whole) + 2 * whole)
    outside = rows * 2 * (nodes - 1) / nodes * 4 * whole / shards
    tower = 2 * (gpus - 1) / gpus * 4 * f.tower_trained_weights
    tower *= work.config.train.updates_per_batch
    link = BETWEEN_NODES if nodes > 1 else H100.link
    return (inside / H100.link + outside / BETWEEN_NODES + tower / link) / SHARES["link"]


def figures(work: StepWork, tail: bool) -> dict[str, float]:
    """Seconds by stage, `sent` and in all (`step`); tokens a second on each GPU in EasyR1's counting; MFU."""
    took, flops = seconds(work, tail), model_flops(work)
    sent = seconds_sent(work)
    step = sum(took.values()) + sent
    rollouts = len(work.completions) * work.prompts
    tokens = rollouts * (work.shape.prompt + work.shape.completion_tokens)
    return {
        **took,
        "sent": sent,
        "step": step,
        "tokens": tokens / step,
        "mfu update": flops["update"] / ((took["update"] + sent) * H100.flops),
        "mfu": sum(flops.values()) / (step * H100.flops),
    }


def beside_easyr1() -> Iterator[str]:
    yield "| | seconds a step | tokens/s/GPU, their counting | MFU of the update | MFU of the step |"
    yield "| --- | --- | --- | --- | --- |"
    for path, (tokens, step, mfu) in EASYR1.items():
        name = path.split("-")[2]
        yield f"| EasyR1, {name}, measured by them | {step} | {tokens:,} | {mfu:.1%} | not given |"
        rollouts = 512 * 5
        length = round(tokens * NODE * step / rollouts)
        images, each, text = THEIR_PROMPT
        shape = Shape(images, each, text, length - images * each - text)
        config = recipe(
            model={"path": path},
            permutation={"orders": 1},
            rollout={"per_order": 5},
            train={"examples_per_step": 512, "updates_per_batch": 4},
        )
        found = figures(StepWork(config, facts_of_model(path), shape, NODE), tail=True)
        yield (
            f"| PeRL, {name}, the same batch, **computed** | {found['step']:.0f} | {found['tokens']:,.0f} | "
            f"{found['mfu update']:.1%} | {found['mfu']:.1%} |"
        )
    found = figures(work_of(NODE, 128), tail=True)
    yield (
        f"| PeRL, `perl-7b` as it is, **computed** | {found['step']:.0f} | {found['tokens']:,.0f} | "
        f"{found['mfu update']:.1%} | {found['mfu']:.1%} |"
    )


def work_of(gpus: int, questions: int) -> StepWork:
    """perl-7b: 6 images of 334 tokens, 150 of text, 2 orders, 6 completions of 1,024 tokens in each."""
    config, facts = recipe(train={"examples_per_step": questions}), facts_of_model(SEVEN)
    return StepWork(config, facts, Shape(6, 334, 150, 1024), gpus)


def scaling(cases: list[tuple[int, int]]) -> Iterator[str]:
    yield "| GPUs | questions | rollout s | log-probs s | update s | sent s | step s | tokens/s/GPU | MFU |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for gpus, questions in cases:
        found = figures(work_of(gpus, questions), tail=True)
        times = " | ".join(
            f"{found[n]:.1f}" for n in ("rollout", "logprobs", "update", "sent", "step")
        )
        yield f"| {gpus:,} | {questions:,} | {times} | {found['tokens']:,.0f} | {found['mfu']:.1%} |"


FIXED = [(n, 128) for n in (1, 8, 16, 32, 64, 128)]
GROWING = [(n, 16 * n) for n in (8, 64, 256, 1024)]


def tables() -> list[str]:
    """In the order of the page."""
    return ["\n".join(rows) for rows in (beside_easyr1(), scaling(FIXED), scaling(GROWING))]


def filled(page: str, new: list[str]) -> str:
    """The page with its computed tables, which are known by their headings, replaced."""
    headings, left = {table.partition("\n")[0] for table in new}, iter(new)
    blocks = page.split("\n\n")
    return "\n\n".join(next(left) if b.partition("\n")[0] in headings else b for b in blocks)


if __name__ == "__main__":
    DOC.write_text(filled(DOC.read_text("utf-8"), tables()), "utf-8")
