"""Gradients over the processes of a run: summed where every process has the whole weight, their norm over whole and sharded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

_BUCKET_BYTES = 2**25
"""Of gradients that are copied together to be summed at once: small ones would cost a latency each."""


def sum_over_processes(weights: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of weights that every process has whole, in place.

    fully_shard sums those of sharded weights in the backward.

    Args:
        weights: the same in all processes, also where one has no gradient, which is then made.
    """
    for bucket in _buckets(weights):
        if len(bucket) == 1:
            torch.distributed.all_reduce(bucket[0])
            continue
        flat = torch.cat([grad.flatten() for grad in bucket])
        torch.distributed.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in bucket])
        summed = [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)]
        cast(Any, torch)._foreach_copy_(bucket, summed)


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Gradients that are summed together; one as large as a bucket is summed by itself, where it lies."""
    bucket: list[torch.Tensor] = []
    for weight in weights:
        # All processes reduce the same tensors in the same order, also one whose micro-batches did not use them.
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        full = sum(grad.nbytes for grad in bucket) + weight.grad.nbytes > _BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != weight.dtype):
            yield bucket
            bucket = []
        bucket.append(weight.grad)
    if bucket:
        yield bucket


def total_norm(weights: Mapping[torch.Tensor, nn.Parameter], device: torch.device) -> torch.Tensor:
    """The norm of the whole gradient, float32 [] and the same in all processes.

    Args:
        weights: each with what has this process's gradient of it: itself, its master or its shard.
        device: that processes reduce on.
    """
    shards = [weight for weight in weights if isinstance(weight, DTensor)]
    here = [(w, p.grad) for w, p in weights.items() if p.grad is not None]
    total = torch.nn.utils.get_total_norm([g for w, g in here if not isinstance(w, DTensor)])
    if not shards:
        return total
    own = torch.nn.utils.get_total_norm([g for w, g in here if isinstance(w, DTensor)])
    square = own.to(device, torch.float64).square()
    torch.distributed.all_reduce(square)
    # Over hybrid meshes every copy of the weights has been counted.
    square /= torch.distributed.get_world_size() / shards[0].device_mesh.size(-1)
    return (square + total.to(device, torch.float64).square()).sqrt().float()


def as_sharded(
    local: torch.Tensor, weight: torch.Tensor, shape: Sequence[int] | None = None
) -> torch.Tensor:
    """What has a row for each row of a weight, given this process's rows: a DTensor where the weight is one.

    Args:
        local: contiguous.
        weight: whose rows it is spread as.
        shape: of the whole; left out: the weight's.
    """
    if not isinstance(weight, DTensor):
        return local
    size = torch.Size(shape or weight.shape)
    facts = TensorMeta(size, torch.empty(size, device="meta").stride(), local.dtype)
    # from_local gives a copy on the mesh's device of what lies on the host.
    spec = DTensorSpec(weight.device_mesh, weight.placements, facts)
    return DTensor(local, spec, requires_grad=False)
