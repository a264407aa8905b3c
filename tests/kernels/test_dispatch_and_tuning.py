"""Which backend serves a call, how much of it is looked at, and how many rows are worked on at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl_kernels import dispatch, tuning
from tests.messages import refused

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One with a Hopper GPU, Triton, and nothing set in the environment."""
    for name in ("TRITON_INTERPRET", "PERL_BACKEND", "PERL_CHECKS", "PERL_PERSISTENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    return monkeypatch


def tensor(device: torch.device, dtype: torch.dtype = SINGLE) -> Any:
    return SimpleNamespace(device=device, dtype=dtype)


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
    ("n_tokens", "vocab", "dtype", "device", "chunk_size", "budget", "rows"),
    [
        (1000, 10, SINGLE, CPU, 7, None, 7),
        # 4 MiB hold 13 rows; at least 128, of 8 blocks of 125 rounded up
        (1000, 152_064, HALF, CPU, None, None, 128),
        # 4 MiB hold 262: 2 blocks of 200 are 256 each
        (400, 4000, SINGLE, CPU, None, None, 256),
        # 1280 MiB hold 4416: 3 blocks of 3334, rounded up to tiles of 128
        (10_000, 151_936, HALF, CUDA, None, None, 3456),
        # they hold 2208, which rounded up are too many
        (2208, 151_936, SINGLE, CUDA, None, None, 2208),
        # 25 rows: 3 equal blocks of 60
        (60, 10, SINGLE, CPU, None, 1000, 20),
        (60, 10, HALF, CUDA, None, 1000, 30),
        (5, 10, SINGLE, CPU, None, 1, 1),
        (0, 10, SINGLE, CPU, None, None, 1),
        (10, 0, SINGLE, CPU, None, 100, 10),
    ],
)
def test_rows_of_a_block(
    n_tokens: int, vocab: int, dtype: Any, device: Any, chunk_size: Any, budget: Any, rows: int
) -> None:
    assert tuning.head_rows(n_tokens, vocab, dtype, device, chunk_size, budget) == rows


def test_rows_of_logits_that_are_there() -> None:
    """All of them in Triton; in PyTorch as many as make 32 MiB in fp32, but at least 16."""
    assert [tuning.logits_rows(n, 152_064, "triton") for n in (1000, 0)] == [1000, 1]
    assert [tuning.logits_rows(1000, v, "torch") for v in (152_064, 10**6, 0)] == [55, 16, 2**23]


def test_persistent_kernel_is_asked_for(machine: pytest.MonkeyPatch) -> None:
    assert not tuning.persistent_wanted()
    for value, wanted in (("1", True), ("0", False)):
        machine.setenv("PERL_PERSISTENT", value)
        assert tuning.persistent_wanted() == wanted


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 100)],
)
def test_architecture(capability: Any, built_for: int, machine: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("perl_kernels.triton_backend.launch", reason="needs triton")
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.architecture.__wrapped__(CUDA) == built_for
    assert launch.architecture.__wrapped__(CPU) == 90
