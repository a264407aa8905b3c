"""Optimizer steps over weights in shards: the numbers of one process that has all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from perl.model.head import SUPERVISED
from perl.types import UserError
from tests.training.test_optimizer import STEPS, batch, optimizer_of
from tests.training.threads import in_threads
from tests.training.two_tokens import TwoTokens


class Sharded(TwoTokens):
    """Its head lies in shards, gathered in the forward and summed in the backward as fully_shard does; its gain whole."""

    def __init__(self, *logits: float, copies: int = 0) -> None:
        super().__init__(*logits)
        world = torch.distributed.get_world_size()
        shape, names = (
            ((copies, world // copies), ("copy", "shard")) if copies else ((world,), ("shard",))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        placed = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        self.head_weight = nn.Parameter(distribute_tensor(self.head_weight.detach(), mesh, placed))

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not isinstance(found, DTensor):
            return found
        return found.full_tensor(grad_placements=[Partial()] * found.device_mesh.ndim)


def values_of(policy: TwoTokens) -> list[float]:
    return [*policy.head_weight.flatten().tolist(), *policy.gain.tolist()]


def whole(tensor: torch.Tensor) -> list[float]:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.flatten().tolist()


@pytest.mark.parametrize(("processes", "copies"), [(2, 0), (4, 2), (4, 0)])
def test_weights_in_shards_take_the_steps_of_whole_ones(processes: int, copies: int) -> None:
    """A row without tokens fills up a process that has fewer; of four without copies two hold nothing of the head."""

    def steps(policy: TwoTokens, accelerator: Any, index: int, count: int) -> list[Any]:
        optimizer = optimizer_of(policy, accelerator, max_grad_norm=0.05, weight_decay=0.5)
        out = []
        for number, rows in enumerate(STEPS):
            mine = [batch(micro) for micro in rows[index::count]]
            mine += [batch([([], 0.0)])] * (math.ceil(len(rows) / count) - len(mine))
            metrics = optimizer.step(number, mine, SUPERVISED)
            state = {name: whole(tensor) for name, tensor in optimizer.state().items()}
            out.append((metrics, values_of(policy), state))
        assert all(p.grad is None for p in policy.parameters())
        return out

    expected = steps(TwoTokens(0.3, -0.2), None, 0, 1)
    found = in_threads(
        processes,
        lambda accelerator: steps(
            Sharded(0.3, -0.2, copies=copies), accelerator, accelerator.process_index, processes
        ),
    )
    for own in found:
        assert own == found[0]
        for (metrics, weights, state), (metrics_1, weights_1, state_1) in zip(
            own, expected, strict=True
        ):
            assert metrics == pytest.approx(metrics_1, rel=1e-6)
            assert weights == pytest.approx(weights_1, rel=1e-6)
            assert state.keys() == state_1.keys()
            for name, values in state.items():
                assert values == pytest.approx(values_1 := state_1[name], rel=1e-6), values_1


def test_a_gradient_that_is_not_finite_in_one_shard_stops_all_processes() -> None:
    def step(accelerator: Any) -> list[float]:
        policy = Sharded(0.3, -0.2)
        optimizer = optimizer_of(policy, accelerator)
        advantage = math.inf if accelerator.process_index else 1.0
        with pytest.raises(UserError, match="optimizer step 8 is not finite"):
            optimizer.step(7, [batch([([1], advantage)])], SUPERVISED)
        assert optimizer.updates == 0 and policy.gain.grad is None
        return values_of(policy)

    assert in_threads(2, step) == [pytest.approx([0.3, -0.2, 1.0])] * 2


def test_state_is_copied_into() -> None:
    policy, other = TwoTokens(0.3, -0.2), TwoTokens(0.3, -0.2)
    optimizer, fresh = optimizer_of(policy), optimizer_of(other)
    optimizer.step(0, [batch(STEPS[0][0])], SUPERVISED)
    for name, tensor in fresh.state().items():
        assert not tensor.any()
        tensor.copy_(optimizer.state()[name])
    other.load_state_dict(policy.state_dict())
    for each in (optimizer, fresh):
        each.step(1, [batch(STEPS[1][0])], SUPERVISED)
    assert values_of(other) == values_of(policy)
