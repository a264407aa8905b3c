"""Which processes hold a copy of the weights together, and shardings that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl.config import Config, ModelConfig, TrainConfig
from perl.model.sharding import Sharding, spread
from perl.training.parallel import mesh
from perl.training.parallel.mesh import check_sharding, check_shared, make_sharding
from tests.messages import refused


def config_of(path: str = "tiny-qwen2.5-vl", sharding: Any = "fsdp", **train: Any) -> Config:
    return replace(
        Config(), model=ModelConfig(path=path), train=TrainConfig(sharding=sharding, **train)
    )


@pytest.mark.parametrize(
    ("processes", "node", "shards", "expected"),
    [
        (8, None, 0, ((8,), ("shard",))),
        (8, 8, 0, ((8,), ("shard",))),
        (16, 8, 0, ((2, 8), ("replicate", "shard"))),
        (16, 8, 16, ((16,), ("shard",))),
        (8, 8, 2, ((4, 2), ("replicate", "shard"))),
    ],
)
def test_a_copy_of_the_weights_lies_in_a_node_or_in_as_many_processes_as_asked_for(
    processes: int,
    node: int | None,
    shards: int,
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    monkeypatch.setattr(
        mesh, "init_device_mesh", lambda kind, shape, mesh_dim_names: (kind, shape, mesh_dim_names)
    )
    made: Any = make_sharding(config_of(shards=shards), torch.device("cpu"), processes)
    assert made.mesh == ("cpu", *expected)
    assert make_sharding(config_of(sharding="none"), torch.device("cpu"), processes) is None


@pytest.mark.parametrize(
    ("train", "processes", "node", "names"),
    [
        ({}, 1, 1, ["train.sharding = fsdp", "torchrun --nproc-per-node N", "perl-rl resume"]),
        ({"cpu_offload": True}, 2, 2, ["train.cpu_offload"]),
        ({"shards": 3}, 8, 8, ["train.shards = 3", "8"]),
        ({"shards": 1}, 8, 8, ["train.shards = 1"]),
        ({"shards": 16}, 8, 8, ["train.shards = 16"]),
        ({}, 4, 1, ["train.shards", "4"]),
        ({}, 12, 8, ["train.shards", "12"]),
        ({"sharding": "none", "shards": 2}, 2, 2, ["train.shards", "fsdp"]),
        ({"sharding": "none", "shard_vision": True}, 2, 2, ["train.shard_vision", "fsdp"]),
        ({"sharding": "none", "cpu_offload": True}, 2, 2, ["train.cpu_offload", "fsdp"]),
    ],
)
def test_a_sharding_that_cannot_work(
    train: dict[str, Any],
    processes: int,
    node: int,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    with refused(*names):
        check_sharding(config_of(**train), processes, cuda=False)


def test_padded_batches_are_not_sharded(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    good = tiny_folder("tiny-qwen2.5-vl")
    check_sharding(config_of(str(good), shards=2), 2, cuda=False)
    for file in good.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = (good / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    # The family is known, its windows are not packed.
    windowed = config.replace('"full_attention"', '"sliding_attention"')
    assert windowed != config
    (tmp_path / "config.json").write_text(windowed)
    with refused("train.sharding = fsdp", tmp_path, "docs/models.md"):
        check_sharding(config_of(str(tmp_path), shards=2), 2, cuda=False)


@pytest.mark.parametrize(
    ("shards", "processes", "said"),
    [
        (0, 1, "whole, in one process"),
        (0, 4, "whole in each of 4 processes"),
        (8, 8, "in shards over 8 processes"),
        (2, 8, "in 4 copies of 2 shards, over 8 processes"),
    ],
)
def test_where_weights_lie_in_words(shards: int, processes: int, said: str) -> None:
    over: Any = SimpleNamespace(size=lambda _: shards)
    sharding = Sharding(over, torch.bfloat16) if shards else None
    assert spread(sharding, processes) == said


@pytest.mark.parametrize("processes", [1, 3, 6])
def test_examples_are_shared_out_or_refused(processes: int) -> None:
    config = replace(config_of(), train=TrainConfig(examples_per_step=6))
    check_shared(config, processes)
    with refused("train.examples_per_step = 6", "4 processes"):
        check_shared(config, 4)
