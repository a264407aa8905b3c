"""`perl-rl plan`: the counts of a recipe's step as tables, beside what a run has measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from perl.config import Command, Config, Count, NotNegative, Positive
from perl.files import RunFolder, read_rows, write_json
from perl.recipe import DEFAULT_RECIPE, check_options, plan
from perl.types import UserError


@dataclass(frozen=True)
class PlanSteps(Command):
    """What a step of a recipe takes on a GPU that need not be here: operations, bytes, launches, waits and time by stage,
    and memory. All of it is computed from the model's sizes; nothing is downloaded and nothing runs. Every key of the recipe can be
    overridden, as in `perl-rl plan perl-7b --steps-of H100 --gpus 8 --model.lora-rank 64`."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    steps_of: str = "H200"
    """The GPU: B200, H200, H100, A100-80, A100-40, L40S, "RTX 4090", or any name with the three figures that follow."""
    gpus: Positive = 1
    """How many of them share a step."""
    tflops: NotNegative = 0.0
    """Dense bfloat16 products a second, in 1e12, of another GPU; 0: as known."""
    tb_per_s: NotNegative = 0.0
    """Its memory's bandwidth, in 1e12 bytes a second."""
    gb: NotNegative = 0.0
    """Its memory, in 1e9 bytes."""
    images: Positive = 6
    """Images of a question."""
    tokens_per_image: Count = 0
    """Visual tokens of one; 0: as many as model.max_pixels allows."""
    text_tokens: Count = 150
    """Other tokens of a prompt."""
    completion_tokens: Count = 0
    """Mean tokens of a completion; 0: half of rollout.max_new_tokens."""
    run: Path | None = None
    """A run folder, whose measured seconds a step are shown beside."""
    json: Path | None = None
    """Write all figures to this file, too."""

    def execute(self) -> None:
        from perl.training.roofline.devices import device_named
        from perl.training.roofline.model import model_facts
        from perl.training.roofline.step import Shape, StepWork

        check_options(self)
        device = device_named(self.steps_of, self.tflops, self.tb_per_s, self.gb)
        stages = [stage.config for stage in plan(self.config) if stage.kind == "rl"]
        if not stages:
            raise UserError(f"recipe {self.recipe} has no stage of kind rl; add one")
        facts, measured = model_facts(stages[0]), _measured(self.run)
        shape = Shape(
            self.images,
            self.tokens_per_image or facts.tokens_of(stages[0].model.max_pixels),
            self.text_tokens,
            self.completion_tokens or max(1, stages[0].rollout.max_new_tokens // 2),
        )
        found = figures(StepWork(stages[0], facts, shape, self.gpus), device)
        if measured:
            found["measured"] = measured
        if self.json:
            write_json(self.json, found)
        show(found, f"{Path(self.recipe).name}, {stages[0].model.path}")


def figures(work: Any, device: Any) -> dict[str, Any]:
    """Everything, as it is shown and written: `stages`, `memory`, `advice`, `assumptions`."""
    from perl.training.roofline.memory import advice, memory

    parts, kept = work.parts(), memory(work, device)
    always = sum(kept["always"].values())
    return {
        "computed": True,
        "device": asdict(device),
        "gpus": work.gpus,
        "shape": asdict(work.shape),
        "stages": {
            part.name: {
                "flops": part.flops,
                "bytes": part.bytes,
                "launches": part.launches,
                "host_waits": part.waits,
                "seconds": part.seconds(device),
            }
            for part in parts
        },
        "seconds": sum(part.seconds(device) for part in parts),
        "tokens": {"prompt": work.shape.prompt, "packed": work.tokens, "scored": work.scored},
        "sequences_together": work.slots[0] * work.slots[1],
        "memory": kept,
        "peak_bytes": {name: always + sum(kept[name].values()) for name in ("rollout", "update")},
        "advice": advice(work, device, kept),
        "assumptions": list(_assumptions(work)),
    }


def _assumptions(work: Any) -> Iterator[str]:
    from perl.training.roofline import memory, step

    shape = work.shape
    yield (
        f"{work.questions} questions a GPU, {shape.images} images of {shape.tokens_per_image} tokens and "
        f"{shape.text_tokens} of text each, {work.orders} orders, {len(work.completions)} completions an order of "
        f"{shape.completion_tokens} tokens: all alike; no refills, replay or evaluation"
    )
    shares = ", ".join(f"{kind} {share}" for kind, share in step.SHARES.items())
    yield f"shares of the device's rates that are reached: {shares}"
    yield (
        f"operations of a layer's forward: {step.LAUNCHES['fused' if work.fused else 'eager']}, of decoding "
        f"{step.LAUNCHES['decode']}; {step.LAUNCH_SECONDS * 1e6:.0f} us of the host each"
    )
    yield (
        f"decoding: {work.slots[0]} slots of {work.slots[1]} completions within rollout.kv_cache_tokens, filled "
        f"{work.rounds} times; a prompt's keys and values are read once a step; the host waits every {step.STEPS_A_WAIT} "
        "steps; each operation is launched, as without CUDA graphs"
    )
    yield "weights, keys, values and activations in bfloat16; masters, moments and gradients in fp32"
    yield (
        "norms, SwiGLU and rotary embeddings "
        + ("fused (model.compile, model.liger)" if work.fused else "as transformers has them")
        + f"; {work.checkpointed:.0%} of the layers computed again in the backward"
    )
    yield f"{memory.RESERVED / 1e9:.0f} GB for the driver, kernels and what the allocator cannot use"
    yield "rewards, reading pictures and packing take the GPU no time"


def _measured(run: Path | None) -> dict[str, float]:
    """Median seconds a step by `time/<name>` in a run's metrics.

    Raises:
        UserError: it has none.
    """
    from statistics import median

    if run is None:
        return {}
    rows = [row for row in read_rows(RunFolder(run).metrics) if row.get("stage") == "rl"]
    names = dict.fromkeys(k for row in rows for k in row if k.startswith("time/"))
    names.pop("time/elapsed", None)
    if not names:
        raise UserError(
            f"--run {run}: it has no RL steps in metrics.jsonl; name a run folder that has"
        )
    return {n.removeprefix("time/"): median(row.get(n, 0.0) for row in rows) for n in names}


def show(found: dict[str, Any], title: str) -> None:
    from perl.report.tables import print_table

    device, measured = found["device"], found.get("measured", {})
    heading = ["computed, not measured", "TFLOP", "GB", "launches", "waits", "s"]
    rows = [heading + ["measured s"] * bool(measured)]

    def add(label: str, stages: list[dict[str, float]], seen: str = "") -> None:
        total = {key: sum(s[key] for s in stages) for key in stages[0]}
        cells = [f"{total['flops'] / 1e12:.1f}", f"{total['bytes'] / 1e9:.1f}"]
        cells += [f"{total['launches']:.0f}", f"{total['host_waits']:.0f}"]
        cells += [f"{total['seconds']:.3f}"] + [seen] * bool(measured)
        rows.append([label, *cells])

    stages, rules = found["stages"], []
    for group in dict.fromkeys(name.partition("/")[0] for name in stages):
        inside = [name for name in stages if name.startswith(f"{group}/")]
        seen = f"{measured[group]:.3f}" if group in measured else "-"
        add(group, [stages[name] for name in inside], seen)
        for name in inside:
            add(f"  {name.partition('/')[2]}", [stages[name]])
    rules.append(len(rows))
    add("step", list(stages.values()), f"{measured['step']:.3f}" if "step" in measured else "-")
    gpus = f"{found['gpus']} x " * (found["gpus"] > 1)
    print_table(rows, f"{title}: a step on each of {gpus}{device['name']}", rules=rules)

    kept = found["memory"]
    table = [["computed, not measured", "GB"]]
    for part, named in (("always", "always there"), ("rollout", "rollout"), ("update", "update")):
        total = sum(kept[part].values()) if part == "always" else found["peak_bytes"][part]
        label = named if part == "always" else f"peak of the {named}"
        table.append([label, f"{total / 1e9:.1f}"])
        table += [[f"  {name}", f"{n / 1e9:.1f}"] for name, n in kept[part].items() if n]
    print_table(table, f"memory, of {device['memory'] / 1e9:.0f} GB")
    for line in found["advice"]:
        print(f"- {line}")
    print(f"assumed: {device['name']}: {device['source']}")
    for line in found["assumptions"]:
        print(f"  {line}")
