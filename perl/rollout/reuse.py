"""Groups that a stage trains on in a later step than the one they were sampled in: its surplus, and its replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perl.config import FilterConfig
from perl.rollout.replay import GroupBuffer, GroupQueue, Rebuild, load_groups, save_groups
from perl.types import Group


class Reuse:
    """The waiting groups of one process: surplus in a queue, what was trained on in a buffer.

    With neither `filter.reuse_surplus` nor `filter.replay` it holds nothing and gives nothing.
    """

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.queue = GroupQueue()
        self.buffer = GroupBuffer(config.replay_size, config.replay_power)

    @property
    def active(self) -> bool:
        return self.config.reuse_surplus or self.config.replay > 0

    def waiting(self, count: int, rebuild: Rebuild) -> list[Group]:
        """Up to `count` groups that earlier steps had too many; they leave the queue."""
        return self.queue.take(count, rebuild)

    def again(self, seed: int, rebuild: Rebuild, process: int, processes: int) -> list[Group]:
        """This process's share of the `filter.replay` groups of earlier steps, drawn by their advantages."""
        share, rest = divmod(self.config.replay, processes)
        return self.buffer.draw(share + (process < rest), seed, rebuild)

    def keep(
        self,
        trained: Sequence[Group],
        surplus: Sequence[Group],
        key_of: Callable[[Group], Sequence[int]],
        step: int,
        room: int,
    ) -> None:
        """Remember a step's fresh groups: those it trains on for replay, the others for the next step.

        No more than `room` wait, the newest ones: what has waited longer comes from too old a policy.
        """
        if self.config.replay:
            for group in trained:
                self.buffer.add(group, list(key_of(group)), step)
        if self.config.reuse_surplus:
            for group in surplus:
                self.queue.add(group, list(key_of(group)), step)
            del self.queue.stored[: max(0, len(self.queue) - room)]

    def ages(self, count: int, step: int) -> list[int]:
        """How many steps ago each of the first `count` waiting groups was sampled."""
        return [step - stored.step for stored in self.queue.stored[:count]]

    def state_dict(self) -> dict[str, Any]:
        """Both, in JSON's types and arrays."""
        return {"queue": self.queue.state_dict(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queue.load_state_dict(state["queue"])
        self.buffer.load_state_dict(state["buffer"])


def save_reuse(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Write the states of all processes, two files for each."""
    for process, state in enumerate(states):
        for name, part in state.items():
            save_groups(folder / f"{name}-{process}.safetensors", part)


def load_reuse(folder: Path, process: int) -> dict[str, Any] | None:
    """The state of a process as `save_reuse` left it; None if there is none."""
    files = {name: folder / f"{name}-{process}.safetensors" for name in ("queue", "buffer")}
    if not all(file.exists() for file in files.values()):
        return None
    return {name: load_groups(file) for name, file in files.items()}
