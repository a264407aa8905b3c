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
from perl.model.layers import uncompiled
from perl.types import PackedBatch, UserError
from tests.training.test_optimizer import STEPS, batch, optimizer_of
from tests.training.threads import in_threads
from tests.training.two_tokens import TwoTokens


class InShards(TwoTokens):
    """Its head is gathered in the forward, and its gradient summed in the backward, as fully_shard does; its gain is whole."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not isinstance(found, DTensor):
            return found
        return found.full_tensor(grad_placements=[Partial()] * found.device_mesh.ndim)


class Sharded(InShards):
    def __init__(self, *logits: float, copies: int = 0) -> None:
        super().__init__(*logits)
        world = torch.distributed.get_world_size()
        shape = (copies, world // copies) if copies else (world,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        placed = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        self.head_weight = nn.Parameter(distribute_tensor(self.head_weight.detach(), mesh, placed))


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


class Wide(InShards):
    """Its head has a row of 512 for each of 8 tokens, so that its moments are kept in 8 bits; of one feature, 0.5."""

    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        head = torch.randn(8, 512, generator=draw) / 8
        if mesh is not None:
            head = distribute_tensor(head, mesh, [Shard(0)])
        self.head_weight = nn.Parameter(head)

    def forward(self, batch: PackedBatch, features: Any = None) -> torch.Tensor:
        return (self.gain / 2).expand(batch.num_scored, 512)


def eight_bit_steps(
    policy: TwoTokens, accelerator: Any = None, kind: str = "adamw_8bit", steps: int = 3
) -> Any:
    optimizer = optimizer_of(policy, accelerator, optimizer=kind, lr=0.01, weight_decay=0.1)
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for number in range(steps):
        rows = [batch([([3, 4], 1.0)]), batch([([number], -0.5)]), batch([([7, 2], 0.25)])]
        mine = rows[rank::count]
        mine += [batch([([], 0.0)])] * (math.ceil(3 / count) - len(mine))
        optimizer.step(number, mine, SUPERVISED)
    return optimizer


def test_moments_in_8_bits_step_as_those_in_32_within_their_rounding() -> None:
    pytest.importorskip("torchao")
    wide, exact = Wide(), Wide()
    # What is stepped by is what is then rounded.
    optimizer = eight_bit_steps(wide, steps=1)
    reference = eight_bit_steps(exact, kind="adamw", steps=1)
    assert torch.allclose(wide.head_weight, exact.head_weight, rtol=0, atol=1e-7)
    state, other = optimizer.state(), reference.state()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "head_weight/step": (torch.float32, ()),
        "head_weight/exp_avg/codes": (torch.uint8, (8, 512)),
        "head_weight/exp_avg/scale": (torch.float32, (8, 2)),
        "head_weight/exp_avg_sq/codes": (torch.uint8, (8, 512)),
        "head_weight/exp_avg_sq/scale": (torch.float32, (8, 2)),
        **{f"gain/{key}": (torch.float32, (1,)) for key in ("exp_avg", "exp_avg_sq")},
        "gain/step": (torch.float32, ()),
    }
    # A block's scale is its largest element, here all of them, which is code 255, or 0 where it is negative.
    mean = other["head_weight/exp_avg"]
    scale = state["head_weight/exp_avg/scale"]
    assert torch.allclose(scale, mean.view(8, 2, 256).abs().amax(-1), rtol=1e-6, atol=0)
    assert torch.equal(state["head_weight/exp_avg/codes"], torch.where(mean > 0, 255, 0))
    # Small weights have moments of float32.
    assert state["gain/exp_avg"].item() == pytest.approx(other["gain/exp_avg"].item(), rel=1e-6)
    moved = (exact.head_weight - Wide().head_weight).abs().max()
    wide, exact = Wide(), Wide()
    eight_bit_steps(wide), eight_bit_steps(exact, kind="adamw")
    assert 0 < (wide.head_weight - exact.head_weight).abs().max() < moved / 5


def test_moments_on_the_host_are_saved_and_restored_where_they_lie() -> None:
    """Of weights whose processes talk through GPUs: a checkpoint is read into what the optimizer gives out."""

    def same(accelerator: Any) -> bool:
        policy = Sharded(1.0, 2.0)
        optimizer = optimizer_of(policy, accelerator)
        (weight,) = (w for w in optimizer.masters if isinstance(w, DTensor))
        weight.device_mesh._device_type = "meta"  # Any other than that of the moments.
        for name, tensor in optimizer.state().items():
            if name == "head_weight/exp_avg" and isinstance(tensor, DTensor):
                tensor.to_local().fill_(3.0)
        return bool((optimizer.adamw.state[optimizer._stepped[weight]]["exp_avg"] == 3.0).all())

    assert in_threads(2, same) == [True, True]


@pytest.mark.parametrize("processes", [3, 9])
def test_moments_in_8_bits_do_not_depend_on_how_many_processes_have_them(processes: int) -> None:
    """Of 8 rows each has 3 or 2; 1 or none. Codes and scales saved by one number of processes serve any other."""
    pytest.importorskip("torchao")

    def steps(accelerator: Any) -> Any:
        policy = Wide(init_device_mesh("cpu", (processes,)))
        state = eight_bit_steps(policy, accelerator).state()
        assert all(
            isinstance(t, DTensor) for n, t in state.items() if "head" in n and "step" not in n
        )
        return policy.head_weight.detach(), {name: whole(tensor) for name, tensor in state.items()}

    one = Wide()
    expected = {name: whole(tensor) for name, tensor in eight_bit_steps(one).state().items()}
    with uncompiled():  # One thread would switch compilation on again for the others.
        found = in_threads(processes, steps)
    for weight, state in found:
        assert torch.allclose(weight, one.head_weight, rtol=1e-5, atol=1e-6)
        assert state.keys() == expected.keys()
        for name, values in state.items():
            # Sums that cancel differ with the order of the processes.
            near = pytest.approx(expected[name], rel=1e-3, abs=1.0 if "codes" in name else 1e-9)
            assert values == near
