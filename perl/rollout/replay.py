"""Groups that are trained on in a later step than the one that sampled them: its overflow, and replay.

A group waits as plain numbers, without images and tokens of its prompts, which are many times larger; those are made
again when it is taken. It is off-policy then: its rollouts' `logprobs`, of the policy that sampled them, are the old
log-probs of its loss, and its advantages are those of its own step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perl.config import FilterConfig
from perl.rollout.prompts import Shown
from perl.types import Group, Rollout, UserError, WeightSpan

Rebuild = Callable[[Sequence[int], Sequence[tuple[int, ...]]], Sequence[Shown]]
"""From a group's key and orders to its variants with their prompts; none to let the group go."""

_FORMAT = "groups-1"
_ARRAYS = ("order_of", "lengths", "token_ids", "logprobs", "finished", "rewards", "advantages")


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A Group without what can be made again.

    `order_of` int64 [R] is the number of the order in `orders` that each rollout saw. The completions stand end to end:
    `lengths` int64 [R], `token_ids` int64 [N], `logprobs` float32 [N]. `spans` int64 [K, 4] are the weight versions of tokens:
    number of the rollout, version, start, end.
    """

    key: tuple[int, ...]
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
    spans: np.ndarray

    @classmethod
    def of(cls, group: Group) -> StoredGroup:
        orders = tuple(variant.order for variant in group.variants)
        rollouts = group.rollouts
        return cls(
            key=group.key,
            step=group.step,
            orders=orders,
            order_of=np.array([orders.index(r.variant.order) for r in rollouts], dtype=np.int64),
            lengths=np.array([len(r.token_ids) for r in rollouts], dtype=np.int64),
            token_ids=np.concatenate([r.token_ids for r in rollouts]),
            logprobs=np.concatenate([r.logprobs for r in rollouts]),
            texts=tuple(r.text for r in rollouts),
            finished=np.array([r.finished for r in rollouts], dtype=np.bool_),
            rewards=group.rewards,
            reward_parts=dict(group.reward_parts),
            advantages=group.advantages,
            spans=np.array(
                [(i, *s) for i, r in enumerate(rollouts) for s in r.weight_versions], dtype=np.int64
            ).reshape(-1, 4),
        )

    @property
    def priority(self) -> float:
        """Mean |advantage| of the rollouts that have a reward; 0 without any."""
        scored = np.abs(self.advantages[~np.isnan(self.rewards)])
        return float(scored.mean(dtype=np.float64)) if scored.size else 0.0

    def group(self, shown: Sequence[Shown]) -> Group:
        """The Group again, from its variants and prompts in the sequence of `orders`."""
        ends = np.cumsum(self.lengths)[:-1]
        tokens, logprobs = np.split(self.token_ids, ends), np.split(self.logprobs, ends)
        return Group(
            example=shown[0][0].example,
            variants=tuple(variant for variant, _ in shown),
            rollouts=tuple(
                Rollout(
                    variant,
                    prompt,
                    tokens[r],
                    logprobs[r],
                    self.texts[r],
                    bool(self.finished[r]),
                    tuple(WeightSpan(*s) for i, *s in self.spans.tolist() if i == r),
                )
                for r, (variant, prompt) in enumerate(shown[k] for k in self.order_of)
            ),
            rewards=self.rewards,
            reward_parts=dict(self.reward_parts),
            advantages=self.advantages,
            key=self.key,
            step=self.step,
            off_policy=True,
        )


class Replay:
    """The stored groups of one process.

    `overflow`: groups with signal that were too many for their step and wait for the next, the oldest first, with
    `filter.reuse_overflow`. `buffer`: the last `filter.replay_size` groups that were trained on, with `filter.replay`, for
    selective sample replay (VL-Rethinker, arXiv 2504.08837) of whole groups: one is drawn with a probability proportional to
    its mean |advantage| to the `filter.replay_power`, and stays until as many newer ones have come.
    """

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.overflow: list[StoredGroup] = []
        self.buffer: list[StoredGroup] = []

    @property
    def active(self) -> bool:
        return self.config.reuse_overflow or self.config.replay > 0

    def take_overflow(self, count: int, rebuild: Rebuild) -> list[Group]:
        """Up to `count` groups of earlier steps' overflow, which leave it."""
        taken, self.overflow = self.overflow[:count], self.overflow[count:]
        return _rebuilt(taken, rebuild)

    def draw(self, count: int, seed: int, rebuild: Rebuild) -> list[Group]:
        """Up to `count` different groups of the buffer; the same buffer and seed give the same ones."""
        count = min(count, len(self.buffer))
        if count <= 0:
            return []
        priorities = [stored.priority for stored in self.buffer]
        p = replay_probabilities(priorities, self.config.replay_power)
        drawn = np.random.default_rng(seed).choice(len(self.buffer), count, replace=False, p=p)
        return _rebuilt([self.buffer[i] for i in drawn], rebuild)

    def keep(self, trained: Sequence[Group], overflow: Sequence[Group], room: int) -> None:
        """Remember a step's own groups: those it trains on for replay, the others for the next step.

        No more than `room` wait, the newest ones: what has waited longer comes from too old a policy. A group without
        signal has nothing to be replayed for.
        """
        if self.config.replay:
            stored = [StoredGroup.of(group) for group in trained]
            new = [s for s in stored if s.priority > 0]
            self.buffer = [*self.buffer, *new][-self.config.replay_size :]
        if self.config.reuse_overflow:
            self.overflow = [*self.overflow, *map(StoredGroup.of, overflow)][-room:]

    def state_dict(self) -> dict[str, list[StoredGroup]]:
        """Both lists as they are now; groups that are stored never change."""
        return {"overflow": list(self.overflow), "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, list[StoredGroup]]) -> None:
        self.overflow = list(state["overflow"])
        self.buffer = state["buffer"][-self.config.replay_size :]


def replay_probabilities(priorities: Sequence[float], power: float) -> np.ndarray:
    """float64 [n]: `priorities**power` over their sum; all priorities are above 0.

    Example: `replay_probabilities([1, 3], 1)` is `[0.25, 0.75]`, with power 0 `[0.5, 0.5]`.
    """
    # Relative to the largest, so that no power overflows.
    weights = (np.asarray(priorities, dtype=np.float64) / max(priorities)) ** power
    # A weight that underflows to 0 would leave fewer groups than are to be drawn.
    weights = np.maximum(weights, np.finfo(np.float64).tiny)
    return weights / weights.sum()


def save_replay(folder: Path, states: Sequence[dict[str, list[StoredGroup]]]) -> None:
    """Write the states of all processes, two safetensors files for each."""
    for process, state in enumerate(states):
        for name, groups in state.items():
            _save(folder / f"{name}-{process}.safetensors", groups)


def load_replay(folder: Path, process: int, processes: int) -> dict[str, list[StoredGroup]] | None:
    """The state of a process as `save_replay` left it; None if there is none.

    Of a checkpoint of another number of processes each gets its share of all groups: dealt out in turn, the oldest first.

    Raises:
        UserError: a file that cannot be read, or that holds something else.
    """
    saved = {int(p.stem.rpartition("-")[2]) for p in folder.glob("buffer-*.safetensors")}
    if max(saved, default=0) + 1 == processes:
        return _state(folder, process)
    states = [state for number in sorted(saved) if (state := _state(folder, number))]
    if not states:
        return None
    return {
        name: sorted((g for s in states for g in s[name]), key=lambda g: g.step)[process::processes]
        for name in states[0]
    }


def _state(folder: Path, process: int) -> dict[str, list[StoredGroup]] | None:
    files = {name: folder / f"{name}-{process}.safetensors" for name in ("overflow", "buffer")}
    if not files["overflow"].exists():  # The name that checkpoints had before.
        files["overflow"] = folder / f"queue-{process}.safetensors"
    if not all(file.exists() for file in files.values()):
        return None
    return {name: _load(file) for name, file in files.items()}


def _save(path: Path, groups: Sequence[StoredGroup]) -> None:
    from safetensors.numpy import save_file

    meta, tensors = [], {}
    for i, group in enumerate(groups):
        meta.append(
            {
                "key": group.key,
                "step": group.step,
                "orders": group.orders,
                "texts": group.texts,
                "reward_parts": list(group.reward_parts),
            }
        )
        tensors |= {f"{i}/{name}": getattr(group, name) for name in (*_ARRAYS, "spans")}
        tensors |= {f"{i}/part/{k}": v for k, v in enumerate(group.reward_parts.values())}
    save_file(tensors, path, {"format": _FORMAT, "meta": json.dumps(meta)})


def _load(path: Path) -> list[StoredGroup]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UserError(
                    f"{path} holds no groups of rollouts in a form that is known here; remove it to start without it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it to start without it") from error
    return [
        StoredGroup(
            key=tuple(meta["key"]),
            step=meta["step"],
            orders=tuple(map(tuple, meta["orders"])),
            texts=tuple(meta["texts"]),
            reward_parts={
                name: tensors[f"{i}/part/{k}"] for k, name in enumerate(meta["reward_parts"])
            },
            **{name: tensors[f"{i}/{name}"] for name in _ARRAYS},
            # Older files have none.
            spans=tensors.get(f"{i}/spans", np.zeros((0, 4), np.int64)),
        )
        for i, meta in enumerate(json.loads(header["meta"]))
    ]


def _rebuilt(stored: Sequence[StoredGroup], rebuild: Rebuild) -> list[Group]:
    found = ((group, rebuild(group.key, group.orders)) for group in stored)
    return [group.group(shown) for group, shown in found if shown]
