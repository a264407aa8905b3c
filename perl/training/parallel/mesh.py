"""Over which processes weights are sharded, and whether they can be."""

from __future__ import annotations

import os

import torch
from torch.distributed.device_mesh import init_device_mesh

from perl.config import Config
from perl.model.loading import check_model, compute_dtype
from perl.model.sharding import Sharding
from perl.model.tiny import TINY_MODELS
from perl.types import UserError


def make_sharding(config: Config, device: torch.device, processes: int) -> Sharding | None:
    """How a run's weights are spread; None: every process holds all of them.

    Args:
        config: of the run.
        device: of this process.
        processes: of the run, on all nodes.

    Raises:
        UserError: they cannot be spread so.
    """
    train = config.train
    if train.sharding == "none":
        return None
    check_sharding(config, processes, device.type == "cuda")
    shards = _shards(config, processes)
    whole = shards == processes
    mesh = init_device_mesh(
        device.type,
        (shards,) if whole else (processes // shards, shards),
        mesh_dim_names=("shard",) if whole else ("replicate", "shard"),
    )
    return Sharding(
        mesh,
        compute_dtype(config.model.dtype, device),
        getattr(torch, train.reduce_dtype),
        train.reshard_after_forward,
        train.cpu_offload,
        train.shard_vision,
    )


def check_sharding(config: Config, processes: int, cuda: bool) -> None:
    """Raise UserError for a sharding that cannot work with so many processes, on GPUs or not, or with the model."""
    train, path = config.train, config.model.path
    if train.sharding == "none":
        if key := next((k for k in ("shard_vision", "cpu_offload") if getattr(train, k)), None):
            raise UserError(
                f"train.{key} does nothing without sharding; set train.sharding = fsdp, or leave it out"
            )
        return
    if processes == 1:
        raise UserError(
            "train.sharding = fsdp spreads weights over the processes of a run, and this one has a single process; start "
            "several with torchrun --nproc-per-node N -m perl ..., or give --train.sharding none, which perl-rl resume takes, too"
        )
    if train.cpu_offload and not cuda:
        raise UserError(
            "train.cpu_offload moves weights from GPUs to the host's memory, and no GPU is there; leave it out"
        )
    shards = _shards(config, processes)
    if shards < 2 or processes % shards:
        what = f"train.shards = {shards}" if train.shards else f"a node's {shards} processes"
        raise UserError(
            f"{what} cannot hold a copy of the weights together in a run of {processes} processes; set train.shards to a "
            f"divisor of {processes} above 1"
        )
    if path not in TINY_MODELS and check_model(path) is None:
        raise UserError(
            f"train.sharding = fsdp: {path} is trained on padded batches, which is not sharded; leave train.sharding out, or "
            "write a family for the model (docs/models.md)"
        )


def _shards(config: Config, processes: int) -> int:
    """Processes that hold a copy together."""
    return config.train.shards or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
