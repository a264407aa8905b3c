"""Liger's kernels behind a transformers language model: the same values and gradients, nothing left out."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perl.model.layers import check_liger, use_liger
from perl.model.tiny import TINY_MODELS
from perl.types import UserError

functional = pytest.importorskip("liger_kernel.transformers.functional")

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
    name: str, language_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY_MODELS)
def test_liger_s_kernels_compute_the_same(name: str, language_model: Callable[..., Any]) -> None:
    model = language_model(name, torch.float32, "cuda")
    expected = outputs(model, torch.float32, "cuda")
    assert use_liger(model) == PARTS
    assert far(outputs(model, torch.float32, "cuda"), expected) < 1e-4


def test_where_liger_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"model\.liger needs a GPU, this run is on cpu"):
        check_liger(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs liger-kernel: pip install"):
        check_liger(torch.device("cuda"))
