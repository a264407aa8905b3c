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
    """What a step of a recipe takes on GPUs that need not be here: memory by what it is for, whether it fits, and which key
    to change if not; with --steps-of also operations, bytes, launches, waits and time by stage. All of it is computed from
    the model's sizes; nothing is downloaded and nothing runs. Every key of the recipe can be overridden, as in
    `perl-rl plan perl-7b --gpus 8 --memory 80 --model.lora-rank 64`."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    memory: NotNegative = 0.0
    """Of one GPU, in 1e9 bytes; 0: that of --steps-of."""
    steps_of: str = ""
    """The GPU that times are computed for: B200, H200, H100, A100-80, A100-40, L40S, "RTX 4090", or any name with --tflops,
    --tb-per-s and --memory; empty: no times, but without --memory an H200."""
    gpus: Positive = 1
    """How many of them share a step."""
    gpus_per_node: Positive = 8
    """How many of them one node has."""
    tflops: NotNegative = 0.0
    """Dense bfloat16 products a second, in 1e12, of another GPU; 0: as known."""
    tb_per_s: NotNegative = 0.0
    """Its memory's bandwidth, in 1e12 bytes a second."""
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
    picture: Path | None = None
    """Draw the memory by stage into this PNG file."""

    def execute(self) -> None:
        from perl.training.roofline.devices import device_named
        from perl.training.roofline.model import model_facts
        from perl.training.roofline.step import Shape, StepWork

        check_options(self)
        named = self.steps_of or ("" if self.memory else "H200")
        device = device_named(named, self.tflops, self.tb_per_s, self.memory) if named else None
        stages = [stage.config for stage in plan(self.config) if stage.kind == "rl"]
        if not stages:
            raise UserError(f"recipe {self.recipe} has no stage of kind rl; add one")
        facts, measured = model_facts(stages[0]), _measured(self.run)
        if facts.itemsize > 2 and self.steps_of:
            raise UserError("--steps-of: times are of bfloat16; leave model.dtype = float32 out")
        shape = Shape(
            self.images,
            self.tokens_per_image or facts.tokens_of(stages[0].model.max_pixels),
            self.text_tokens,
            self.completion_tokens or max(1, stages[0].rollout.max_new_tokens // 2),
        )
        work = StepWork(stages[0], facts, shape, self.gpus, self.gpus_per_node)
        found = figures(work, device.memory if device else self.memory * 1e9)
        if device and facts.itemsize == 2:
            found |= times(work, device)
        if measured:
            found["measured"] = measured
        if self.json:
            write_json(self.json, found)
        title = f"{Path(self.recipe).name}, {stages[0].model.path}"
        if self.picture:
            from perl.training.roofline.picture import draw

            draw(found, title, self.picture)
        show(found, title)


def figures(work: Any, capacity: float) -> dict[str, Any]:
    """What is shown and written of memory, in GPUs of so many bytes, and of what a step is."""
    from perl.training.roofline.advice import first_that_fits, peak_of, without_change
    from perl.training.roofline.memory import memory, on_host

    kept = memory(work, capacity)
    change = first_that_fits(work, capacity)
    return {
        "computed": True,
        "gpus": work.gpus,
        "shape": asdict(work.shape),
        "tokens": {"prompt": work.shape.prompt, "packed": work.tokens, "scored": work.scored},
        "sequences_together": work.slots[0] * work.slots[1],
        "memory": kept,
        "memory_of_gpu": capacity,
        "peak_bytes": {stage: sum(parts.values()) for stage, parts in kept.items()},
        "fits": peak_of(kept) <= capacity,
        "change": asdict(change) if change else None,
        "without_change": without_change(work, capacity),
        "host": on_host(work),
        "notes": list(_notes(work)),
        "assumptions": list(_assumptions(work)),
    }


def times(work: Any, device: Any) -> dict[str, Any]:
    """The same of what is computed and moved, and how long that takes a device at least."""
    parts = work.parts()
    return {
        "device": asdict(device),
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
        "assumptions": [*_assumptions(work), *_assumptions_of_times(work)],
    }


def _notes(work: Any) -> Iterator[str]:
    f, config = work.facts, work.config
    tokens = work.questions * work.shape.images * work.shape.tokens_per_image
    if f.itemsize * f.hidden * f.features * tokens >= config.model.feature_cache_mb * 2**20:
        yield (
            f"model.feature_cache_mb = {config.model.feature_cache_mb} holds less than a step's images: raise it, or they go "
            "through the tower again in each pass, which is not in the times"
        )


def _assumptions(work: Any) -> Iterator[str]:
    from perl.training.roofline import memory

    shape = work.shape
    yield (
        f"{work.questions} questions a GPU, {shape.images} images of {shape.tokens_per_image} tokens and "
        f"{shape.text_tokens} of text each, {work.orders} orders, {len(work.completions)} completions an order of "
        f"{shape.completion_tokens} tokens: all alike; no refills, replay or evaluation"
    )
    narrow = work.facts.itemsize == 2
    yield f"weights, keys, values and activations in {'bfloat16; masters, moments and gradients in ' * narrow}fp32"
    if work.shards > 1:
        yield (
            f"{work.shards} GPUs hold a copy of the weights together; whole weights are gathered for the rollout and the "
            "log-probs, two layers and what lies around them for the update"
        )
    yield f"{work.checkpointed:.0%} of the layers computed again in the backward"
    yield f"{memory.RESERVED / 1e9:.0f} GB for the driver, kernels and what the allocator cannot use"
    yield f"on the host {memory.PROCESS / 1e9:.0f} GB for each process"


def _assumptions_of_times(work: Any) -> Iterator[str]:
    from perl.training.roofline import step

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
    yield (
        "norms, SwiGLU and rotary embeddings "
        + ("fused (model.compile, model.liger)" if work.fused else "as transformers has them")
    )
    if work.gpus > 1:
        yield "what GPUs send one another takes its time alone, as if nothing were computed meanwhile"
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

    if "stages" in found:
        _show_times(found, title)
    kept = found["memory"]
    table = [["computed, not measured: GB", *kept]]
    for part in next(iter(kept.values())):
        cells = [kept[stage][part] for stage in kept]
        if any(cells):
            table.append([part, *(f"{n / 1e9:.2f}" if n else "-" for n in cells)])
    total = len(table)
    table.append(["in all", *(f"{n / 1e9:.2f}" for n in found["peak_bytes"].values())])
    gpus = f"each of {found['gpus']} GPUs" if found["gpus"] > 1 else "one GPU"
    of = _gb(found["memory_of_gpu"])
    print_table(table, f"{title}: memory of {gpus}, of {of} GB", rules=[total])
    host = ", ".join(f"{name} {n / 1e9:.1f}" for name, n in found["host"].items() if n)
    print(f"host memory of a node, GB: {host}")
    for line in (verdict(found), *found["notes"]):
        print(f"- {line}")
    print("assumed:")
    if "device" in found:
        print(f"  {found['device']['name']}: {found['device']['source']}")
    for line in found["assumptions"]:
        print(f"  {line}")


def verdict(found: dict[str, Any]) -> str:
    """Whether it fits; if not, what would change that, and what it would be then."""
    peaks, of, change = found["peak_bytes"], _gb(found["memory_of_gpu"]), found["change"]
    stage = max(peaks, key=lambda name: peaks[name])
    if found["fits"]:
        return f"it fits: {_gb(peaks[stage])} of {of} GB at most, in the {stage}"
    parts = found["memory"][stage]
    most = max(parts, key=lambda name: parts[name])
    said = f"it does not fit: the {stage} takes {_gb(peaks[stage])} of {of} GB, {_gb(parts[most])} of them {most}; "
    if not change:
        return f"{said}no change that plan knows is enough: {found['without_change']}"
    keys = " and ".join(f"{key} = {_toml(value)}" for key, value in change["keys"].items())
    return said + f"with {keys} it would take {_gb(change['peak'])} GB, as {change['why']}"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f}"


def _show_times(found: dict[str, Any], title: str) -> None:
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
