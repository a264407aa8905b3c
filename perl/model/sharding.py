"""Weights in shards over the processes of a run, by PyTorch's fully_shard; whole for a while where forwards are not in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Partial


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


def spread(sharding: Sharding | None, processes: int) -> str:
    """Where the weights of a run of so many processes lie, in words: `in shards over 8 processes`."""
    if processes == 1:
        return "whole, in one process"
    if sharding is None:
        return f"whole in each of {processes} processes"
    shards = sharding.mesh.size(-1)
    if shards == processes:
        return f"in shards over {processes} processes"
    return f"in {processes // shards} copies of {shards} shards, over {processes} processes"


def shard(policy: Any, sharding: Sharding) -> None:
    """Spread the weights of a policy, in place: each decoder layer by itself, and what lies around the layers together.

    All processes call it; the weights are those of the first one, whose copy is let go of part by part, and the others'
    may lie on the meta device. Gradients are summed over the processes, not averaged, as losses come divided by the whole
    step's count.
    """
    source, tower = _Source(policy), policy.family.tower(policy.core)
    for part in tower:
        source.bring(part, sharding.device, wide=sharding.vision)
    policy.vision.take_weights()
    settings: dict[str, Any] = {
        "mesh": sharding.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.dtype,
            reduce_dtype=sharding.reduce_dtype,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
        "ignored_params": set() if sharding.vision else set(policy.vision.weights),
    }
    if sharding.vision:
        for part in tower:
            fully_shard(part, reshard_after_forward=False, **settings)
            part.set_reshard_after_backward(False)
        policy.vision.take_weights()
    for layer in policy.core.language_model.layers:
        source.bring(layer, sharding.device, wide=True)
        fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **settings)
    source.bring(policy, sharding.device, wide=True)
    # Embeddings and head are gathered once a micro-batch: from the forward to the end of the backward.
    fully_shard(policy, reshard_after_forward=False, **settings)
    for part in _parts(policy):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    # Else a layer or a block of the tower that runs first takes itself for the root.
    policy._get_fsdp_state()._lazy_init()
    policy.sharding = sharding


class _Source:
    """The first process's weights and buffers, for all of them."""

    def __init__(self, policy: Any) -> None:
        # Also buffers that model folders leave out, as the frequencies of rotary embeddings.
        tensors = dict(chain(policy.named_parameters(), policy.named_buffers()))
        facts = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        # Files have told the first process which tokens end a text, too.
        known: list[Any] = [facts, policy.base.generation_config]
        dist.broadcast_object_list(known)
        theirs, policy.base.generation_config = known
        if theirs.keys() != facts.keys():
            raise RuntimeError(
                f"the first process has another model: {min(theirs.keys() ^ facts.keys())}"
            )
        self._facts = {id(tensors[name]): fact for name, fact in theirs.items()}

    def bring(self, part: nn.Module, device: torch.device, wide: bool = False) -> None:
        """Give a part of the policy the first process's weights; what has been brought before stays.

        Args:
            part: in place.
            device: that they are put on.
            wide: whether those that are trained become float32.
        """
        brought: dict[int, torch.Tensor] = {}
        for module in part.modules():
            for held in cast(Any, (module._parameters, module._buffers)):
                for name, tensor in held.items():
                    if id(tensor) in self._facts:
                        brought[id(tensor)] = self._broadcast(tensor, device, wide)
                    held[name] = brought.get(id(tensor), tensor)  # Tied ones stay one.

    def _broadcast(self, tensor: torch.Tensor, device: torch.device, wide: bool) -> torch.Tensor:
        shape, dtype = self._facts.pop(id(tensor))
        if dist.get_rank() == 0:
            whole = tensor.detach().to(device).contiguous()
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole, 0)
        if not isinstance(tensor, nn.Parameter):
            return whole
        if wide and tensor.requires_grad:
            whole = whole.to(torch.promote_types(dtype, torch.float32))
        return nn.Parameter(whole, tensor.requires_grad)


@contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """All weights whole in every process, in the dtype that is computed in; no forward in the block waits for another process.

    All processes enter it together. Without sharding, and inside another such block, nothing is done.
    """
    sharding: Sharding | None = policy.sharding
    if sharding is None or not isinstance(policy.head_weight, DTensor):
        yield
        return
    parts, layers = _parts(policy), policy.core.language_model.layers
    for layer in layers:
        layer.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(sharding.reshard_after_forward)
        _end_forwards(policy, parts)


@contextmanager
def tower_gathered(policy: Any) -> Iterator[None]:
    """A sharded vision tower whole in every process for the micro-batches of an optimizer step, which show it images or none.

    All processes enter and leave it together. What the block's backwards give the tower adds up in float32 and becomes the
    shards' gradient at its end, summed over processes. Nothing is done where the tower is not sharded.
    """
    sharding: Sharding | None = policy.sharding
    if sharding is None or not sharding.vision:
        yield
        return
    parts, sums = policy.family.tower(policy.core), {}

    def add(weight: torch.Tensor) -> None:
        grad = cast(torch.Tensor, weight.grad).float()
        sums[weight] = sums[weight].add_(grad) if weight in sums else grad
        weight.grad = None

    for part in parts:
        part.unshard()
    pairs = [
        (shards, weight)
        for shards, weight in zip(
            policy.vision.weights, chain(*(part.parameters() for part in parts)), strict=True
        )
        if weight.requires_grad
    ]
    hooks = [weight.register_post_accumulate_grad_hook(add) for _, weight in pairs]
    try:
        yield
        for shards, weight in pairs:
            own = sums.pop(weight, None)
            if own is None:
                own = torch.zeros_like(weight, dtype=torch.float32)
            own = own.to(sharding.reduce_dtype)
            everywhere = DTensor.from_local(own, sharding.mesh, [Partial()] * sharding.mesh.ndim)
            summed = everywhere.redistribute(placements=shards.placements)
            shards.grad = summed.to(shards.dtype).to(shards.device)
    finally:
        for hook in hooks:
            hook.remove()
        for part in parts:
            part.reshard()


def _end_forwards(policy: Any, parts: Sequence[FSDPModule]) -> None:
    """All weights in shards again, also behind a forward that an error has ended; without what fully_shard notes of
    forwards until their backward, which never comes."""
    root = policy._get_fsdp_state()
    root._state_ctx.iter_forward_root = None
    root._comm_ctx.post_forward_order.clear()
    for part in parts:
        state: Any = part._get_fsdp_state()
        group = state._fsdp_param_group
        state._training_state = group._training_state = TrainingState.IDLE
        group._post_forward_indices.clear()
        part.reshard()


def _parts(policy: nn.Module) -> list[FSDPModule]:
    return [m for m in policy.modules() if isinstance(m, FSDPModule)]
