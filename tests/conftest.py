"""What holds for every test: seeded, few threads, no network, uninitialised memory is NaN."""

from __future__ import annotations

import os

# Read when transformers, datasets and tokenizers are imported, hence before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable

import torch

# Read when Triton is imported, hence also before everything else: without a GPU its kernels are
# interpreted, and `backend="triton"` works on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest

# A busy machine is not a failure, and CI runs the same examples each time.
hypothesis.settings.register_profile("perl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("perl")

torch.set_num_threads(min(torch.get_num_threads(), 8))


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Triton's interpreter replaces the functions of triton.language anew for every device function
    that is called, which takes most of its time; mostly they have been replaced already."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
        from triton.runtime.errors import InterpreterError
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        language = self.fn.__globals__.get("core") or self.fn.__globals__.get("tl")
        if core.is_builtin(getattr(language, "where", core.where)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _nan_filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if result.is_floating_point() or result.is_complex():
            result.detach().fill_(float("nan"))
        return result

    return allocate_nan


@pytest.fixture(autouse=True)
def _uninitialised_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves an element of its output unwritten gives NaN, not what lay there before."""
    monkeypatch.setattr(torch, "empty", _nan_filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _nan_filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _nan_filled(torch.Tensor.new_empty))
