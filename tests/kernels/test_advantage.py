"""group_advantages against a loop over groups in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_kernels import GroupedRewards, PolicyLoss, group_advantages, policy_loss, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NAN = float("nan")


def looped(
    rewards: np.ndarray,
    sizes: list[int],
    scale: str,
    baseline: str,
    unbiased: bool,
    eps: float,
) -> np.ndarray:
    known = rewards[~np.isnan(rewards)]

    def deviation(values: np.ndarray) -> float:
        ddof = int(unbiased)
        return float(np.std(values, ddof=ddof)) if len(values) > ddof else 0.0

    result, start = np.zeros(len(rewards)), 0
    for size in sizes:
        group = rewards[start : start + size]
        scored = [i for i in range(size) if not math.isnan(group[i])]
        values = group[scored]
        for i in scored:
            others = [group[j] for j in scored if j != i]
            if not others or len(set(values)) == 1:
                continue
            base = np.mean(values) if baseline == "mean" else np.mean(others)
            by = {"none": 1.0, "group": deviation(values), "batch": deviation(known)}[scale]
            result[start + i] = (group[i] - base) / (by + (0 if scale == "none" else eps))
        start += size
    return result


reward = st.one_of(
    st.sampled_from([0.0, 1.0, 0.1, 0.9, NAN]), st.floats(-10, 10).map(lambda x: round(x, 3))
)


@settings(deadline=None, max_examples=150)
@given(
    groups=st.lists(st.lists(reward, max_size=6), min_size=1, max_size=5),
    scale=st.sampled_from(["group", "batch", "none"]),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    unbiased=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-4]),
)
def test_any_groups(
    groups: list[list[float]], scale: Any, baseline: Any, unbiased: bool, eps: float
) -> None:
    flat = np.array([r for group in groups for r in group], dtype=np.float64)
    sizes = [len(group) for group in groups]
    ours = group_advantages(
        torch.from_numpy(flat), sizes, scale=scale, baseline=baseline, unbiased=unbiased, eps=eps
    )
    wanted = looped(flat, sizes, scale, baseline, unbiased, eps)
    np.testing.assert_allclose(ours.advantages.numpy(), wanted, rtol=1e-7, atol=1e-9)
    distinct = [len({r for r in group if not math.isnan(r)}) for group in groups]
    assert ours.active.tolist() == [count > 1 for count in distinct]


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


def test_infinite_reward_is_not_hidden() -> None:
    ours = group_advantages(torch.tensor([1.0, float("inf"), 1.0, 0.0]), [2, 2])
    assert ours.advantages[:2].isnan().all() and ours.advantages[2:].isfinite().all()


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


def test_grouped_rewards_are_its_arguments() -> None:
    rewards = torch.rand(6)
    options: dict[str, Any] = {"scale": "none", "baseline": "leave_one_out"}
    grouped = GroupedRewards(rewards, [2, 4], **options)
    wanted = group_advantages(rewards, [2, 4], **options)
    bounds = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    logprobs, loss = -torch.rand(6), PolicyLoss.preset("reinforce")
    torch.testing.assert_close(
        policy_loss(logprobs, grouped, bounds, loss).loss,
        policy_loss(logprobs, wanted.advantages, bounds, loss).loss,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"group_sizes": [2, 1]},
            ValueError,
            "group_sizes must .* sum to the 4 rewards.* sums to 3",
        ),
        ({"group_sizes": [5, -1]}, ValueError, "group_sizes must be at least 0"),
        ({"group_sizes": []}, ValueError, "group_sizes is empty, but there are 4 rewards"),
        ({"group_sizes": [2.0, 2.0]}, ValueError, "group_sizes has .* must be .P. integers"),
        ({"scale": "std"}, ValueError, "scale is 'std', must be one of group, batch, none"),
        ({"baseline": "median"}, ValueError, "baseline is 'median'"),
        ({"combine": "max"}, ValueError, "combine is 'max'"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, must be at least 0"),
        ({"rewards": [1.0, 2.0, 3.0, 4.0]}, TypeError, "rewards is a list, must be a tensor"),
        ({"rewards": torch.ones(4, 1, 1)}, ValueError, r"rewards has shape \[4, 1, 1\]"),
        (
            {"reward_weights": [1.0, 2.0]},
            ValueError,
            r"reward_weights has shape \[2\], must be \[1\]",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        group_advantages(**{"rewards": torch.ones(4), "group_sizes": [2, 2], **arguments})


@given(st.integers(0, 10**9))
@settings(max_examples=150)
def test_every_backend_equals_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def choice(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    sizes = torch.randint(0, 6, (choice(0, 1, 4),), generator=generator)
    count, columns = int(sizes.sum()), choice(1, 3)
    rewards = torch.randint(-2, 3, (count, columns), generator=generator) / choice(1.0, 3.0)
    rewards[torch.rand(count, columns, generator=generator) < choice(0.0, 0.3)] = torch.nan
    options = {
        "scale": choice("group", "batch", "none"),
        "baseline": choice("mean", "leave_one_out"),
        "unbiased": choice(True, False),
        "eps": choice(1e-6, 1e-4),
        "combine": choice("sum_then_normalize", "normalize_then_sum"),
        "reward_weights": choice(None, [0.5, 2.0, 1.0][:columns]),
    }
    wanted = reference.group_advantages(rewards, sizes, **options)
    for backend in ("torch", "triton"):
        found = group_advantages(rewards.to(DEVICE), sizes.to(DEVICE), backend=backend, **options)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
