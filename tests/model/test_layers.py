"""Faster decoder layers compute the same: compiled ones, without compilation after the first steps, and Liger's kernels."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from perl.config import ModelConfig
from perl.model.layers import (
    check_compiler,
    check_liger,
    checkpoint_layers,
    choose_layers,
    compile_layers,
    use_liger,
)
from perl.model.packed.pack import pack_row
from perl.model.policy import Policy
from perl.model.tiny import TINY_MODELS, TINY_QWEN
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import EncodedPrompt, Message, PackedBatch, Segment
from tests.messages import refused, tells
from tests.model.steps import segments_of, shared_step, stock_model

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
        batches.append(pack_row(segments))
    return batches


def step(policy: Policy, batch: PackedBatch) -> list[torch.Tensor]:
    policy.zero_grad()
    hidden = policy(batch)
    hidden.square().sum().backward()
    layers = policy.core.language_model.layers
    return [hidden.detach(), *(p.grad.clone() for p in layers.parameters())]


@pytest.mark.parametrize(
    ("name", "checkpointing", "backend"),
    [("tiny-qwen2.5-vl", 0.0, "eager"), ("tiny-qwen3-vl", 0.5, "aot_eager")],
)
def test_no_step_compiles_after_the_first(
    name: str, checkpointing: float, backend: str, load
) -> None:
    torch._dynamo.reset()
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    plain, compiled = (load(name, config)[0].float().train() for _ in range(2))
    counter = CompileCounterWithBackend(backend)
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


@pytest.mark.parametrize(("lora", "compiled"), [(0, False), (2, False), (2, True)])
def test_a_share_of_the_layers_is_computed_again_and_the_gradients_stay(
    lora: int, compiled: bool, load
) -> None:
    """Of four decoder layers and the three of the tower."""
    torch._dynamo.reset()
    again: list[str] = []

    def gradients(share: float) -> dict[str, Tensor]:
        again.clear()
        torch.manual_seed(0)
        policy, processor = load(
            TINY_QWEN[0], replace(CONFIG, gradient_checkpointing=share, lora_rank=lora)
        )
        if compiled:
            compile_layers(policy.core.language_model, "eager")
        for name, module in policy.core.named_modules():
            if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
                module._gradient_checkpointing_func = partial(noted, name, checkpoint)
        shared_step(policy.train(), segments_of(processor), 1000)
        return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    def noted(name: str, checkpoint: Callable[..., Any], *given: Any) -> Any:
        again.append(name)
        return checkpoint(*given)

    expected = gradients(0.0)
    assert again == [] and len(expected) > 60
    for share, decoder, tower in (
        (0.3, [3], [2]),
        (0.5, [1, 3], [1, 2]),
        (1.0, range(4), range(3)),
    ):
        found = gradients(share)
        assert again == [
            *(f"visual.blocks.{i}" for i in tower),
            *(f"language_model.layers.{i}" for i in decoder),
        ]
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_all_layers_or_none_where_they_cannot_be_told_apart() -> None:
    class Old(torch.nn.Linear):
        given: Any = None

        def activation_checkpointing_enable(self, options: dict[str, Any]) -> None:
            self.given = options

        gradient_checkpointing_enable = activation_checkpointing_enable

    with refused("model.gradient_checkpointing = 0.5", "Old", "0 or 1"):
        checkpoint_layers(Old(1, 1), 0.5)
    checkpoint_layers(model := Old(1, 1), 1.0)
    assert model.given == {"use_reentrant": False}


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("liger", "compiled", "device", "has", "chosen", "names"),
    [
        ("auto", "auto", CPU, "liger gcc g++", (False, False), ["transformers", "GPU"]),
        ("auto", "auto", CUDA, "liger gcc g++", (True, False), ["Liger", "installed"]),
        ("auto", "auto", CUDA, "gcc g++", (False, True), ["compiled", "liger-kernel"]),
        ("auto", "auto", CUDA, "liger g++", (False, False), ["transformers", "C", "Triton"]),
        (False, "auto", CUDA, "g++", (False, False), ["transformers", "C", "Triton"]),
        ("auto", "auto", CUDA, "gcc", (False, False), ["transformers", "liger-kernel", "C++"]),
        ("auto", False, CUDA, "gcc g++", (False, False), ["liger-kernel", "model.compile"]),
        (False, "auto", CUDA, "liger gcc g++", (False, True), ["compiled", "model.liger"]),
        (False, False, CUDA, "liger gcc g++", (False, False), ["model.liger", "model.compile"]),
        ("auto", True, CUDA, "liger gcc g++", (False, True), ["compiled", "asked"]),
        (True, "auto", CUDA, "liger gcc g++", (True, False), ["Liger", "asked"]),
        (True, True, CUDA, "liger gcc g++", (True, True), ["Liger", "compiled", "asked"]),
        ("auto", True, CPU, "g++", (False, True), ["compiled", "asked"]),
    ],
)
def test_what_makes_the_layers_faster(
    liger: Any, compiled: Any, device: torch.device, has: str, chosen: tuple[bool, bool],
    names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in has.split():
        (tmp_path / name).touch(mode=0o755)
    there = object() if "liger" in has.split() else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    *found, said = choose_layers(liger, compiled, device)
    assert tuple(found) == chosen
    tells(said, *names)
    if chosen == (False, False) and device == CUDA:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with refused("model.liger"):
            choose_layers(True, compiled, device)


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("model.compile", "g++", "clang++", "PATH"):
        check_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    check_compiler()


def test_generation_runs_uncompiled(load) -> None:
    policy, processor = load("tiny-qwen2.5-vl", replace(CONFIG, compile=True))
    compile_layers(policy.core.language_model, never)
    prompt = processor.encode_messages((Message("user", "which image ?"),), ())
    [[completion]] = InProcessEngine(policy, processor, 2**12).generate(
        [prompt], SamplingParams(1, 0.0, 3), seed=0
    )
    assert len(completion.token_ids) > 0
    with pytest.raises(Exception, match="compiled"):
        policy(pack_row([Segment(prompt, (completion.token_ids,), (1.0,))]))


def never(graph: object, inputs: object) -> Callable[..., Any]:
    raise RuntimeError("compiled")


PARTS = ["RMSNorm", "SwiGLU", "RoPE"]


def rms_norm(
    X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool
) -> Tensor:
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    return F.rms_norm(X, W.shape, W, eps)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)

    return rotated(q), rotated(k)


def mrope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int], unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Older transformers hand over one cosine for each axis."""
    parts = [*mrope_section, *mrope_section]
    cos, sin = (
        torch.cat([x[i % 3] for i, x in enumerate(t.split(parts, -1))], -1) for t in (cos, sin)
    )
    return rope(q, k, cos, sin)


STAND_INS = {
    "liger_rms_norm": rms_norm,
    "liger_swiglu": swiglu,
    "liger_rope": rope,
    "liger_qwen2vl_mrope": mrope,
}


@pytest.fixture
def functional() -> Any:
    return pytest.importorskip("liger_kernel.transformers.functional")


@pytest.fixture
def language_model(tiny_folder: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Loads a tiny model's decoder; what Liger replaces in transformers' files is put back."""
    from transformers import AutoModelForImageTextToText

    saved: list[tuple[Any, str, Any]] = []

    def load(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
        model = AutoModelForImageTextToText.from_pretrained(tiny_folder(name), dtype=dtype)
        decoder = model.model.language_model.to(device)
        file = sys.modules[type(decoder.layers[0].self_attn).__module__]
        saved.extend(
            (file, n, getattr(file, n))
            for n in dir(file)
            if n.startswith("apply_") and "rotary" in n
        )
        return decoder

    yield load
    for file, name, function in saved:
        setattr(file, name, function)


def outputs(model: Any, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, model.config.hidden_size, generator=generator).to(device, dtype)
    upstream = torch.randn(x.shape, generator=generator).to(device, dtype)
    model.zero_grad()
    hidden = model(inputs_embeds=x, use_cache=False).last_hidden_state
    hidden.backward(upstream)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


def far(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(((got[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_layer_is_replaced_and_computes_the_same(
    name: str, functional: Any, language_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins of the same signatures, as Liger's kernels need a GPU."""
    calls: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)

        return call

    for function, stand_in in STAND_INS.items():
        real = list(inspect.signature(getattr(functional, function)).parameters)
        assert real[: len(inspect.signature(stand_in).parameters)] == list(
            inspect.signature(stand_in).parameters
        )
        monkeypatch.setattr(functional, function, counted(function, stand_in))
    model = language_model(name, torch.float64)
    expected = outputs(model, torch.float64)
    assert use_liger(model) == PARTS
    assert far(outputs(model, torch.float64), expected) < 1e-6  # transformers' norms are in fp32
    layers = len(model.layers)
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    rotations = calls.pop("liger_rope", 0) + calls.pop("liger_qwen2vl_mrope", 0)
    assert calls == {"liger_rms_norm": norms, "liger_swiglu": layers} and rotations == layers


class Float(float):
    """A number as Triton's compiler hands it to a kernel; its interpreter hands over Python's."""

    def to(self, dtype: Any) -> float:
        return self


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-internvl"])
def test_liger_s_kernels_compute_the_same_in_triton_s_interpreter(
    name: str, functional: Any, language_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: the interpreter has no bfloat16, and no functions of CUDA's library."""
    if torch.cuda.is_available():
        pytest.skip("they run as they are")
    from liger_kernel.ops import rms_norm as file
    from triton import language
    from triton.runtime import interpreter

    handed_over = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter,
        "_implicit_cvt",
        lambda x: Float(x) if isinstance(x, float) else handed_over(x),
    )
    monkeypatch.setattr(file, "rsqrt", lambda x: language.rsqrt(x))
    model = language_model(name, torch.float32)
    expected = outputs(model, torch.float32)
    assert use_liger(model) == PARTS
    assert far(outputs(model, torch.float32), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY_MODELS)
def test_liger_s_kernels_compute_the_same(name: str, functional: Any, language_model) -> None:
    model = language_model(name, torch.float32, "cuda")
    expected = outputs(model, torch.float32, "cuda")
    assert use_liger(model) == PARTS
    assert far(outputs(model, torch.float32, "cuda"), expected) < 1e-4


def test_where_liger_cannot_run(functional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refused("model.liger", "cpu"):
        check_liger(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("model.liger", "liger-kernel", "pip install"):
        check_liger(torch.device("cuda"))


@pytest.mark.parametrize("name", TINY_QWEN)
def test_patches_are_embedded_by_a_matrix_product(
    name: str, load, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients of the stock model's Conv3d, under the same names, without a convolution."""

    def embedded(visual: Any) -> list[Any]:
        embed = visual.patch_embed
        generator = torch.Generator().manual_seed(0)
        patches, upstream = (
            torch.randn(7, n, generator=generator, dtype=torch.float64)
            for n in (embed.proj.weight[0].numel(), embed.embed_dim)
        )
        patches.requires_grad_()
        out = embed(patches)
        out.backward(upstream)
        return [out, patches.grad, *(p.grad for p in embed.parameters())]

    stock: Any = stock_model(tiny_folder(name))
    policy, _ = load(name)
    expected = embedded(stock.model.visual)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", never)
    found = embedded(policy.core.visual)
    assert len(found) == len(expected) >= 3
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    assert policy.model.state_dict().keys() == stock.state_dict().keys()
