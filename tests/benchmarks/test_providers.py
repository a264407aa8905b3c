"""What the benchmarks call of other packages computes what is asked, at sizes that an interpreter manages."""

from __future__ import annotations

import contextlib
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import providers
from benchmarks.harness.contest import Provider, Refused, Unavailable
from benchmarks.harness.head_problem import (
    Head,
    HeadProblem,
    Level,
    LogitsLogprobsProblem,
    LogitsProblem,
    LogprobsProblem,
    make_problem,
)
from benchmarks.providers import common, cut_cross_entropy, liger, quack, trl, verl
from tests.kernels.downloads import release
from tests.messages import refused, tells

SIZE = Head("tiny", N=32, H=128, V=300, itemsize=4)
PEERS = (liger, trl, verl, cut_cross_entropy, quack)
LOSSES: list[tuple[Level, bool]] = [("token", False), ("token", True), ("sequence", False)]


def problem(kind: Any, level: Level = "token", frozen: bool = False) -> Any:
    return make_problem(kind, SIZE, torch.device("cpu"), level=level, frozen=frozen)


def prove(provider: Provider, contested: Any) -> None:
    """As a benchmark does it, and once more: what a call has used up is restored."""
    asked = provider.asked(contested)
    run = provider.prepare(asked)
    for _ in range(2):
        if run.reset:
            run.reset()
        asked.prove(run.read(run.call()), provider.omits)


def of(package: str, contest: str = "LINEAR_LOSS") -> list[Provider]:
    return [p for p in getattr(providers, contest) if p.package == package]


def prove_package(package: str, expect: int) -> None:
    """Every provider of a package in every contest; `expect` of them can take part."""
    took_part = 0
    for kind, name, losses in (
        (HeadProblem, "LINEAR_LOSS", LOSSES),
        (LogprobsProblem, "LOGPROBS", LOSSES[:1]),
        (LogitsProblem, "LOGITS_LOSS", [LOSSES[0], LOSSES[2]]),
        (LogitsLogprobsProblem, "LOGITS_LOGPROBS", LOSSES[:1]),
    ):
        for provider in of(package, name):
            for level, frozen in losses:
                with contextlib.suppress(Unavailable):
                    prove(provider, problem(kind, level, frozen))
                    took_part += 1
    assert took_part == expect


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for GPUs run in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, the benchmarks prove the kernels themselves")
    pytest.importorskip("triton")
    monkeypatch.setattr(common, "need_cuda", lambda tensor: None)


@pytest.fixture
def eager() -> Any:
    """Nothing is compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path) -> Any:
    """Makes a release importable where none is installed."""
    cache = getattr(pytestconfig, "cache", None)
    downloads = cache.mkdir("releases") if cache else tmp_path
    before = dict(sys.modules)

    def unpacked(requirement: str) -> None:
        if find_spec(requirement.partition("==")[0].replace("-", "_")):
            return
        archive = release(requirement, downloads, "--only-binary", ":all:")
        zipfile.ZipFile(archive).extractall(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)

    yield unpacked
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("verl", "cut_cross_entropy"):
            del sys.modules[name]


def test_every_contest_names_its_providers_once() -> None:
    for name in ("LINEAR_LOSS", "LOGPROBS", "LOGITS_LOSS", "LOGITS_LOGPROBS"):
        every = getattr(providers, name)
        names = [provider.name for provider in every]
        assert len(set(names)) == len(names)
        assert {provider.package for provider in every} >= {"", "torch", "liger-kernel", "trl"}


def test_liger(interpreted: None, eager: None) -> None:
    pytest.importorskip("liger_kernel")
    prove_package("liger-kernel", 2 * 3 + 1 + 2 + 1)


def test_trl() -> None:
    pytest.importorskip("trl.trainer.utils")
    prove_package("trl", 3 + 1 + 2 * 2 + 2)


def test_trl_kernels(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.setattr(chunked, "_use_triton", lambda device: True)
    prove_package("trl", 3 + 1 + 3 * 2 + 3)


def test_trl_kernels_without_what_its_trainers_import(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "trl.trainer.utils", raising=False)
    try:
        prove(of("trl")[0], problem(HeadProblem))
        assert vars(sys.modules["trl.trainer.utils"]).keys() >= {"maybe_gather_lm_head_ctx"}
        assert not hasattr(sys.modules["trl.trainer.utils"], "selective_log_softmax")
    finally:
        sys.modules.pop("trl.trainer.utils", None)


def test_verl(wheel: Any) -> None:
    wheel("verl==0.9.1")
    prove_package("verl", 3 + 1)


def test_verl_kernels(interpreted: None, wheel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel("verl==0.9.1")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: contextlib.nullcontext())
    prove(of("verl")[0], problem(HeadProblem))


def test_cut_cross_entropy(wheel: Any, eager: None) -> None:
    wheel("cut-cross-entropy==25.1.1")
    prove_package("cut-cross-entropy", 3 + 1)


def test_cut_cross_entropy_kernels(
    interpreted: None, wheel: Any, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton import language as tl

    wheel("cut-cross-entropy==25.1.1")
    import cut_cross_entropy.tl_utils as utils

    @triton.jit
    def log1p(x):
        return tl.log(1.0 + x)

    # The interpreter has no libdevice.
    monkeypatch.setattr(utils, "tl_log1p", log1p)
    p = problem(HeadProblem)
    # Its backward pass takes 16 bits alone, and the interpreter multiplies no bfloat16.
    half = {
        name: getattr(p, name).detach().half().requires_grad_() for name in ("hidden", "weight")
    }
    for provider in of("cut-cross-entropy")[:2]:
        prove(provider, replace(p, **half))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def cross_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    """QuACK's functions as they are called, in PyTorch: its kernels run on a GPU alone."""

    def cross_entropy(
        x: Tensor, target: Tensor, *, reduction: str = "mean", inplace_backward: bool = False
    ) -> Tensor:
        return F.cross_entropy(x, target, reduction=reduction)

    def linear(x: Tensor, weight: Tensor, bias: None, target: Tensor, **options: Any) -> Tensor:
        return cross_entropy(F.linear(x, weight, bias), target, **options)

    def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    stand_in(monkeypatch, "quack", cross_entropy=cross_entropy)
    functions = {"linear_cross_entropy_func": linear, "chunked_linear_cross_entropy": chunked}
    stand_in(monkeypatch, "quack.linear_cross_entropy", **functions)


def test_quack(interpreted: None, cross_entropies: None) -> None:
    # Its chunks take no part at the sequence level.
    prove_package("quack-kernels", 3 + 2 + 1 + 2 + 1)


def test_a_smaller_result_is_not_taken_for_the_loss(
    interpreted: None, cross_entropies: None
) -> None:
    """QuACK's chunks are proven as the cross entropy that they are."""
    _, chunked = of("quack-kernels")
    with refused("loss", error=Refused):
        prove(replace(chunked, asked=lambda contested: contested), problem(HeadProblem))
    tells(chunked.note, "cross entropy")


@pytest.mark.parametrize("module", PEERS, ids=lambda module: module._PACKAGE)
def test_what_is_not_installed_says_so(
    module: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("liger_kernel", "trl", "verl", "cut_cross_entropy", "quack"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    for provider in of(module._PACKAGE):
        with refused("pip install", provider.package, error=Unavailable):
            provider.prepare(problem(HeadProblem))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_for_a_gpu_say_so() -> None:
    for provider in (*of("quack-kernels"), *of("cut-cross-entropy")[:2]):
        with refused("GPU", error=Unavailable):
            provider.prepare(problem(HeadProblem))
