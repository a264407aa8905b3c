"""Compiled decoder layers: the same values and gradients, and no compilation after the first steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from perl.config import ModelConfig
from perl.model.layers import check_compiler, compile_layers
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import EncodedPrompt, Message, PackedBatch, Segment, UserError

CONFIG = ModelConfig()


def text(rng: np.random.Generator, length: int, axes: int) -> EncodedPrompt:
    positions = np.tile(np.arange(length), (axes, 1))
    return EncodedPrompt(rng.integers(20, 60, length), positions, length, (), -1)


def rows(axes: int) -> list[PackedBatch]:
    """Rows of different lengths and layouts: one piece, even ones, shared prompts."""
    rng = np.random.default_rng(0)
    shapes = [
        [(9, (4,))],
        [(5, (3, 2)), (7, (4,))],
        [(11, (1, 6)), (3, (2, 2)), (4, (3,))],
        [(13, (2, 3, 4, 5))],
    ]
    batches = []
    for shape in shapes:
        segments = [
            Segment(
                text(rng, prompt, axes),
                tuple(rng.integers(20, 60, n) for n in lengths),
                (1.0,) * len(lengths),
            )
            for prompt, lengths in shape
        ]
        batches.append(Policy.pack(None, segments, 1000, True)[0])  # type: ignore[arg-type]
    return batches


def step(policy: Policy, batch: PackedBatch) -> list[torch.Tensor]:
    policy.zero_grad()
    hidden = policy(batch)
    hidden.square().sum().backward()
    layers = policy.core.language_model.layers
    return [hidden.detach(), *(p.grad.clone() for p in layers.parameters())]


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("tiny-qwen2.5-vl", False), ("tiny-qwen3-vl", True)]
)
def test_no_step_compiles_after_the_first(
    name: str, checkpointing: bool, tiny_folder: Callable[[str], Path]
) -> None:
    torch._dynamo.reset()
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    plain = load_policy(str(tiny_folder(name)), config, torch.device("cpu")).train()
    compiled = load_policy(str(tiny_folder(name)), config, torch.device("cpu")).train()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(compiled.core.language_model, counter)
    batches = rows(3)
    frames = []
    for batch in batches:
        for got, expected in zip(step(compiled, batch), step(plain, batch), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), plain(batch), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames[1:] == [frames[1]] * (len(batches) - 1), frames
    assert dict(compiled.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.compile needs a C\+\+ compiler.*leave it off"):
        check_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    check_compiler()


def test_generation_runs_uncompiled(tiny_folder: Callable[[str], Path]) -> None:
    config = replace(CONFIG, compile=True)
    folder = str(tiny_folder("tiny-qwen2.5-vl"))
    policy = load_policy(folder, config, torch.device("cpu"))
    compile_layers(policy.core.language_model, never)
    processor = load_processor(folder, config)
    prompt = processor.encode_messages((Message("user", "which image ?"),), ())
    [[completion]] = InProcessEngine(policy, processor, 4).generate(
        [prompt], SamplingParams(1, 0.0, 3), seed=0
    )
    assert len(completion.token_ids) > 0
    with pytest.raises(Exception, match="compiled"):
        policy(Policy.pack(None, [Segment(prompt, (completion.token_ids,), (1.0,))], 99, True)[0])  # type: ignore[arg-type]


def never(graph: object, inputs: object) -> Callable[..., Any]:
    raise RuntimeError("compiled")
