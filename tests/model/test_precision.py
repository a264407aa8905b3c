"""What is in which dtype in a bfloat16 run (the table of docs/precision.md), and what bfloat16 costs beside the stock model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perl.config import Config, ModelConfig, RunConfig, TrainConfig
from perl.files import RunFolder
from perl.model.head import SUPERVISED, HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.pack import pack_row
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import TINY_MODELS
from perl.model.vision import StepFeatures
from perl.recipe import plan
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.training.components import build
from perl.training.optimizer import Optimizer, Schedule
from perl.types import Segment
from tests.model.conftest import CONFIG
from tests.model.steps import picture, segments_of, stock_inputs, stock_model
from tests.training.two_tokens import Accelerator

every = pytest.mark.parametrize("name", TINY_MODELS)
BFLOAT16 = replace(CONFIG, dtype="bfloat16")
CPU = torch.device("cpu")
NONE = torch.empty(0, dtype=torch.long)


@pytest.fixture
def half(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Policy, Processor]]:
    """A function from a tiny model's name to its policy in bfloat16 and its processor."""

    def load(name: str, **model: Any) -> tuple[Policy, Processor]:
        folder = str(tiny_folder(name))
        return load_policy(folder, replace(BFLOAT16, **model), CPU), load_processor(folder, CONFIG)

    return load


def optimizer_of(policy: Policy, lr: float = 1e-3) -> Optimizer:
    accelerator = Accelerator()
    schedule = Schedule(lr, "constant", 0, 9)
    return Optimizer(
        accelerator, HeadLoss(policy, NONE, 1.0), schedule, TrainConfig(max_grad_norm=1e9)
    )


def table() -> dict[str, str]:
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (bfloat16|float32) \|$", text, re.M)
    return dict(rows)


class Operations(TorchDispatchMode):
    """The dtypes that operators take and give, and every cast of one of these weights."""

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr(): w.dtype for w in weights}
        self.seen: defaultdict[str, set[str]] = defaultdict(set)
        self.casts: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            made = out.dtype != source.dtype
            if made and source.untyped_storage().data_ptr() in self.weights:
                self.casts.append(f"{name} {tuple(source.shape)} {source.dtype} {out.dtype}")
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            self.seen["queries, keys and values, cached ones too"] |= named(args[:3])
            merged = "softmax of attention, log-sum-exps that merge its parts"
            self.seen[merged] |= named(out[1:2])
        if row := ROWS.get(name):
            self.seen[row] |= named([out])
        return out


ROWS = {
    "rsqrt": "statistics of norms",
    "cos": "angles of rotary embeddings",
    "sin": "angles of rotary embeddings",
    "index_add_": "gradients of rows that several readers share",
}
"""What operators say of the table."""


def named(values: Any) -> set[str]:
    """Dtypes of the floating tensors in nested tuples."""
    if isinstance(values, torch.Tensor):
        return {str(values.dtype).removeprefix("torch.")} if values.is_floating_point() else set()
    if isinstance(values, dict):
        values = values.values()
    return set().union(*map(named, values)) if hasattr(values, "__iter__") else set()


@contextmanager
def watched(policy: Policy, seen: defaultdict[str, set[str]]) -> Iterator[None]:
    """Every module of a policy: what it gives has to be bfloat16, but for the towers' angles."""
    text, tower = policy.core.language_model, policy.family.tower(policy.core)[0]
    hooks = []

    def outputs(name: str) -> Any:
        def look(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            values = getattr(out, "last_hidden_state", out)
            if found := named(values) - {"bfloat16"}:
                seen["else"].add(f"{name} gives {found}")
            if module in text.layers:
                seen["residual stream"] |= named((args, values, kwargs.get("hidden_states", ())))
            if module is text.rotary_emb:
                seen["their cosines and sines, in the language model"] |= named(values)
            if module is tower:
                seen["pixels as the tower takes them, image features"] |= named((args, kwargs))
            if module is policy.base.lm_head:
                seen["logits that are sampled from"] |= named(values)

        return look

    for name, module in policy.base.named_modules():
        if name and not name.endswith("visual.rotary_pos_emb"):
            hooks.append(module.register_forward_hook(outputs(name), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@every
def test_dtypes_are_those_of_the_table(name: str, half) -> None:
    """In a step of several micro-batches with a trained tower, in log-probs and in generation."""
    policy, processor = half(name)
    optimizer, segments = optimizer_of(policy), segments_of(processor)
    engine = InProcessEngine(policy, processor, 10_000)
    operations = Operations()
    seen = operations.seen
    for weight in policy.parameters():
        weight.register_post_accumulate_grad_hook(
            lambda w: seen["gradient of a weight from one backward"].update(named([w.grad]))
        )
    optimizer.adamw.register_step_pre_hook(
        lambda *_: seen["gradients added up over micro-batches and processes, their norm"].update(
            named([m.grad for m in optimizer.masters.values()])
        )
    )
    batches = policy.pack(segments, 60, True)
    assert len(batches) > 1
    with watched(policy, seen), operations:
        optimizer.step(0, batches, SUPERVISED)
        loss = optimizer.head(batches[0], SUPERVISED, 1.0)
        logprobs = optimizer.head.logprobs(batches[0])
        [completions, *_] = engine.generate(
            [s.prompt for s in segments], SamplingParams(2, 1.0, 3), 0
        )
        features = policy.vision.features(batches[0].images)
        with StepFeatures(policy.vision.encode, batches).of(0) as leaves:
            leaves.rows.sum().backward()
    seen["weights, LoRA adapters, the reference model"] = named(list(policy.parameters()))
    seen["masters of trained weights"] = named(list(optimizer.masters.values()))
    seen["AdamW's moments"] = named(
        [s[k] for s in optimizer.adamw.state.values() for k in ("exp_avg", "exp_avg_sq")]
    )
    seen["log-probs, entropies, the loss"] = named(
        [loss.loss, loss.logprobs, logprobs.logprobs, logprobs.entropy]
    )
    seen["pixels as the tower takes them, image features"] |= named(features.tensors)
    seen["features of a trained tower in a step, their gradients"] = named(leaves.tensors)
    assert completions[0].logprobs.dtype == "float32"
    assert seen.pop("else", None) is None
    assert {row: {dtype} for row, dtype in table().items()} == dict(seen)


def test_a_run_makes_pixels_in_the_dtype_of_its_model(tiny_folder, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_folder("tiny-qwen2.5-vl")), dtype="bfloat16")
    config = Config(run=RunConfig(trackers=()), model=model)
    parts = build(config, plan(config)[0], RunFolder(tmp_path))
    [dtype] = {p.dtype for p in parts.policy.parameters()}
    assert parts.processor.encode_image(picture(28, 28, 1)).pixel_values.dtype == dtype
    assert dtype == torch.bfloat16


@every
def test_frequencies_of_rotary_embeddings_stay_in_float32(name: str, half, tiny_folder) -> None:
    """Also behind adapters and on the device that the model is put on."""
    whole = dict(load_policy(str(tiny_folder(name)), CONFIG, CPU).base.named_buffers())
    assert any("inv_freq" in buffer for buffer in whole)
    for model in ({}, {"lora_rank": 2}):
        policy = half(name, **model)[0].to(CPU)
        assert named(list(policy.parameters())) == {"bfloat16"}
        found = dict(policy.base.named_buffers())
        assert all(torch.equal(found[n], b) and found[n].dtype == b.dtype for n, b in whole.items())


@pytest.mark.parametrize(
    "model", [{}, {"lora_rank": 2, "freeze_vision": True}], ids=["all", "lora"]
)
@every
def test_no_weight_is_cast(name: str, model: dict[str, Any], half) -> None:
    """Neither a frozen nor a trained one, in a step, in log-probs or in generation."""
    policy, processor = half(name, **model)
    optimizer, segments = optimizer_of(policy), segments_of(processor)[:2]
    engine = InProcessEngine(policy, processor, 10_000)
    with Operations(policy.parameters()) as operations:
        optimizer.step(0, policy.pack(segments, 60, True), SUPERVISED)
        optimizer.head.logprobs(pack_row(segments))
        engine.generate([segments[0].prompt], SamplingParams(2, 1.0, 3), 0)
    assert not operations.casts


class Passes:
    """What a model made of sequences [prompt | completion], and the gradients of their loss, added in float32 at least."""

    def __init__(self, core: Any) -> None:
        self.layers: list[list[torch.Tensor]] = [[] for _ in core.language_model.layers]
        """[L, H] of each sequence behind each decoder layer."""
        self.logprobs: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def far_from(self, truth: Passes) -> dict[str, float]:
        """Root mean squares of differences by what differs, over those of the truth."""
        pairs = {f"layer {i}": (self.layers[i], truth.layers[i]) for i in range(len(self.layers))}
        pairs["log-probs"] = (self.logprobs, truth.logprobs)
        pairs |= {n: ([g], [truth.gradients[n]]) for n, g in self.gradients.items()}
        ours = {n: (torch.cat(a).double(), torch.cat(b)) for n, (a, b) in pairs.items()}
        return {n: float((a - b).norm() / b.norm()) for n, (a, b) in ours.items()}


def stock_passes(model: Any, segments: list[Segment]) -> Passes:
    """One sequence at a time."""
    found = Passes(model.model)
    hooks = [
        layer.register_forward_hook(
            lambda *given, kept=kept: kept.append(torch.atleast_3d(given[-1])[0].detach())
        )
        for layer, kept in zip(model.model.language_model.layers, found.layers, strict=True)
    ]
    total = sum(len(c) for s in segments for c in s.completions)
    for segment in segments:
        for completion, advantage in zip(segment.completions, segment.advantages, strict=True):
            if hasattr(model.model, "rope_deltas"):
                model.model.rope_deltas = None
            inputs = stock_inputs(model, segment.prompt, completion)
            logits = model(**inputs).logits[0, len(segment.prompt.input_ids) - 1 : -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = torch.from_numpy(completion)[:, None]
            logprobs = logits.log_softmax(-1).gather(1, targets).squeeze(1)
            found.logprobs.append(logprobs.detach())
            (-advantage * logprobs.sum() / total).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    wide = p.grad.to(torch.promote_types(p.dtype, torch.float32))
                    found.gradients[name] = found.gradients.get(name, 0) + wide
                    p.grad = None
    for hook in hooks:
        hook.remove()
    return found


def packed_passes(policy: Policy, segments: list[Segment]) -> Passes:
    """In one row to be looked at, and in a step of several micro-batches for its gradients."""
    found, batch = Passes(policy.core), pack_row(segments)
    rows = []
    for scored, (i, _) in zip(
        batch.scored.split(batch.completion_cu_seqlens.diff().tolist()), batch.source, strict=True
    ):
        prompt = int(scored[0]) + 1
        start = prompt - len(segments[i].prompt.input_ids)
        rows.append(torch.cat([torch.arange(start, prompt), scored[1:], scored[-1:] + 1]))
    hooks = [
        layer.register_forward_hook(
            lambda *given, kept=kept: kept.extend(given[-1][0].detach()[own] for own in rows)
        )
        for layer, kept in zip(policy.core.language_model.layers, found.layers, strict=True)
    ]
    optimizer = optimizer_of(policy)
    found.logprobs = [optimizer.head.logprobs(batch).logprobs]
    for hook in hooks:
        hook.remove()
    optimizer.adamw.register_step_pre_hook(
        lambda *_: found.gradients.update(
            {n: optimizer.masters[p].grad.clone() for n, p in policy.model.named_parameters()}
        )
    )
    batches = policy.pack(segments, 60, True)
    assert len(batches) > 1
    optimizer.step(0, batches, SUPERVISED)
    return found


@every
def test_bfloat16_loses_little_more_than_the_stock_model(name: str, half, tiny_folder) -> None:
    """Of the same weights in fp64: behind each layer, in log-probs and in each gradient of a step of several rows."""
    policy, processor = half(name)
    rng = np.random.default_rng(0)
    segments = [
        replace(s, completions=s.completions[:2], advantages=tuple(rng.normal(size=2)))
        for s in segments_of(processor)[:3]
    ]
    stock = stock_model(tiny_folder(name), torch.bfloat16)
    theirs = stock_passes(stock, segments)
    truth = stock_passes(stock.double(), segments)
    lost, allowed = packed_passes(policy, segments).far_from(truth), theirs.far_from(truth)
    assert lost.keys() == allowed.keys() and len(lost) > 80
    over = {n: (lost[n], allowed[n]) for n in lost if lost[n] > 1.5 * allowed[n]}
    assert not over and allowed["log-probs"] < 1e-3


def test_a_token_that_occurs_often_has_the_gradient_of_all_its_places(half) -> None:
    """300 ones: a sum in bfloat16, whose numbers lie 2 apart from 256 on, would stay there."""
    policy, _ = half("tiny-qwen2.5-vl")
    embeds, _ = policy.embed(torch.full((1, 300), 7), torch.zeros(1, 300, dtype=torch.bool), None)
    embeds.sum().backward()
    assert set(policy.core.language_model.embed_tokens.weight.grad[7].tolist()) == {300}
