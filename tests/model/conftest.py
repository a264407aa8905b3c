"""Tiny models, loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor

CONFIG = ModelConfig(max_pixels=28 * 28 * 16)


@pytest.fixture
def load(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Policy, Processor]]:
    """A function from a tiny model's name or a folder to its policy in float64 and its processor."""

    def load(model: str | Path, config: ModelConfig = CONFIG) -> tuple[Policy, Processor]:
        folder = str(model if isinstance(model, Path) else tiny_folder(model))
        policy = load_policy(folder, config, torch.device("cpu")).double()
        return policy, load_processor(folder, config)

    return load
