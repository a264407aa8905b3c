"""What holds for every test: seeded, few threads, no network, uninitialised memory is NaN."""

from __future__ import annotations

import os

# Read when transformers, datasets and tokenizers are imported, hence before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import torch

# A busy machine is not a failure, and CI runs the same examples each time.
hypothesis.settings.register_profile("perl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("perl")

torch.set_num_threads(min(torch.get_num_threads(), 8))


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
