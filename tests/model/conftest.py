"""Tiny models, loaded."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from tests.model.steps import Logprobs, naive_step, segments_of, stock_model

CONFIG = ModelConfig(max_pixels=28 * 28 * 16)


@pytest.fixture
def load(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Policy, Processor]]:
    """A function from a tiny model's name or a folder to its policy in float64 and its processor."""

    def load(model: str | Path, config: ModelConfig = CONFIG) -> tuple[Policy, Processor]:
        folder = str(model if isinstance(model, Path) else tiny_folder(model))
        policy = load_policy(folder, config, torch.device("cpu")).double()
        return policy, load_processor(folder, config)

    return load


@pytest.fixture(scope="session")
def stock_step(
    tiny_folder: Callable[[str], Path],
) -> Callable[[str], tuple[nn.Module, Logprobs]]:
    """A function from a tiny model's name to the stock model with the gradients of `naive_step`, and its log-probs."""

    @cache
    def step(name: str) -> tuple[nn.Module, Logprobs]:
        folder = tiny_folder(name)
        model = stock_model(folder)
        logprobs = naive_step(model, segments_of(load_processor(str(folder), CONFIG)))
        assert all(p.grad is not None for p in model.parameters())
        return model, logprobs

    return step
