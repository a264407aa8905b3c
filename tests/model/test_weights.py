"""Models that lie over others: a run's checkpoints and LoRA adapters, loaded as the model that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.config import Config, ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.sources import layers_of
from perl.recipe import save_config
from perl.training.checkpoint import CheckpointManager, Progress

CPU = torch.device("cpu")
LORA = {"lora_rank": 2, "lora_alpha": 3.0}
Folder = Callable[[str], Path]


def trained(path: Path | str, **model: Any) -> Policy:
    """A policy whose trained weights are others than those of its model."""
    torch.manual_seed(0)
    policy = load_policy(str(path), ModelConfig(path=str(path), **model), CPU)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return policy


def checkpoint_of(policy: Policy, run: Path, **model: Any) -> Path:
    """The checkpoint of a run that has come to this policy."""
    run.mkdir()
    save_config(Config(model=ModelConfig(**model)), run / "config.toml")
    return CheckpointManager(run / "checkpoints", 1).save(policy, None, Progress("rl", 5))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(str(path), ModelConfig(path=str(path)), CPU)
    assert all(p.requires_grad for p in policy.parameters())
    return policy.state_dict()


def exported(policy: Policy, folder: Path, processor: Path) -> Path:
    policy.save_pretrained(folder)
    load_processor(str(processor), ModelConfig()).save(folder)
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"freeze_vision": True, "gradient_checkpointing": True},
        LORA,
        {**LORA, "freeze_vision": True},
    ],
    ids=["all", "frozen tower", "adapters and tower", "adapters"],
)
def test_a_checkpoint_is_the_model_that_would_be_exported(
    model: dict[str, Any], tmp_path: Path, tiny_folder: Folder
) -> None:
    base = tiny_folder("tiny-qwen2.5-vl")
    policy = trained(base, **model)
    checkpoint = checkpoint_of(policy, tmp_path / "run", path=str(base), **model)
    assert layers_of(str(tmp_path / "run")) == [str(checkpoint), str(base)]
    weights = weights_of(checkpoint)
    assert same(weights, weights_of(exported(policy, tmp_path / "final", base)))
    assert not same(weights, weights_of(base))
