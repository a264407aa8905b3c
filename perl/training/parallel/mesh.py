"""Over which processes weights are sharded, and whether they can be."""

from __future__ import annotations

import os

import torch
from torch.distributed.device_mesh import init_device_mesh

from perl.config import Config, TrainConfig
from perl.model.loading import check_model, compute_dtype
from perl.model.sharding import Sharding
from perl.model.tiny import TINY_MODELS
from perl.recipe import plan
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
    shards = train.shards or _here(processes)
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
    check_shards(train, processes, _here(processes))
    if train.sharding == "none":
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
    if path not in TINY_MODELS and check_model(path) is None:
        raise UserError(
            f"train.sharding = fsdp: {path} is trained on padded batches, which is not sharded; leave train.sharding out, or "
            "write a family for the model (docs/models.md)"
        )


def check_shards(train: TrainConfig, processes: int, here: int) -> None:
    """Raise UserError if several processes, `here` of them on one node, cannot hold copies of the weights so, or if no key
    asks for shards that others tell about."""
    if train.sharding == "none":
        keys = ("shards", "shard_vision", "cpu_offload")
        if key := next((k for k in keys if getattr(train, k)), None):
            raise UserError(
                f"train.{key} does nothing without sharding; set train.sharding = fsdp, or leave it out"
            )
        return
    shards = train.shards or here
    if processes > 1 and (shards < 2 or processes % shards):
        what = f"train.shards = {shards}" if train.shards else f"a node's {shards} processes"
        raise UserError(
            f"{what} cannot hold a copy of the weights together in a run of {processes} processes; set train.shards to a "
            f"divisor of {processes} above 1"
        )


def check_shared(config: Config, processes: int) -> None:
    """Raise UserError if the examples of some stage's step cannot be shared out."""
    for stage in plan(config):
        count = stage.config.train.examples_per_step
        if stage.kind == "rl" and count % processes:
            where = f"stage {stage.name}: " if config.stages else ""
            raise UserError(
                f"{where}train.examples_per_step = {count} cannot be shared by {processes} processes; make it a multiple, or "
                "start a number of them that divides it"
            )


def _here(processes: int) -> int:
    """Processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))
