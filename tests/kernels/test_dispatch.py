"""Which backend serves a call, how much of it is looked at, and how many rows are worked on at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl_kernels import dispatch, head
from tests.messages import refused

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One with a Hopper GPU, Triton, no native library, and nothing set in the environment."""
    for name in ("TRITON_INTERPRET", "PERL_BACKEND", "PERL_CHECKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(dispatch, "_NATIVE", (False, "not built"))
    return monkeypatch


def tensor(device: torch.device, dtype: torch.dtype = SINGLE) -> Any:
    return SimpleNamespace(device=device, dtype=dtype)


def test_a_gpu_of_amd(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.version, "hip", "6.4")
    assert dispatch.select_backend("auto", tensor(CUDA)) == "torch"
    with refused("'triton'", "CUDA", error=ValueError):
        dispatch.select_backend("triton", tensor(CUDA))


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "chosen"),
    [
        ((9, 0), CUDA, SINGLE, "triton"),
        ((8, 0), CUDA, HALF, "triton"),
        ((7, 5), CUDA, SINGLE, "torch"),
        ((9, 0), CUDA, DOUBLE, "torch"),
        ((9, 0), CPU, SINGLE, "torch"),
    ],
)
def test_automatic(
    capability: Any, device: Any, dtype: Any, chosen: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.select_backend("auto", tensor(device, dtype)) == chosen
    # What is asked for is given, or refused.
    assert dispatch.select_backend("torch", tensor(device, dtype)) == "torch"
    if chosen == "triton":
        assert dispatch.select_backend("triton", tensor(device, dtype)) == "triton"
    else:
        why = {"fp64": dtype == DOUBLE, "sm_75": capability == (7, 5), "cpu": device == CPU}
        named = [name for name, holds in why.items() if holds]
        with refused("'triton'", *named, error=ValueError):
            dispatch.select_backend("triton", tensor(device, dtype))


def test_native_rows_are_for_a_cpu(machine: pytest.MonkeyPatch) -> None:
    with refused("'native'", "not built", error=ValueError):
        dispatch.select_backend("native", tensor(CPU), SINGLE)
    machine.setattr(dispatch, "_NATIVE", (True, "C++"))
    chosen = [
        dispatch.select_backend("auto", tensor(device), rows)
        for device, rows in ((CPU, SINGLE), (CPU, HALF), (CPU, DOUBLE), (CUDA, SINGLE))
    ]
    assert chosen == ["native", "native", "torch", "triton"]
    with refused("'native'", "torch.float64", "fp32", "bf16", error=ValueError):
        dispatch.select_backend("native", tensor(CPU), DOUBLE)
    with refused("'native'", "cuda", error=ValueError):
        dispatch.select_backend("native", tensor(CUDA), SINGLE)
    # Without logits nothing of it is needed.
    assert dispatch.select_backend("native", tensor(CPU, DOUBLE)) == "native"


def test_the_environment_decides_what_is_left_open(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("PERL_BACKEND", "torch")
    assert dispatch.select_backend("auto", tensor(CUDA)) == "torch"
    assert dispatch.select_backend("triton", tensor(CUDA)) == "triton"
    machine.setenv("PERL_BACKEND", "")
    assert dispatch.select_backend("auto", tensor(CUDA)) == "triton"


def test_without_a_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert [name for name, (there, _) in dispatch.available_backends().items() if there] == [
        "torch"
    ]
    assert dispatch.select_backend("auto", tensor(CPU)) == "torch"
    with refused("'triton'", "CUDA", "TRITON_INTERPRET", error=ValueError):
        dispatch.select_backend("triton", tensor(CPU))
    # Interpreted it runs anywhere, for who asks.
    machine.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select_backend("auto", tensor(CPU)) == "torch"
    assert dispatch.select_backend("triton", tensor(CPU)) == "triton"
    with refused("'triton'", "fp64", "backend='torch'", error=ValueError):
        dispatch.select_backend("triton", tensor(CPU, DOUBLE))
    machine.setattr(dispatch, "_TRITON_INSTALLED", False)
    with refused("'triton'", "pip", error=ValueError):
        dispatch.select_backend("triton", tensor(CPU))


def test_values_that_are_looked_at(machine: pytest.MonkeyPatch) -> None:
    assert dispatch.values_visible(tensor(CPU)) and not dispatch.values_visible(tensor(CUDA))
    machine.setenv("PERL_CHECKS", "1")
    assert dispatch.values_visible(tensor(CUDA))
    machine.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not dispatch.values_visible(tensor(CPU))


@pytest.mark.parametrize(
    ("n_tokens", "vocab", "dtype", "device", "given", "rows"),
    [
        (1000, 10, SINGLE, CPU, {"chunk_size": 7}, 7),
        # 16 MiB hold 110, but at least 512: 2 blocks of 500, rounded up to tiles of 128
        (1000, 152_064, SINGLE, CPU, {}, 512),
        # they hold 2097: all in one, as they are
        (400, 4000, HALF, CPU, {}, 400),
        # 2 blocks of 2048 are as many tiles
        (4096, 4000, HALF, CPU, {}, 2048),
        # a 32nd of 141 GB holds 14,499: 3 blocks of 13,334, rounded up
        (40_000, 151_936, HALF, CUDA, {}, 13_440),
        (14_000, 151_936, HALF, CUDA, {}, 14_000),
        # 25 rows: 3 equal blocks of 60
        (60, 10, SINGLE, CPU, {"memory_budget": 1000}, 20),
        (60, 10, HALF, CUDA, {"memory_budget": 1000}, 30),
        (5, 10, SINGLE, CPU, {"memory_budget": 1}, 1),
        (0, 10, SINGLE, CPU, {}, 1),
        (10, 0, SINGLE, CPU, {"memory_budget": 100}, 10),
    ],
)
def test_rows_of_a_block(
    n_tokens: int,
    vocab: int,
    dtype: Any,
    device: Any,
    given: dict[str, int],
    rows: int,
    machine: pytest.MonkeyPatch,
) -> None:
    memory = SimpleNamespace(total_memory=141 * 10**9)
    machine.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert head.block_rows(n_tokens, vocab, dtype, device, **given) == rows
