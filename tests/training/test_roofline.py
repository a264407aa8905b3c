"""`perl-rl plan`: its operations, bytes and memory are those of a tiny model's real step, and times follow from them."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import perl_kernels  # noqa: F401  # Registers its operators.
from perl.config import Config
from perl.model.head import HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.vision import StepFeatures
from perl.recipe import load_recipe, plan
from perl.rollout.decoding.sampling import SamplingParams, sample
from perl.training.optimizer import Optimizer, Schedule
from perl.training.parallel.balancing import Met, segment_met
from perl.training.roofline.advice import first_that_fits, peak_of
from perl.training.roofline.check import _capacity, check_memory
from perl.training.roofline.devices import DEVICES, Device, device_named
from perl.training.roofline.memory import (
    _logprobs,
    _update,
    activation_bytes,
    at_rest,
    certain,
    memory,
    on_host,
)
from perl.training.roofline.model import CONFIGS, model_facts
from perl.training.roofline.step import SAMPLING, Part, Shape, StepWork
from perl.types import EncodedPrompt, Segment
from perl_kernels import PolicyLoss
from tests.command_line import ErrorOf, run
from tests.messages import refused, tells
from tests.model.steps import picture
from tests.training.two_tokens import Accelerator

LOSS = PolicyLoss.preset("perl", kl=None, kl_coef=0.0)
CPU = torch.device("cpu")
QUESTIONS, ORDERS, ROLLOUTS, TEXT, LENGTH = 2, 2, 3, 60, 70
SIDE = {"tiny-qwen2.5-vl": 84, "tiny-qwen3-vl": 96, "tiny-internvl": 28}


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> None:
    """Not here: what filling takes would be counted as a step's."""


def with_keys(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {s: replace(getattr(config, s), **keys) for s, keys in sections.items()}
    return replace(config, **changed)


def small(name: str, **model: Any) -> Config:
    return with_keys(
        load_recipe("demo"),
        model={"path": name, "max_pixels": SIDE[name] ** 2, **model},
        permutation={"orders": ORDERS},
        rollout={"per_order": ROLLOUTS, "max_new_tokens": 100},
        train={"examples_per_step": QUESTIONS, "tokens_per_micro_batch": 1200},
    )


class Step:
    """A tiny model, and a step of questions of two images each, all alike."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.processor = load_processor(str(folder), config.model)
        self.policy = load_policy(str(folder), config.model, CPU)
        side, rng = SIDE[config.model.path], np.random.default_rng(0)
        self.segments, family = [], self.policy.family
        for group in range(QUESTIONS):
            shown = [
                self.processor.encode_image(picture(side, side, 2 * group + k)) for k in (0, 1)
            ]
            for images in (shown, shown[::-1]):
                image_id = self.policy.core.config.image_token_id
                ids = np.full(TEXT + sum(i.tokens for i in images), 30)
                ids[5 : 5 + images[0].tokens] = image_id
                ids[20 + images[0].tokens : 20 + 2 * images[0].tokens] = image_id
                positions, following = family.positions(ids, images, image_id)
                prompt = EncodedPrompt(ids, positions, following, tuple(images), image_id)
                completions = tuple(rng.integers(20, 60, LENGTH) for _ in range(ROLLOUTS))
                self.segments.append(Segment(prompt, completions, (1.0,) * ROLLOUTS, group))
        self.images = [i for s in self.segments[::2] for i in s.prompt.images]
        shape = Shape(2, shown[0].tokens, TEXT, LENGTH)
        self.work = StepWork(config, model_facts(config), shape, gpus=1)

    def take(self) -> None:
        policy, train = self.policy.train(), self.config.train
        batches = policy.pack(self.segments, train.tokens_per_micro_batch, True)
        assert [b.num_tokens for b in batches] == self.work.row_tokens
        head = HeadLoss(policy, self.processor.unsampled_token_ids(), 1.0)
        shared = StepFeatures(policy.vision.encode, batches) if policy.vision.trained else None
        for number, batch in enumerate(batches):
            with shared.of(number) if shared else nullcontext() as features:
                head(batch, LOSS, 1.0, features).loss.backward()


def counted(call: Callable[[], Any]) -> dict[str, float]:
    """FLOPs of `attention`, `head` and `other`; of attention those of pairs that meet, as flash kernels skip the others."""

    def forward(
        query: Any, key: Any, value: Any, dropout: Any = 0, causal: Any = False, **more: Any
    ):
        pairs = query.shape[0] * query.shape[2] * key.shape[2] / (2 if causal else 1)
        if (mask := more.get("attn_mask")) is not None:
            pairs = (mask == 0).expand(query.shape[0], 1, query.shape[2], -1).sum().item()
        return 4 * pairs * query.shape[1] * query.shape[3]

    def backward(
        grad: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        lse: Any,
        dropout: Any,
        causal: Any,
        **more: Any,
    ):
        return 2.5 * forward(query, key, value, dropout, causal, **more)

    def head(hidden: Any, weight: Any, *_: Any, **__: Any) -> float:
        return (6 if weight.requires_grad else 4) * hidden.numel() * weight.shape[0]

    aten, own = torch.ops.aten, torch.ops.perl_kernels.linear_grpo_loss
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        own: head,
    }
    for formula in formulas.values():
        formula._get_raw = True
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    found = counter.flop_counts["Global"]
    attention = sum(n for op, n in found.items() if "dot_product" in str(op))
    return {
        "attention": attention,
        "head": found[own],
        "other": sum(found.values()) - attention - found[own],
    }


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tiny-qwen2.5-vl", {}),
        ("tiny-qwen3-vl", {"gradient_checkpointing": True}),
        ("tiny-internvl", {"freeze_vision": True, "lora_rank": 4}),
    ],
)
def test_operations_are_those_of_a_step(
    name: str, model: dict[str, Any], tiny_folder: Callable[[str], Path]
) -> None:
    step = Step(small(name, **model), tiny_folder(name))
    parts = {part.name: part for part in step.work.parts()}
    if name != "tiny-internvl":  # Of a tile of four patches the class token is a fifth.
        tower = counted(lambda: step.policy.vision.features(step.images))
        made = tower["other"] + tower["attention"]
        assert parts["rollout/vision"].flops == pytest.approx(made, rel=0.01)
    found = counted(step.take)
    assert parts["update/head and loss"].flops == found["head"]
    assert parts["update/attention"].flops == pytest.approx(found["attention"], rel=0.05)
    products = parts["update/products"].flops
    if "update/vision" in parts:
        products += parts["update/vision"].flops
    assert products == pytest.approx(found["other"], rel=0.05)
    if not model.get("gradient_checkpointing"):
        # The model's own, which a run counts: attention's backward is twice its forward, not 2.5 times.
        met = [segment_met(s, shared=True) for s in step.segments]
        facts, whole = step.work.facts, Met(*map(sum, zip(*met, strict=True)))
        made = facts.vision_flops(Counter(i.tokens for i in step.images), gradients=True)
        counted_by_run = facts.text_flops(whole, gradients=True) | {"vision": made}
        own = found["head"] + found["other"] + found["attention"] * 3 / 3.5
        own += 0 if facts.tower_trained else made  # The frozen tower's features were kept.
        assert sum(counted_by_run.values()) == pytest.approx(own, rel=0.03)


VIEWS = {
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "unsqueeze"),
    *("slice", "select", "split", "unbind", "alias", "detach", "as_strided", "split_with_sizes"),
    "squeeze",
}
OTHERS = {"mm", "addmm", "bmm", "index_select", "_scaled_dot_product_flash_attention_for_cpu"}


class Moved(TorchDispatchMode):
    """Operations, and the bytes that they read and write outside of products and attention; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.operations += 1
            if name not in OTHERS:
                tensors = (
                    x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)
                )
                self.bytes += sum(x.nbytes for x in tensors)
        return out


def test_bytes_and_launches_are_those_of_transformers_layers(
    tiny_folder: Callable[[str], Path],
) -> None:
    """In bfloat16, a layer: what twice as many layers move, launch and keep more."""
    name = "tiny-qwen2.5-vl"
    step = Step(small(name, compile=False, liger=False), tiny_folder(name))
    policy, kept = step.policy.to(torch.bfloat16).train(), {}
    [batch, *_] = policy.pack(step.segments, 10**6, True)
    features = policy.vision.encode(batch.images).map(torch.detach)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    found = []
    layers = policy.core.language_model.layers
    for number in (2, 4):
        policy.core.language_model.layers = layers[:number]
        policy.core.language_model.config.num_hidden_layers = number
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Moved() as moved:
            policy(batch, features)
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        own = sum(size for at, (_, size) in kept.items() if at not in weights)
        found.append((moved.operations, moved.bytes, own))
    launches, moved, own = ((b - a) / 2 for a, b in zip(*found, strict=True))
    work = replace(
        step.work, config=with_keys(step.config, train={"tokens_per_micro_batch": 10**6})
    )
    assert work.row_tokens == [batch.num_tokens]
    assert launches == pytest.approx(50, rel=0.1)
    assert moved == pytest.approx(work.tokens * work.elementwise, rel=0.1)
    assert own == pytest.approx(work.tokens * activation_bytes(work), rel=0.1)


def test_bytes_of_sampling_are_counted() -> None:
    logits, banned = torch.zeros(3, 1000).bfloat16(), torch.zeros(1000).bool()
    with Moved() as moved:
        sample(logits, banned, SamplingParams(3, 1.0, 1), torch.Generator())
    # What the counter takes for moved and is not: memory that is taken, read by the draw, or gathered from.
    assert moved.bytes == pytest.approx((SAMPLING + 8 + 4 + 4) * 3000, rel=0.01)


def paper(path: str = "Qwen/Qwen2.5-VL-7B-Instruct", **sections: dict[str, Any]) -> StepWork:
    """The paper's setting: 16 questions a GPU, answers of 512 tokens at most."""
    sections = {"model": {"path": path}, "rollout": {"max_new_tokens": 512}} | sections
    config = with_keys(load_recipe("perl-7b"), **sections)
    return StepWork(config, model_facts(config), Shape(6, 330, 150, 512), gpus=8)


def test_the_papers_step_by_hand() -> None:
    """On a GPU of round figures; sizes of the 7B are those of its config.json."""
    layers, hidden, inner, queries, keys, vocab = 28, 3584, 18944, 28 * 128, 4 * 128, 152064
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    weights, head, prompt, new = layers * layer, vocab * hidden, 6 * 330 + 150, 512
    work = paper(train=WHOLE)
    parts = {part.name: part for part in work.parts()}
    assert work.facts.weights == 8_292_166_656
    assert (work.prompts, work.scored) == (32, 32 * 6 * 512)
    assert work.tokens == 32 * (prompt + 6 * new)  # Each prompt once.
    [products] = parts["update/products"].phases
    # Forward, backward, and forward again but for the last product of a layer.
    times = 4 - hidden * inner / layer
    assert products["product"] == pytest.approx(2 * work.tokens * weights * times, rel=1e-3)
    assert parts["update/head and loss"].flops == 6 * work.scored * head
    assert parts["logprobs/reference"].phases[-1] == {"head": 2 * work.scored * head}
    # 25 prompts fit, each with six times 512 tokens: so two times 512 steps, of 96 sequences on average.
    assert work.slots == (131072 // (prompt + 6 * new), 6) == (25, 6)
    assert parts["rollout/prefill"].phases[0]["product"] == 2 * 32 * prompt * work.facts.flops.token
    [decode] = parts["rollout/decode"].phases
    read = 96 / 6 * prompt + 96 * new / 2  # A prompt once for its six completions.
    steps = 2 * new
    cache = steps * read * layers * 2 * keys * 2
    fixed = steps * 2 * (weights + head)
    rest = steps * 96 * (layers * work.elementwise + 58 * vocab)
    assert decode["bytes"] == pytest.approx(cache + fixed + rest, rel=1e-3)
    assert parts["rollout/decode"].waits == steps / 16
    device = Device("round", 1e15, 1e12, 1e11, 1e11, "")
    spent = decode["bytes"] / 0.73e12
    assert parts["rollout/decode"].seconds(device) == pytest.approx(spent)
    sent = 2 * 7 / 8 * 4 * work.facts.trained
    assert parts["update/sync"].seconds(device) == pytest.approx(sent / 0.7e11)


def test_time_is_that_of_what_is_slowest() -> None:
    device = Device("round", 1e12, 1e9, 1e9, 1e9, "")
    phases = ({"product": 6e12, "head": 5.5e12, "bytes": 1.0}, {"bytes": 1.46e9})
    assert Part("a", phases).seconds(device) == pytest.approx(10 + 10 + 2)
    assert Part("a", phases).flops == 11.5e12 and Part("a", phases).bytes == 1.46e9 + 1
    assert Part("a", phases, launches=1e7).seconds(device) == pytest.approx(50)


@pytest.mark.parametrize(
    ("path", "billions"), [*zip(CONFIGS, (3.755, 8.292, 4.438, 8.767), strict=True)]
)
def test_models_that_are_known_have_their_numbers_of_weights(path: str, billions: float) -> None:
    facts = paper(path).facts
    assert facts.weights / 1e9 == pytest.approx(billions, abs=1e-3)
    assert facts.tokens_of(262144) == (256 if "Qwen3" in path else 334)


LORA = {"path": "Qwen/Qwen2.5-VL-7B-Instruct", "lora_rank": 64, "freeze_vision": True}
LORA["gradient_checkpointing"] = 1.0
TOWER = 676_550_144
"""Weights of the 7B's vision tower."""
WHOLE = {"sharding": "none"}


def test_memory_of_weights_by_hand() -> None:
    """Without sharding 2 bytes of a weight, 4 of its master, 8 of its moments, 4 of its gradient, 2 of its reference."""
    work = paper(train=WHOLE)
    n = work.facts.weights
    kept = memory(work, 80e9)
    rest = {"parameters": 2 * n, "optimiser": 12 * n, "reference": 2 * n}
    assert kept["update"] | rest | {"gradients": 4 * n} == kept["update"]
    assert kept["rollout"] | rest | {"gradients": 0, "gathered weights": 0} == kept["rollout"]
    assert kept["rollout"]["keys and values"] == 25 * (2130 + 6 * 512) * 28 * 2 * 4 * 128 * 2
    assert certain(work) == 20 * n
    copy = on_host(work)
    assert (
        copy["checkpoint"] == 12 * n and copy["offloaded"] == 0
    )  # One process writes what all have.


def test_memory_of_shards_by_hand() -> None:
    """Over 8 GPUs: an eighth of everything but the tower, which each of them has."""
    work = paper()
    of_tower, rest = TOWER, work.facts.weights - TOWER
    assert work.facts.in_tower.count == of_tower and work.shards == 8
    found = at_rest(work)
    assert found == {
        "parameters": 4 * rest / 8 + 2 * of_tower,  # In shards a weight is its own master.
        "optimiser": 8 * rest / 8 + (8 + 4) * of_tower,
        "gradients": 4 * rest / 8 + 4 * of_tower,
        "reference": 2 * rest / 8 + 2 * of_tower,
    }
    kept = memory(work, 80e9)
    assert kept["rollout"]["gathered weights"] == 2 * rest
    assert (
        kept["logprobs"]["gathered weights"] == 2 * rest
    )  # The reference's when the policy's are not.
    layer, around = 233_057_792, 2 * 152064 * 3584 + 3584
    assert kept["update"]["gathered weights"] == 2 * (2 * layer + around)
    # Of a layer in its backward: its gradients in bfloat16, summed in fp32, and the shard of the sum.
    assert kept["update"]["gradients"] == found["gradients"] + (2 + 4 + 4 / 8) * layer

    # Embeddings and head, whose gradients come last, are one unit.
    most = max(moment.get("gradients", 0.0) for moment in _update(work, 80e9))
    assert most == found["gradients"] + (2 + 4 + 4 / 8) * around
    # A 32nd of the GPU for logits, beside the rows of hidden states of six prompts' answers.
    [_, head] = _logprobs(work, 80e9)
    assert head["head block"] == 80e9 / 32 + 2 * 3584 * 6 * 6 * 512
    assert kept["logprobs"]["vision"] == 2 * 3584 * 16 * 6 * 330
    little = paper(model={"path": work.config.model.path, "feature_cache_mb": 1})
    assert memory(little, 80e9)["logprobs"]["vision"] == 2**20

    stays = paper(train={"reshard_after_forward": False})
    assert memory(stays, 80e9)["update"]["gathered weights"] == 2 * rest
    narrow = memory(paper(train={"reduce_dtype": "bfloat16"}), 80e9)
    assert narrow["update"]["gradients"] == found["gradients"] + (2 + 2 + 2 / 8) * layer
    split = paper(train={"shard_vision": True})
    n = work.facts.weights
    assert at_rest(split) == {
        "parameters": 4 * n / 8,
        "optimiser": 8 * n / 8,
        "gradients": 4 * n / 8,
        "reference": 2 * n / 8,
    }
    # Of 8 bits a byte and a 256th of a scale, but for vectors and the tower's matrices of 3420 columns.
    eight = paper(train={"optimizer": "adamw_8bit"})
    bits, plain = 2 * (1 + 4 / 256), 32 * 1280 * 3420
    matrices = eight.facts.in_layers.in_blocks + eight.facts.around.in_blocks
    vectors = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    assert matrices == rest - vectors
    own = 4 * of_tower + bits * eight.facts.in_tower.in_blocks
    own += 8 * (of_tower - eight.facts.in_tower.in_blocks)
    assert of_tower - eight.facts.in_tower.in_blocks > plain
    assert at_rest(eight)["optimiser"] == (bits * matrices + 8 * vectors) / 8 + own
    assert memory(split, 80e9)["update"]["gathered weights"] == 2 * (2 * layer + around + of_tower)
    hybrid = replace(work, gpus=16, config=with_keys(work.config, train={"shards": 4}))
    assert at_rest(hybrid)["parameters"] == 4 * rest / 4 + 2 * of_tower
    # A checkpoint has masters and moments once, however many processes of the node share them.
    for each in (work, hybrid):
        assert on_host(each)["checkpoint"] == 12 * n

    moved = paper(train={"cpu_offload": True})
    assert at_rest(moved) == {
        "parameters": 2 * of_tower,
        "optimiser": 12 * of_tower,
        "gradients": 4 * of_tower,
        "reference": 2 * of_tower,
    }
    assert on_host(moved)["offloaded"] == 8 * (4 + 8 + 4 + 2) * rest / 8


def test_what_is_sent_between_gpus_by_hand() -> None:
    device = Device("round", 1e15, 1e12, 1e11, 1e11, "")
    work = paper()
    sent = {part.name: part for part in work.parts()}["update/sync"].seconds(device) * 0.7e11
    rows, rest = len(work.row_tokens), work.facts.weights - TOWER
    layers = 28 * 233_057_792
    gathered = (
        2 * rows * (2 * layers + (rest - layers))
    )  # Layers for the forward and again for the backward.
    reduced = 4 * rows * rest
    assert sent == pytest.approx(7 / 8 * (gathered + reduced) + 2 * 7 / 8 * 4 * TOWER)


def test_adapters_need_little() -> None:
    work = paper(model=LORA, train=WHOLE)
    found, f = at_rest(work), work.facts
    assert found["reference"] == 0 and f.trained < 0.03 * f.weights
    assert found["parameters"] == sum(w.bytes for w in (f.in_layers, f.around, f.in_tower))
    assert found["gradients"] == 4 * f.trained
    names = [part.name for part in work.parts()]
    assert "update/vision" not in names and "logprobs/reference's vision" not in names


def test_the_change_that_makes_it_fit_is_planned_again() -> None:
    whole = paper(train=WHOLE)
    change = first_that_fits(whole, 80e9)
    assert change and change.keys == {"train.sharding": "fsdp"}
    assert change.peak == peak_of(memory(paper(), 80e9)) <= 80e9
    assert first_that_fits(paper(), 80e9) is None
    # One GPU has nobody to share with.
    alone = replace(whole, gpus=1)
    change = first_that_fits(alone, 80e9)
    assert change and change.keys == {"model.lora_rank": 64, "model.freeze_vision": True}
    # Two changes together, and none.
    wide = paper(model={**LORA, "gradient_checkpointing": 0.0}, train=WHOLE)
    change = first_that_fits(wide, 34e9)
    both = {"model.gradient_checkpointing": 1.0, "train.tokens_per_micro_batch": 16384}
    assert change and change.keys == both
    assert first_that_fits(whole, 10e9) is None


@pytest.mark.parametrize(
    ("recipe", "gpus", "most"),
    [("perl-7b", 8, 80), ("perl-released", 8, 80), ("perl-3b-1gpu", 1, 40)],
)
def test_recipes_fit_the_gpus_that_they_are_for(
    recipe: str, gpus: int, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--gpus", gpus, "--memory", most, "--json", file, "--picture", picture)
    assert run("plan", recipe, *options) == 0
    tells(capsys.readouterr().out, "it fits", f"of {most}.0 GB")
    found = json.loads(file.read_text())
    assert found["fits"] and max(found["peak_bytes"].values()) < 0.9 * most * 1e9
    assert picture.read_bytes().startswith(b"\x89PNG") and "seconds" not in found


def test_weights_masters_moments_and_gradients_are_those_of_an_update(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny-qwen2.5-vl"
    step = Step(small(name, dtype="bfloat16", freeze_vision=True), tiny_folder(name))
    head = HeadLoss(step.policy, step.processor.unsampled_token_ids(), 1.0)
    rate = Schedule(1e-3, "constant", 0, 1)
    optimizer, found = Optimizer(Accelerator(), head, rate, step.config.train), []

    def norm(grads: list[torch.Tensor]) -> torch.Tensor:
        found.append(sum(grad.nbytes for grad in grads))
        return torch.ones(())

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    optimizer.step(0, step.policy.pack(step.segments, 2000, True), LOSS)
    kept = at_rest(step.work)
    assert sum(p.nbytes for p in step.policy.parameters()) == kept["parameters"]
    states = [x for state in optimizer.adamw.state.values() for x in state.values() if x.ndim]
    masters = [*optimizer.masters.values(), *states]
    assert sum(x.nbytes for x in masters) == kept["optimiser"]
    assert found == [kept["gradients"]]


def test_a_run_that_memory_cannot_hold_is_refused_before_weights_are_loaded(
    tiny_folder: Callable[[str], Path],
    error_of: ErrorOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small("tiny-qwen2.5-vl", freeze_vision=True)
    folder = str(tiny_folder("tiny-qwen2.5-vl"))
    parameters = list(Step(config, Path(folder)).policy.parameters())
    # In float32 a weight is its own master: 4 bytes, and 12 for moments and gradient; the reference is whole, but for its tower.
    always = sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters)
    always += sum(p.numel() * 4 for p in parameters if p.requires_grad)

    def check(capacity: float) -> None:
        monkeypatch.setattr("perl.training.roofline.check._capacity", lambda *_: capacity)
        check_memory(config, folder, plan(config), CPU, 1)

    with refused("model.path", folder, f"{always / 1e9:.1f} GB"):
        check(always - 1)
    check(always)
    [warned] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    tells(warned, "perl-rl plan", "GB")
    caplog.clear()
    # Processes of one machine share its memory.
    if own := _capacity(CPU, 1):
        assert _capacity(CPU, 4) == pytest.approx(own / 4, rel=0.2)
    # What is small beside the memory is not counted.
    monkeypatch.setattr("perl.training.roofline.check.model_facts", None)
    check(1e12)
    assert not caplog.records

    monkeypatch.undo()
    monkeypatch.setattr("perl.training.roofline.check._capacity", lambda *_: 1e6)
    monkeypatch.setattr("perl.training.components.load_policy", None)
    options = ("--model.path", folder, "--run.dir", tmp_path / "run", "--run.seeds")
    tells(error_of("train", "demo", *options), "model.path", folder, "0.0 GB")
    assert not (tmp_path / "run").exists()


def test_orders_that_do_not_exist_and_prompts_that_are_not_shared() -> None:
    one = replace(paper(), shape=Shape(1, 330, 150, 512))
    assert (one.orders, one.prompts, len(one.completions)) == (1, 16, 12)
    apart = paper(train={"share_prompts": False})
    assert apart.tokens == 32 * 6 * (6 * 330 + 150 + 512)
    fewer = paper(train={"tokens_per_micro_batch": 4000})  # Three completions beside each prompt.
    assert fewer.tokens == 32 * (2 * 2130 + 6 * 512) and len(fewer.row_tokens) == 64


def test_the_command_shows_and_writes_and_measured_times_stand_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"stage": "rl", "step": n, "time/rollout": 4.0 + n, "time/step": 9.5} for n in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    file = tmp_path / "plan.json"
    options = ("--steps-of", "rtx-4090", "--images", "2", "--run", tmp_path, "--json", file)
    assert run("plan", "demo", *options, "--rollout.per-order", "5") == 0
    said = capsys.readouterr().out
    tells(said, "RTX 4090", "tiny-qwen2.5-vl", "computed", "decode", "measured", "6.000", "9.500")
    tells(said, "assumed", "10 completions")  # Two images have but two orders of the four.
    found = json.loads(file.read_text())
    assert found["computed"] and found["measured"] == {"rollout": 6.0, "step": 9.5}
    stages = found["stages"].values()
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    assert found["peak_bytes"]["update"] == sum(found["memory"]["update"].values())
    assert {"flops", "bytes", "launches", "host_waits", "seconds"} == {*next(iter(stages))}


def test_what_cannot_be_planned_is_one_line(error_of: ErrorOf, tmp_path: Path) -> None:
    names = [device.name for device in DEVICES]
    tells(error_of("plan", "demo", "--steps-of", "H2000"), "H2000", *names, "--tflops")
    tells(error_of("plan", "default"), "model.path", next(iter(CONFIGS)))
    tells(
        error_of("plan", "default", "--model.path", "no/where"), "model.path", "no/where", *CONFIGS
    )
    asked = ("--model.dtype", "float32", "--steps-of", "H100")
    tells(error_of("plan", "demo", *asked), "--steps-of", "model.dtype", "float32")
    assert run("plan", "demo", *asked[:2]) == 0  # Memory alone.
    sharded = ("--train.sharding", "fsdp")
    tells(error_of("plan", "demo", *sharded), "train.sharding", "fsdp", "--gpus", "none")
    tells(
        error_of("plan", "demo", *sharded, "--gpus", "4", "--train.shards", "3"), "train.shards = 3"
    )
    tells(error_of("plan", "demo", "--gpus", "4", "--train.shards", "2"), "train.shards", "fsdp")
    tells(error_of("plan", "demo", "--gpus", "0"), "--gpus 0", "1")
    tells(error_of("plan", "demo", "--gpus", "5"), "--gpus", "5", "train.examples_per_step", "12")
    tells(error_of("plan", "demo", "--picture", tmp_path), tmp_path)
    tells(error_of("plan", "demo", "--run", tmp_path), "--run", tmp_path, "metrics.jsonl")
    tells(
        error_of("plan", "demo", "--completion-tokens", "41"), "rollout.max_new_tokens", "40", "41"
    )
    small_cache = ("--rollout.kv-cache-tokens", "100")
    tells(error_of("plan", "demo", *small_cache), "rollout.kv_cache_tokens", "100")
    tells(error_of("plan", "demo", "--images", "600"), "data.max_prompt_tokens", "8192")
    own = ("--steps-of", "mine", "--tflops", "100", "--tb-per-s", "1", "--memory", "24")
    assert run("plan", "demo", *own) == 0
    with refused("mine", "--memory"):
        device_named("mine", 100, 1, 0)
    assert device_named("h100", 0, 0, 94) == replace(
        device_named("H100", 0, 0, 0),
        memory=94e9,
        source="NVIDIA H100 datasheet, SXM, and as given",
    )
