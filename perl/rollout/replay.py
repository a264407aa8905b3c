"""Groups that are trained on later than in the step they were sampled in.

A group waits as plain numbers, without images and tokens of its prompts, which are many times
larger; those are made again when it is taken. It is off-policy then: its rollouts' `logprobs`, of
the policy that sampled them, are the old log-probs of its loss, and its advantages are those of its
own step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perl.types import EncodedPrompt, Group, Rollout, UserError, Variant

Rebuild = Callable[[Any, Sequence[tuple[int, ...]]], Sequence[tuple[Variant, EncodedPrompt]] | None]
"""From a group's key and orders to its variants with their prompts, or None to let the group go."""

_FORMAT = "groups-1"


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A Group without what can be made again.

    `key` says which example it is of, in JSON's types, as in `[epoch, index]`; `step` when it was
    sampled. `order_of` int64 [R] is the number of the order in `orders` that each rollout saw. The
    completions stand end to end: `lengths` int64 [R], `token_ids` int64 [N], `logprobs` float32 [N].
    """

    key: Any
    step: int
    orders: tuple[tuple[int, ...], ...]
    order_of: np.ndarray
    lengths: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    texts: tuple[str, ...]
    finished: np.ndarray
    rewards: np.ndarray
    reward_parts: dict[str, np.ndarray]
    advantages: np.ndarray

    @classmethod
    def of(cls, group: Group, key: Any, step: int) -> StoredGroup:
        orders = tuple(variant.order for variant in group.variants)
        rollouts = group.rollouts
        return cls(
            key=key,
            step=step,
            orders=orders,
            order_of=np.array([orders.index(r.variant.order) for r in rollouts], dtype=np.int64),
            lengths=np.array([len(r.token_ids) for r in rollouts], dtype=np.int64),
            token_ids=_joined([r.token_ids for r in rollouts], np.int64),
            logprobs=_joined([r.logprobs for r in rollouts], np.float32),
            texts=tuple(r.text for r in rollouts),
            finished=np.array([r.finished for r in rollouts], dtype=np.bool_),
            rewards=group.rewards,
            reward_parts=dict(group.reward_parts),
            advantages=group.advantages,
        )

    @property
    def priority(self) -> float:
        """Mean |advantage| of the rollouts that have a reward; 0 without any."""
        scored = np.abs(self.advantages[~np.isnan(self.rewards)])
        return float(scored.mean(dtype=np.float64)) if scored.size else 0.0

    def group(self, shown: Sequence[tuple[Variant, EncodedPrompt]]) -> Group:
        """The Group again, from its variants and prompts in the sequence of `orders`."""
        ends = np.cumsum(self.lengths)[:-1]
        rollouts = []
        for number, tokens, logprobs, text, finished in zip(
            self.order_of,
            np.split(self.token_ids, ends),
            np.split(self.logprobs, ends),
            self.texts,
            self.finished,
            strict=True,
        ):
            variant, prompt = shown[number]
            rollouts.append(Rollout(variant, prompt, tokens, logprobs, text, bool(finished)))
        return Group(
            example=shown[0][0].example,
            variants=tuple(variant for variant, _ in shown),
            rollouts=tuple(rollouts),
            rewards=self.rewards,
            reward_parts=dict(self.reward_parts),
            advantages=self.advantages,
        )


class GroupQueue:
    """Groups that were too many for their step and wait for the next, the oldest first."""

    def __init__(self) -> None:
        self.stored: list[StoredGroup] = []

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, group: Group, key: Any, step: int) -> None:
        self.stored.append(StoredGroup.of(group, key, step))

    def take(self, count: int, rebuild: Rebuild) -> list[Group]:
        """Up to `count` groups, which leave the queue."""
        taken, self.stored = self.stored[:count], self.stored[count:]
        return _rebuilt(taken, rebuild)

    def state_dict(self) -> dict[str, Any]:
        """`meta` in JSON's types and `tensors` name -> array."""
        return _packed(self.stored)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stored = _unpacked(state)


class GroupBuffer:
    """The last `size` groups with signal, to be trained on again.

    Selective sample replay of VL-Rethinker, arXiv 2504.08837, for whole groups: a group is drawn
    with a probability proportional to its mean |advantage| to the `power`. A group that is drawn
    stays until `size` newer ones have come.
    """

    def __init__(self, size: int, power: float = 1.0) -> None:
        self.size, self.power = size, power
        self.stored: list[StoredGroup] = []

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, group: Group, key: Any, step: int) -> None:
        """Put a group in, and the oldest out if there is no room; one without signal is left out."""
        stored = StoredGroup.of(group, key, step)
        if stored.priority > 0:
            self.stored = [*self.stored, stored][-self.size :]

    def draw(self, count: int, seed: int, rebuild: Rebuild) -> list[Group]:
        """Up to `count` different groups; the same buffer and seed give the same ones."""
        count = min(count, len(self.stored))
        if count <= 0:
            return []
        probabilities = replay_probabilities([s.priority for s in self.stored], self.power)
        drawn = np.random.default_rng(seed).choice(
            len(self.stored), count, replace=False, p=probabilities
        )
        return _rebuilt([self.stored[i] for i in drawn], rebuild)

    def state_dict(self) -> dict[str, Any]:
        """`meta` in JSON's types and `tensors` name -> array."""
        return _packed(self.stored)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stored = _unpacked(state)[-self.size :]


def replay_probabilities(priorities: Sequence[float], power: float) -> np.ndarray:
    """float64 [n]: `priorities**power` over their sum; all priorities are above 0.

    Example: `replay_probabilities([1, 3], 1)` is `[0.25, 0.75]`, with power 0 `[0.5, 0.5]`.
    """
    # Relative to the largest, so that no power overflows.
    weights = (np.asarray(priorities, dtype=np.float64) / max(priorities)) ** power
    # A weight that underflows to 0 would leave fewer groups than are to be drawn.
    weights = np.maximum(weights, np.finfo(np.float64).tiny)
    return weights / weights.sum()


def save_groups(path: Path, state: dict[str, Any]) -> None:
    """Write a state as one safetensors file, `meta` in its header."""
    from safetensors.numpy import save_file

    save_file(state["tensors"], path, {"format": _FORMAT, "meta": json.dumps(state["meta"])})


def load_groups(path: Path) -> dict[str, Any]:
    """The state in a file of `save_groups`; raises UserError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UserError(f"{path} holds no groups of rollouts in a form that is known here")
            return {
                "meta": json.loads(header["meta"]),
                "tensors": {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it to start without it") from error


_ARRAYS = ("order_of", "lengths", "token_ids", "logprobs", "finished", "rewards", "advantages")


def _packed(stored: Sequence[StoredGroup]) -> dict[str, Any]:
    meta, tensors = [], {}
    for i, group in enumerate(stored):
        meta.append(
            {
                "key": group.key,
                "step": group.step,
                "orders": [list(order) for order in group.orders],
                "texts": list(group.texts),
                "reward_parts": list(group.reward_parts),
            }
        )
        tensors |= {f"{i}/{name}": getattr(group, name) for name in _ARRAYS}
        tensors |= {f"{i}/part/{k}": v for k, v in enumerate(group.reward_parts.values())}
    return {"meta": meta, "tensors": tensors}


def _unpacked(state: dict[str, Any]) -> list[StoredGroup]:
    tensors = state["tensors"]
    return [
        StoredGroup(
            key=meta["key"],
            step=int(meta["step"]),
            orders=tuple(tuple(order) for order in meta["orders"]),
            texts=tuple(meta["texts"]),
            reward_parts={
                name: tensors[f"{i}/part/{k}"] for k, name in enumerate(meta["reward_parts"])
            },
            **{name: tensors[f"{i}/{name}"] for name in _ARRAYS},
        )
        for i, meta in enumerate(state["meta"])
    ]


def _rebuilt(stored: Sequence[StoredGroup], rebuild: Rebuild) -> list[Group]:
    shown = ((group, rebuild(group.key, group.orders)) for group in stored)
    return [group.group(pairs) for group, pairs in shown if pairs is not None]


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(a, dtype=dtype) for a in arrays] or [np.zeros(0, dtype)])
