"""Groups that wait for a later step: what they hold, which ones are drawn, and that they survive a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import permute
from perl.rollout.replay import (
    GroupBuffer,
    GroupQueue,
    load_groups,
    replay_probabilities,
    save_groups,
)
from perl.types import EncodedPrompt, Example, Group, Rollout, UserError, Variant

Order = tuple[int, ...]


def example_of(key: Sequence[int]) -> Example:
    return Example(f"row-{key[1]}", ("a", "b"), "<image><image>", "A")  # type: ignore[arg-type]


def prompt_of(variant: Variant) -> EncodedPrompt:
    tokens = np.array([len(variant.example.id), *variant.order])
    return EncodedPrompt(tokens, tokens[None], len(tokens), (), 0)


def rebuild(key: Any, orders: Sequence[Order]) -> list[tuple[Variant, EncodedPrompt]]:
    variants = [permute(example_of(key), order) for order in orders]
    return [(variant, prompt_of(variant)) for variant in variants]


def make_group(key: Sequence[int], advantages: Sequence[float], orders: Sequence[Order]) -> Group:
    """One rollout for each advantage, over the orders in turn, of 0, 1, 2, ... tokens."""
    rng = np.random.default_rng(list(key))
    shown = rebuild(key, orders)
    rollouts = tuple(
        Rollout(
            *shown[i % len(shown)],
            rng.integers(0, 100, i),
            rng.normal(size=i).astype(np.float32),
            f"text ü {i}",
            i % 2 == 0,
        )
        for i in range(len(advantages))
    )
    rewards = rng.normal(size=len(advantages))
    return Group(
        example=example_of(key),
        variants=tuple(variant for variant, _ in shown),
        rollouts=rollouts,
        rewards=rewards,
        reward_parts={"accuracy": rewards * 2, "f/a b": np.full(len(advantages), np.nan)},
        advantages=np.array(advantages, dtype=np.float32),
    )


def assert_same(a: Group, b: Group) -> None:
    assert a.example == b.example and a.variants == b.variants
    assert a.reward_parts.keys() == b.reward_parts.keys()
    for x, y in ((a, b), *zip(a.rollouts, b.rollouts, strict=True)):
        for name in x.__slots__:
            one, other = getattr(x, name), getattr(y, name)
            if isinstance(one, np.ndarray):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
            elif name in ("variant", "text", "finished"):
                assert one == other
    for x, y in zip(a.rollouts, b.rollouts, strict=True):
        np.testing.assert_array_equal(x.prompt.input_ids, y.prompt.input_ids)
    for name, values in a.reward_parts.items():
        np.testing.assert_array_equal(values, b.reward_parts[name])


BOTH: list[Order] = [(0, 1), (1, 0)]


def filled(count: int, size: int = 256, power: float = 1.0) -> GroupBuffer:
    buffer = GroupBuffer(size, power)
    for i in range(count):
        buffer.add(make_group((0, i), [1.0 + i, -1.0 - i, 0.0], BOTH), [0, i], step=i)
    return buffer


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.example.id for group in groups]


@given(st.integers(0, 5), st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6))
def test_a_group_comes_back_as_it_was(index: int, advantages: list[float]) -> None:
    group = make_group((1, index), advantages, BOTH[: 1 + index % 2])
    queue = GroupQueue()
    queue.add(group, [1, index], step=3)
    (back,) = queue.take(1, rebuild)
    assert_same(back, group)
    assert len(queue) == 0 and queue.take(1, rebuild) == []


def test_the_queue_gives_the_oldest_first() -> None:
    queue = GroupQueue()
    for i in range(4):
        queue.add(make_group((0, i), [1.0, -1.0], BOTH), [0, i], step=i)
    assert ids(queue.take(3, rebuild)) == ["row-0", "row-1", "row-2"]
    queue.add(make_group((0, 9), [1.0, -1.0], BOTH), [0, 9], step=4)
    assert ids(queue.take(5, rebuild)) == ["row-3", "row-9"]


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.sampled_from([0.0, 0.5, 1.0, 2.0])
)
def test_probabilities_are_the_priorities_to_the_power(
    priorities: list[float], power: float
) -> None:
    probabilities = replay_probabilities(priorities, power)
    total = sum(p**power for p in priorities)
    np.testing.assert_allclose(probabilities, [p**power / total for p in priorities])


def test_probabilities_of_extreme_priorities_are_numbers() -> None:
    probabilities = replay_probabilities([1e-300, 1.0, 1e300], 5.0)
    assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()


def test_the_priority_is_the_mean_size_of_the_advantages_that_count() -> None:
    group = make_group((0, 0), [3.0, -1.0, 100.0], BOTH)
    group.rewards[2] = np.nan
    buffer = GroupBuffer(4)
    buffer.add(group, [0, 0], 0)
    assert buffer.stored[0].priority == 2.0


def test_draws_follow_the_probabilities() -> None:
    """The first of a draw, over all seeds of a range: its share of the seeds is its probability."""
    buffer = filled(3)
    shares = np.zeros(3)
    for seed in range(3000):
        (group,) = buffer.draw(1, seed, rebuild)
        shares[int(group.example.id[4:])] += 1 / 3000
    # Three standard deviations of a share of 3000 draws are at most 0.028.
    np.testing.assert_allclose(shares, np.array([1, 2, 3]) / 6, atol=0.028)


@given(st.integers(0, 8), st.integers(0, 10), st.integers(0, 1000))
def test_a_draw_is_of_different_groups_and_repeats(held: int, count: int, seed: int) -> None:
    buffer = filled(held)
    first = ids(buffer.draw(count, seed, rebuild))
    assert len(first) == len(set(first)) == min(held, count)
    assert ids(buffer.draw(count, seed, rebuild)) == first
    assert len(buffer) == held


def test_the_buffer_keeps_the_newest_with_signal() -> None:
    buffer = filled(5, size=3)
    buffer.add(make_group((0, 7), [0.0, 0.0], BOTH), [0, 7], step=5)
    assert [stored.key for stored in buffer.stored] == [[0, 2], [0, 3], [0, 4]]
    assert sorted(ids(buffer.draw(9, 0, rebuild))) == ["row-2", "row-3", "row-4"]


def test_what_cannot_be_rebuilt_is_left_out() -> None:
    def some(key: Any, orders: Sequence[Order]) -> Any:
        return None if key == [0, 1] else rebuild(key, orders)

    assert sorted(ids(filled(3).draw(3, 0, some))) == ["row-0", "row-2"]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_saved_buffer_draws_the_same(count: int, tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    buffer = filled(count)
    save_groups(path, buffer.state_dict())
    loaded = GroupBuffer(256)
    loaded.load_state_dict(load_groups(path))
    for seed, n in itertools.product(range(5), (1, 3)):
        pairs = zip(buffer.draw(n, seed, rebuild), loaded.draw(n, seed, rebuild), strict=True)
        for one, other in pairs:
            assert_same(one, other)
    assert [s.step for s in loaded.stored] == list(range(count))
    smaller = GroupBuffer(2)
    smaller.load_state_dict(load_groups(path))
    assert len(smaller) == min(2, count)


def test_a_saved_queue_goes_on(tmp_path: Path) -> None:
    queue, again = GroupQueue(), GroupQueue()
    for i in range(3):
        queue.add(make_group((2, i), [1.0, -1.0], BOTH), [2, i], step=i)
    save_groups(tmp_path / "queue.safetensors", queue.state_dict())
    again.load_state_dict(load_groups(tmp_path / "queue.safetensors"))
    assert ids(again.take(2, rebuild)) == ["row-0", "row-1"] and len(again) == 1


def test_a_file_that_holds_no_groups_is_an_error(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "replay.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        load_groups(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_groups(path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no groups"):
        load_groups(path)
