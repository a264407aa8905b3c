"""Steps of reinforcement in fp64: every number and every weight is that of `plain_loop`, one sequence at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image

from perl.data.tasks import vocabulary
from perl.distributed import StopSignal
from perl.files import RunFolder
from perl.model import tiny
from perl.recipe import load_recipe
from perl.report.progress import Display
from perl.rollout.collect import Collected
from perl.training.reinforce import reinforce
from perl.training.session import Session
from tests.command_line import metrics
from tests.training.plain_loop import Adapted, Group, PlainLoop, Sample, Settings

REWARD = """
def f(prompts, completions, **columns):
    letters = [sum(map(len, c.split())) for c in completions]
    return [None if n % 7 == 6 else n % 2 for n in letters]
"""
RECIPE: dict[str, Any] = {
    "run": {"trackers": [], "save_rollouts_every": 0, "checkpoint_every": 0, "seed": 5},
    "model": {"dtype": "float32"},
    "rollout": {"max_new_tokens": 6, "per_order": 2, "temperature": 0.8},
    "train": {
        **{"steps": 3, "examples_per_step": 2, "tokens_per_micro_batch": 60, "betas": [0.8, 0.95]},
        **{"lr": 2e-3, "warmup_steps": 1, "schedule": "cosine", "weight_decay": 0.1},
        "max_grad_norm": 0.5,
    },
    "eval": {"examples": 0},
}
# The preset perl is the paper's: clip 0.2, dual clip 3, k3 with 0.01, mean over tokens.
PERL = Settings(
    **{"temperature": 0.8, "longest": 6, "lr": 2e-3, "warmup": 1, "betas": (0.8, 0.95)},
    **{"decay": 0.1, "limit": 0.5, "dual": 3.0, "kl": 0.01},
)
PLAIN = replace(PERL, kl=0.0, dual=math.inf, updates=2)
TWICE = {"updates_per_batch": 2, "examples_per_step": 3}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
STAGES = [
    {"name": "easy", "kind": "rl", "train": {"steps": 1, "warmup_steps": 0}},
    {"name": "hard", "kind": "rl", "train": {"steps": 2}, "loss": {"kl_coef": 0.5}},
]

# Beside what its name says, a case may have a setting that must change no number.
CASES: dict[str, tuple[dict[str, Any], list[Settings]]] = {
    "perl": ({}, [PERL]),
    "two-updates": ({"train": TWICE}, [replace(PERL, updates=2)]),
    "off-policy": (
        {"train": TWICE, "filter": {"replay": 1, "reuse_overflow": True}},
        [replace(PERL, updates=2)],
    ),
    "two-stages": (
        {"stages": STAGES, "model": {"feature_cache_mb": 0}},
        [replace(PERL, steps=1, warmup=0), replace(PERL, steps=2, kl=0.5)],
    ),
    "seq-mean-token-mean": (
        {"train": TWICE, "loss": {"preset": "grpo"}, "model": {"gradient_checkpointing": True}},
        [replace(PLAIN, mean="seq-mean-token-mean")],
    ),
    "seq-mean-token-sum-norm": (
        {"train": {**TWICE, "share_prompts": False}, "loss": {"preset": "dr_grpo"}},
        [replace(PLAIN, mean="seq-mean-token-sum-norm")],
    ),
    "lora": ({"model": {**LORA, "freeze_vision": True}}, [PERL]),
    "lora-and-tower": ({"model": LORA}, [PERL]),
    "frozen-tower": (
        {"model": {"freeze_vision": True}, "permutation": {"condition": "original"}},
        [PERL],
    ),
}

TRAINED = {"lora": 2 * 14, "lora-and-tower": 28 + 30, "frozen-tower": 26}
"""How many tensors: of 14 layers with adapters, of the language model 26 and of the tower 30."""

PRESENT: dict[str, tuple[str, ...]] = {
    "two-updates": ("clip_fraction",),
    "off-policy": (
        *("groups/reused", "groups/replayed"),
        *("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"),
    ),
    "seq-mean-token-mean": ("clip_fraction",),
    "seq-mean-token-sum-norm": ("clip_fraction",),
}
"""What has to occur, or the comparison says nothing about it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model with two layers, and a tower with one of windowed and one of full attention."""
    path = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_LAYERS", 2)
        patch.setattr(tiny, "_VISION_DEPTH", 2)
        tiny.make_tiny_model("tiny-qwen2.5-vl", vocabulary(), path, seed=0)
    # Exports have the dtype of the model they began with: between two stages nothing is to be rounded.
    config = path / "config.json"
    config.write_text(config.read_text("utf-8").replace('"float32"', '"float64"'), "utf-8")
    return path


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread and fp64, in what transformers computes in fp32 even then too: norms, and the tower's rotation."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        variance = x.square().mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * x * variance.rsqrt()

    def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return tuple(x * cos + stock.rotate_half(x) * sin for x in (q, k))

    def load(folder: str, dtype: torch.dtype, device: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)

    monkeypatch.setattr(stock.Qwen2_5_VLRMSNorm, "forward", norm)
    monkeypatch.setattr(stock, "apply_rotary_pos_emb_vision", rotated)
    monkeypatch.setattr("perl.model.weights._from_pretrained", load)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_plain_loop(name: str, folder: Path, tmp_path: Path) -> None:
    changes, settings = CASES[name]
    session = session_of(changes, folder, tmp_path)
    first = weights(session)
    stages = [collected_in(session, stage) for stage in session.stages if stage.kind == "rl"]
    rows = metrics(tmp_path / "run", "rl")

    loop = plain_loop(session, folder, first)
    expected: list[dict[str, float]] = []
    for to, steps in zip(settings, stages, strict=True):
        given = given_by(steps, session.config.permutation.condition)
        updates = list(loop.stage(to, given))
        for step, collected in enumerate(steps):
            own = updates[step * to.updates :][: to.updates]
            means = {key: np.mean([u[key] for u in own]) for key in own[0]}
            rewards = np.concatenate([group.rewards for group in collected.seen])
            expected.append({**means, "reward/mean": np.nanmean(rewards)})

    far = {}
    for row, numbers in zip(rows, expected, strict=True):
        for key, value in numbers.items():
            assert row[key] == pytest.approx(value, rel=1e-10, abs=1e-12), (row["step"], key)
            far[key] = max(far.get(key, 0.0), abs(row[key] - value) / max(abs(value), 0.01))
    # How far apart each weight has ended, for how far it has moved.
    ours, off = weights(session), {}
    for key, weight in loop.model.named_parameters():
        if weight.requires_grad:
            key, weight = key.replace(".linear.", "."), weight.detach()
            off[key] = ((weight - ours[key]).norm() / (weight - first[key]).norm()).item()
    assert max(off.values()) < 1e-10, max(off, key=off.__getitem__)
    assert all(torch.equal(ours[key], first[key]) for key in first.keys() - off)
    assert len(off) == TRAINED.get(name, 26 + 30)
    print(f"{name}: numbers {max(far.values()):.1e}, weights {max(off.values()):.1e}")
    assert min(row["grad_norm"] for row in rows) > 0.5 and max(r["packing/rows"] for r in rows) > 1
    # What is sampled is what is trained on; where the prompt is another one nothing is said of it.
    original = session.config.permutation.condition == "original"
    assert all(abs(row.get("rollout_kl", 0.0)) <= 1e-6 for row in rows)
    assert all(("rollout_kl" in row) != original for row in rows)
    assert {row["correction_mean"] for row in rows} == {1.0}
    for key in PRESENT.get(name, ()):
        assert max(row[key] for row in rows) > 0, f"nothing compared in {key}: take another seed"


def session_of(changes: dict[str, Any], model: Path, tmp_path: Path) -> Session:
    """Of a run over four pictures, all pairs of them; a dozen tokens end a completion, so that lengths differ."""
    sizes = [(28, 28), (56, 28), (28, 84), (56, 56)]
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    row = {
        "kind": "all",
        "question": "A <image> B <image> Which image shows three ?",
        "answer": "A",
    }
    pairs = [[f"{i}.png", f"{j}.png"] for i in range(4) for j in range(4) if i != j]
    lines = [json.dumps({**row, "images": pair}) + "\n" for pair in pairs]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "reward.py").write_text(REWARD)
    given = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "data.jsonl")},
        "reward": {"functions": [f"{tmp_path}/reward.py:f"], "weights": [1.0]},
    }
    recipe: dict[str, Any] = {"stages": changes.get("stages", [])}
    for values in (RECIPE, given, changes):
        recipe |= {k: {**recipe.get(k, {}), **v} for k, v in values.items() if k != "stages"}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    folder = RunFolder(tmp_path / "run")
    folder.make_parts()
    config = load_recipe(str(tmp_path / "recipe.toml"))
    session = Session(config, folder, Display(False), StopSignal())
    session.components.policy.base.generation_config.eos_token_id = list(range(20, 32))
    return session


def collected_in(session: Session, stage: Any) -> list[Collected]:
    """Runs a stage; returns what each of its steps was given."""
    session.enter_stage(stage)
    collector, steps = session.components.collector, []
    collect = collector.collect

    def recorded(*args: Any) -> Collected:
        steps.append(collect(*args))
        return steps[-1]

    collector.collect = recorded  # type: ignore[method-assign]
    reinforce(session, stage)
    return steps


def given_by(steps: Sequence[Collected], condition: str) -> list[tuple[list[Group], list[Group]]]:
    """The groups that each step samples and trains on, without what has no reward."""
    known: dict[Any, Group] = {}
    out = []
    for step, collected in enumerate(steps):
        for group in collected.seen:
            example, samples = group.example, []
            for r, reward in zip(group.rollouts, group.rewards.tolist(), strict=True):
                order = r.variant.order if condition == "permuted" else range(len(example.images))
                images = [example.images[i] for i in order]
                if not math.isnan(reward):
                    samples.append(Sample(example.question, images, r.token_ids.tolist(), reward))
            known[step, group.key] = Group(step, samples)
        sampled = [known[step, group.key] for group in collected.seen]
        out.append((sampled, [known[group.step, group.key] for group in collected.groups]))
    return out


def weights(session: Session) -> dict[str, torch.Tensor]:
    """By the names of the plain loop."""
    peft = (("base_model.model.", ""), (".base_layer.", "."), (".default.weight", ""))
    out = {}
    for name, weight in session.components.policy.model.named_parameters():
        for old, new in (*peft, ("lora_A", "a"), ("lora_B", "b")):
            name = name.replace(old, new)
        out[name] = weight.detach().clone()
    return out


def plain_loop(session: Session, folder: Path, first: dict[str, torch.Tensor]) -> PlainLoop:
    """Of the stock model in the folder, with the run's first adapters."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    config = session.config.model
    model.model.visual.requires_grad_(not config.freeze_vision)
    model.model.language_model.requires_grad_(not config.lora_rank)
    for name in first:
        if name.endswith(".a"):
            path, _, leaf = name.removesuffix(".a").rpartition(".")
            layer, b = model.get_submodule(path), first[name.removesuffix("a") + "b"]
            assert first[name].any() and not b.any()
            scale = config.lora_alpha / config.lora_rank
            adapted = Adapted(getattr(layer, leaf), first[name].clone(), b.clone(), scale)
            setattr(layer, leaf, adapted)
    processor = AutoProcessor.from_pretrained(folder)
    vision = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    never = processor.tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in vision])
    return PlainLoop(model, processor, never)
