"""Weights in shards over the processes of a run, by PyTorch's fully_shard; whole for a while where forwards are not in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Sharding:
    """How the weights of a policy are spread."""

    mesh: DeviceMesh
    """Of one dimension, or of two: copies, and the processes that hold one together."""
    dtype: torch.dtype
    """Of the weights when they are whole; those that are trained lie in shards of float32."""
    reduce_dtype: torch.dtype = torch.float32
    """That gradients are summed over processes in."""
    reshard_after_forward: bool = True
    """Whether a layer's weights are let go of between its forward and its backward, and gathered again."""
    cpu_offload: bool = False
    """Whether shards, their gradients and the optimizer's state lie in the host's memory."""
    vision: bool = False
    """Whether the vision tower is sharded too, not kept whole by every process."""

    @property
    def device(self) -> torch.device:
        """That is computed on."""
        if self.mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.mesh.device_type)


def shard(policy: Any, sharding: Sharding) -> None:
    """Spread the weights of a policy, in place: each decoder layer by itself, and what lies around the layers together.

    Gradients are summed over the processes, not averaged, as losses come divided by the whole step's count.
    """
    tower = policy.vision.weights
    kept = set() if sharding.vision else set(tower)
    for p in policy.parameters():
        if p.requires_grad and p not in kept:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    settings: dict[str, Any] = {
        "mesh": sharding.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.dtype,
            reduce_dtype=sharding.reduce_dtype,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
        "ignored_params": kept,
    }
    layers = list(policy.core.language_model.layers)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **settings)
    # Embeddings and head are gathered once a micro-batch: from the forward to the end of the backward.
    fully_shard(policy, reshard_after_forward=False, **settings)
    for part in _parts(policy):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    policy.sharding = sharding


@contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """All weights whole in every process, in the dtype that is computed in; no forward in the block waits for another process.

    All processes enter it together. Without sharding, and inside another such block, nothing is done.
    """
    sharding: Sharding | None = policy.sharding
    parts = _parts(policy)
    if sharding is None or not isinstance(policy.head_weight, DTensor):
        yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(
                part is not policy and sharding.reshard_after_forward, recurse=False
            )
            part.reshard()


def _parts(policy: nn.Module) -> list[FSDPModule]:
    return [m for m in policy.modules() if isinstance(m, FSDPModule)]
