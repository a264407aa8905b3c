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

from perl.config import FilterConfig
from perl.permutation import permute
from perl.rollout.replay import Replay, load_replay, replay_probabilities, save_replay
from perl.types import EncodedPrompt, Example, Group, Rollout, Variant, WeightSpan
from tests.messages import refused

Order = tuple[int, ...]


def example_of(key: Sequence[int]) -> Example:
    return Example(f"row-{key[1]}", ("a", "b"), "<image><image>", "A")  # type: ignore[arg-type]


def prompt_of(variant: Variant) -> EncodedPrompt:
    tokens = np.array([len(variant.example.id), *variant.order])
    return EncodedPrompt(tokens, tokens[None], len(tokens), (), 0)


def rebuild(key: Any, orders: Sequence[Order]) -> list[tuple[Variant, EncodedPrompt]]:
    variants = [permute(example_of(key), order) for order in orders]
    return [(variant, prompt_of(variant)) for variant in variants]


def make_group(
    key: tuple[int, ...], advantages: Sequence[float], orders: Sequence[Order], step: int = 0
) -> Group:
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
            (WeightSpan(step, 0, i - 1), WeightSpan(step + 1, i - 1, i))[-i:] if i else (),
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
        key=key,
        step=step,
    )


def assert_same(a: Group, b: Group) -> None:
    assert a.example == b.example and a.variants == b.variants
    assert (a.key, a.step) == (b.key, b.step)
    assert a.reward_parts.keys() == b.reward_parts.keys()
    for x, y in ((a, b), *zip(a.rollouts, b.rollouts, strict=True)):
        for name in x.__slots__:
            one, other = getattr(x, name), getattr(y, name)
            if isinstance(one, np.ndarray):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
            elif name in ("variant", "text", "finished", "weight_versions"):
                assert one == other
    for x, y in zip(a.rollouts, b.rollouts, strict=True):
        np.testing.assert_array_equal(x.prompt.input_ids, y.prompt.input_ids)
    for name, values in a.reward_parts.items():
        np.testing.assert_array_equal(values, b.reward_parts[name])


BOTH: list[Order] = [(0, 1), (1, 0)]


def kept(**config: Any) -> Replay:
    return Replay(FilterConfig(**{"replay": 1, "reuse_overflow": True, **config}))


def filled(count: int, size: int = 256) -> Replay:
    """A buffer of groups 0, 1, 2, ... with priorities 2/3, 4/3, 6/3, ..."""
    replay = kept(replay_size=size)
    for i in range(count):
        replay.keep([make_group((0, i), [1.0 + i, -1.0 - i, 0.0], BOTH, i)], [], 1)
    return replay


def waiting(*numbers: int, replay: Replay | None = None, room: int = 99) -> Replay:
    """Groups that were too many for their step."""
    replay = replay or kept()
    for i in numbers:
        replay.keep([], [make_group((0, i), [1.0, -1.0], BOTH, i)], room)
    return replay


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.example.id for group in groups]


@given(st.integers(0, 5), st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6))
def test_a_group_comes_back_as_it_was(index: int, advantages: list[float]) -> None:
    group = make_group((1, index), advantages, BOTH[: 1 + index % 2], step=3)
    replay = kept()
    replay.keep([], [group], 1)
    (back,) = replay.take_overflow(1, rebuild)
    assert_same(back, group)
    assert back.off_policy and not group.off_policy
    assert replay.take_overflow(1, rebuild) == []


def test_overflow_comes_back_the_oldest_first_and_the_newest_stay() -> None:
    replay = waiting(0, 1, 2, 3)
    assert ids(replay.take_overflow(3, rebuild)) == ["row-0", "row-1", "row-2"]
    assert ids(waiting(9, replay=replay).take_overflow(5, rebuild)) == ["row-3", "row-9"]
    assert ids(waiting(0, 1, 2, room=2).take_overflow(5, rebuild)) == ["row-1", "row-2"]


def test_what_is_not_asked_for_is_not_kept() -> None:
    group = make_group((0, 0), [1.0, -1.0], BOTH)
    for off, list_name in (({"replay": 0}, "buffer"), ({"reuse_overflow": False}, "overflow")):
        replay = kept(**off)
        replay.keep([group], [group], 1)
        assert replay.active and getattr(replay, list_name) == []
        assert len(replay.buffer) + len(replay.overflow) == 1
    assert not kept(replay=0, reuse_overflow=False).active


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.sampled_from([0.0, 0.5, 1.0, 2.0])
)
def test_probabilities_are_the_priorities_to_the_power(
    priorities: list[float], power: float
) -> None:
    probabilities = replay_probabilities(priorities, power)
    total = sum(p**power for p in priorities)
    np.testing.assert_allclose(probabilities, [p**power / total for p in priorities])
    extreme = replay_probabilities([1e-300, 1.0, 1e300], 5.0)
    assert extreme.sum() == pytest.approx(1) and (extreme > 0).all()


def test_the_priority_is_the_mean_size_of_the_advantages_that_count() -> None:
    group = make_group((0, 0), [3.0, -1.0, 100.0], BOTH)
    group.rewards[2] = np.nan
    replay = kept()
    replay.keep([group], [], 1)
    assert replay.buffer[0].priority == 2.0


def test_draws_follow_the_probabilities() -> None:
    """The first of a draw, over all seeds of a range: its share of the seeds is its probability."""
    buffer = filled(3)
    shares = np.zeros(3)

    def count(key: Any, orders: Sequence[Order]) -> Any:
        shares[key[1]] += 1 / 3000
        return []

    for seed in range(3000):
        buffer.draw(1, seed, count)
    # Three standard deviations of a share of 3000 draws are at most 0.028.
    np.testing.assert_allclose(shares, np.array([1, 2, 3]) / 6, atol=0.028)


@given(st.integers(0, 8), st.integers(0, 10), st.integers(0, 1000))
def test_a_draw_is_of_different_groups_and_repeats(held: int, count: int, seed: int) -> None:
    buffer = filled(held)
    first = ids(buffer.draw(count, seed, rebuild))
    assert len(first) == len(set(first)) == min(held, count)
    assert ids(buffer.draw(count, seed, rebuild)) == first
    assert len(buffer.buffer) == held


def test_the_buffer_keeps_the_newest_with_signal() -> None:
    buffer = filled(5, size=3)
    buffer.keep([make_group((0, 7), [0.0, 0.0], BOTH, step=5)], [], 1)
    assert [stored.key for stored in buffer.buffer] == [(0, 2), (0, 3), (0, 4)]
    assert sorted(ids(buffer.draw(9, 0, rebuild))) == ["row-2", "row-3", "row-4"]


def test_what_cannot_be_rebuilt_is_left_out() -> None:
    def some(key: Any, orders: Sequence[Order]) -> Any:
        return [] if key == (0, 1) else rebuild(key, orders)

    assert sorted(ids(filled(3).draw(3, 0, some))) == ["row-0", "row-2"]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_what_is_saved_is_drawn_and_taken_alike(count: int, tmp_path: Path) -> None:
    replay = waiting(*range(count), replay=filled(count))
    other = filled(2)
    save_replay(tmp_path, [replay.state_dict(), other.state_dict()])
    loaded, smaller = kept(), kept(replay_size=2)
    for one in (loaded, smaller):
        state = load_replay(tmp_path, 0, 2)
        assert state is not None
        one.load_state_dict(state)
    for seed, n in itertools.product(range(5), (1, 3)):
        pairs = zip(replay.draw(n, seed, rebuild), loaded.draw(n, seed, rebuild), strict=True)
        for one, again in pairs:
            assert_same(one, again)
    assert [s.step for s in loaded.buffer] == list(range(count))
    assert ids(loaded.take_overflow(2, rebuild)) == [f"row-{i}" for i in range(count)][:2]
    assert len(loaded.overflow) == max(0, count - 2)
    assert len(smaller.buffer) == min(2, count)
    second = load_replay(tmp_path, 1, 2)
    assert second and [s.key for s in second["buffer"]] == [(0, 0), (0, 1)]


def test_other_processes_share_out_what_was_saved(tmp_path: Path) -> None:
    """Three that have sampled in steps 0, 2, 4, in 0, 1 and in 3; each group goes to one of them, the oldest first."""
    steps = (0, 2, 4), (0, 1), (3,)
    states = []
    for process, own in enumerate(steps):
        replay = kept()
        for step in own:
            of_both = make_group((process, step), [1.0, -1.0], BOTH, step)
            replay.keep([of_both], [of_both], 99)
        states.append(replay.state_dict())
    save_replay(tmp_path, states)
    in_turn = [(0, 0), (1, 0), (1, 1), (0, 2), (2, 3), (0, 4)]
    for count in (1, 2, 4, 7):
        for process in range(count):
            state = load_replay(tmp_path, process, count)
            assert state is not None
            for groups in state.values():
                assert [g.key for g in groups] == in_turn[process::count]
    for process, own in enumerate(steps):
        state = load_replay(tmp_path, process, 3)
        assert state and [g.step for g in state["overflow"]] == list(own)


def test_the_name_that_checkpoints_had_before(tmp_path: Path) -> None:
    save_replay(tmp_path, [waiting(3).state_dict()])
    (tmp_path / "overflow-0.safetensors").rename(tmp_path / "queue-0.safetensors")
    state = load_replay(tmp_path, 0, 1)
    assert state and [stored.key for stored in state["overflow"]] == [(0, 3)]


def test_groups_of_before_weight_versions_come_without(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    save_replay(tmp_path, [waiting(3).state_dict()])
    path = tmp_path / "overflow-0.safetensors"
    with safe_open(path, "np") as file:
        header = file.metadata()
        left = {n: file.get_tensor(n) for n in file.keys() if "spans" not in n}  # noqa: SIM118
    save_file(left, path, header)
    state = load_replay(tmp_path, 0, 1)
    assert state
    (back,) = state["overflow"]
    assert {r.weight_versions for r in back.group(rebuild((0, 3), BOTH)).rollouts} == {()}


def test_a_file_that_holds_no_groups_is_an_error(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_replay(tmp_path, [kept().state_dict()])
    path = tmp_path / "buffer-0.safetensors"
    path.write_bytes(b"nonsense")
    with refused("buffer-0.safetensors", "remove it"):
        load_replay(tmp_path, 0, 1)
    save_file({"a": np.zeros(1)}, path)
    with refused("buffer-0.safetensors", "remove it"):
        load_replay(tmp_path, 0, 1)
    path.unlink()
    assert load_replay(tmp_path, 0, 1) is None
