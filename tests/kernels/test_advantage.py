"""group_advantages against a loop over groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_kernels import GroupedRewards, PolicyLoss, group_advantages, policy_loss
from tests.kernels.call import BACKENDS, DEVICE, Call
from tests.kernels.naive import naive_advantages
from tests.messages import refused

NAN = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**9))
def test_any_groups(backend: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def choice(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    # Larger than what a kernel looks at at once, too.
    many = torch.tensor([37, *[1, 0, 3] * 7])
    sizes = choice(torch.randint(0, 6, (choice(1, 4),), generator=generator), many)
    count, columns = int(sizes.sum()), choice(1, 3)
    # Their sums are exact: no order of a sum decides whether two rollouts have the same reward.
    rewards = torch.randint(-2, 3, (count, columns), generator=generator) / 4
    rewards[torch.rand(count, columns, generator=generator) < choice(0.0, 0.3)] = torch.nan
    options = {
        "scale": choice("group", "batch", "none"),
        "baseline": choice("mean", "leave_one_out"),
        "unbiased": choice(True, False),
        "eps": choice(1e-6, 1e-4),
        "combine": choice("sum_then_normalize", "normalize_then_sum"),
        "reward_weights": choice(None, [0.5, 2.0, 1.0][:columns]),
    }
    wide = backend != "triton"
    rewards = rewards.to(DEVICE, torch.float64 if wide else torch.float32)
    wanted = naive_advantages(rewards, sizes, **options)
    found = group_advantages(rewards, sizes.to(DEVICE), backend=backend, **options)
    rtol = 1e-9 if wide else 2e-7
    for got, expected in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-9)
    assert torch.equal(found.active, wanted.active)


def test_statistics_of_each_group() -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 0.1, 0.1, 0.1, 3.0])
    mean, std, active = group_advantages(rewards, torch.tensor([3, 3, 0, 1]))[1:]
    torch.testing.assert_close(mean, torch.tensor([0.5, 0.1, 0.0, 3.0]))
    torch.testing.assert_close(std, torch.tensor([0.5**0.5, 0.0, 0.0, 0.0]))
    assert active.tolist() == [True, False, False, False]
    population = group_advantages(rewards, [3, 3, 0, 1], unbiased=False)
    torch.testing.assert_close(population.std[0], torch.tensor(0.5))


def test_equal_rewards_give_exactly_zero() -> None:
    """The rounded mean of equal numbers may differ from them; eps must not make that a signal."""
    rewards = torch.full((7,), 0.1)
    for scale in ("group", "batch", "none"):
        ours = group_advantages(rewards, [7], scale=scale, eps=0.0)
        assert (ours.advantages == 0).all() and not ours.active.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_reward_or_weight_is_not_hidden(backend: Any) -> None:
    rewards = torch.tensor([1.0, float("inf"), 1.0, 0.0], device=DEVICE)
    ours = group_advantages(rewards, [2, 2], backend=backend)
    assert ours.advantages[:2].isnan().all() and ours.advantages[2:].isfinite().all()
    for combine in ("sum_then_normalize", "normalize_then_sum"):
        table = torch.tensor([[1.0, 0.0], [0.0, NAN], [0.0, 1.0]], device=DEVICE)
        broken = {"reward_weights": [1.0, NAN], "combine": combine, "backend": backend}
        assert group_advantages(table, [3], **broken).advantages.isnan().all()


def test_dtypes() -> None:
    for dtype, wanted in ((torch.bool, torch.float32), (torch.float64, torch.float64)):
        assert group_advantages(torch.ones(4).to(dtype), [4]).advantages.dtype == wanted
    assert group_advantages(torch.empty(0), []).advantages.shape == (0,)


def test_several_rewards_summed() -> None:
    table = torch.tensor([[1.0, 0.2], [0.0, NAN], [NAN, NAN], [1.0, 0.4]], dtype=torch.float64)
    ours = group_advantages(table, [4], reward_weights=[0.9, 0.5])
    total = torch.tensor([1.0, 0.0, NAN, 1.1], dtype=torch.float64)
    torch.testing.assert_close(ours.advantages, group_advantages(total, [4]).advantages)


def test_several_rewards_normalised_first() -> None:
    torch.manual_seed(3)
    table = torch.rand(6, 2, dtype=torch.float64)
    ours = group_advantages(
        table, [3, 3], reward_weights=[1.0, 2.0], combine="normalize_then_sum", eps=1e-4
    )
    grouped = table.reshape(2, 3, 2)
    mean, std = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
    each = ((grouped - mean) / (std + 1e-4)).reshape(6, 2)
    total = each[:, 0] + 2 * each[:, 1]
    torch.testing.assert_close(
        ours.advantages, (total - total.mean()) / (total.std() + 1e-4), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        # what came, what is wanted
        ({"group_sizes": [2, 1]}, ValueError, (3, 4)),
        ({"group_sizes": [5, -1]}, ValueError, (-1, 0)),
        ({"group_sizes": []}, ValueError, (4,)),
        ({"group_sizes": [2.0, 2.0]}, ValueError, ("torch.float32", "[P]")),
        ({"group_sizes": [[2, 2]]}, ValueError, ([1, 2], "[P]")),
        ({"scale": "std"}, ValueError, ("'std'", "group", "batch", "none")),
        ({"baseline": "median"}, ValueError, ("'median'", "mean", "leave_one_out")),
        ({"combine": "max"}, ValueError, ("'max'", "sum_then_normalize", "normalize_then_sum")),
        ({"eps": -1.0}, ValueError, (-1.0, 0)),
        ({"eps": NAN}, ValueError, ("nan", 0)),
        ({"eps": "a"}, TypeError, ("str",)),
        ({"rewards": [1.0, 2.0, 3.0, 4.0]}, TypeError, ("list", "tensor")),
        ({"rewards": torch.ones(4, 1, 1)}, ValueError, ([4, 1, 1], "[B]", "[B, R]")),
        ({"rewards": torch.ones(())}, ValueError, ([], "[B]", "[B, R]")),
        ({"rewards": torch.ones(4, dtype=torch.complex64)}, ValueError, ("[B]",)),
        ({"reward_weights": [1.0, 2.0]}, ValueError, ([2], [1])),
        ({"reward_weights": []}, ValueError, ([0], [1])),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], names: tuple[Any, ...]) -> None:
    given = {"rewards": torch.ones(4), "group_sizes": [2, 2], **arguments}
    for function in (group_advantages, lambda **given: GroupedRewards(**given).checked()):
        with refused(next(iter(arguments)), *names, error=error):
            function(**given)


def test_rewards_of_a_matrix_of_groups() -> None:
    """[P, G] looks like [B, R]: what to write is said, and only where it helps."""
    with refused("group_sizes", 2, 6, "rewards.flatten()", error=ValueError):
        group_advantages(torch.ones(2, 3), [3, 3])
    for rewards, sizes in ((torch.ones(2, 3), [3]), (torch.ones(6), [3])):
        with pytest.raises(ValueError) as caught:
            group_advantages(rewards, sizes)
        assert "flatten" not in str(caught.value)


def test_rewards_are_constants() -> None:
    """Also those that a model has given: no gradient flows to it."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], requires_grad=True)
    assert not any(x.requires_grad for x in group_advantages(rewards, [2, 2]))
    weights = torch.nn.Parameter(torch.ones(2))
    given = (torch.rand(4, 2, requires_grad=True), [4])
    assert not any(x.requires_grad for x in group_advantages(*given, reward_weights=weights))
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    given = (GroupedRewards(rewards, [2, 2], scale="none"), torch.arange(5), PolicyLoss())
    policy_loss(logprobs, *given).loss.backward()
    # -A / 4 with a ratio of 1, A the distance from the group's mean
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.125, 0.125, 0.1875, -0.1875]))
    assert rewards.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_are_normalised_within_the_loss(backend: str) -> None:
    call = Call(backend)
    rewards = torch.tensor(
        [[0.1, 1.0], [0.7, 0.0], [float("nan"), 1.0], [0.2, 0.5], [0.9, float("nan")]],
        device=DEVICE,
    )
    for name, options in (
        ("perl", {}),
        ("gspo", {"scale": "batch", "unbiased": False, "reward_weights": [1.0, 0.3]}),
        ("perl", {"scale": "none", "baseline": "leave_one_out"}),
        ("gspo", {"combine": "normalize_then_sum"}),
    ):
        grouped = GroupedRewards(rewards, call.sizes, **options)
        apart = group_advantages(rewards, call.sizes, backend="torch", **options).advantages
        inside, outside = (
            call.run("linear_grpo_loss", PolicyLoss.preset(name), advantages=advantages)
            for advantages in (grouped, apart)
        )
        torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_layout_and_dtype(backend: Any) -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], device=DEVICE)
    wanted = group_advantages(rewards, [4], reward_weights=[1.0, 0.25]).advantages
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        table = torch.tensor([[1.0, 9.0], [0.25, 9.0]], dtype=dtype, device=DEVICE)
        found = group_advantages(rewards, [4], reward_weights=table[:, 0], backend=backend)
        torch.testing.assert_close(found.advantages, wanted)
