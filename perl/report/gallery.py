"""Rollouts kept to look at: one line each in rollouts.jsonl, their pictures once in images/."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from PIL import Image

from perl.files import RunFolder, replacing
from perl.types import EncodedImage, Group, Rollout


class Gallery:
    """Appends rollouts to a run folder's record."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def keep_groups(self, stage: str, step: int, groups: Iterable[Group]) -> None:
        """The first rollout of every order of the groups, with rewards and advantages."""
        for group in groups:
            orders = [rollout.variant.order for rollout in group.rollouts]
            for index in sorted(orders.index(order) for order in set(orders)):
                parts = {name: values[index] for name, values in group.reward_parts.items()}
                rollout, advantage = group.rollouts[index], _number(group.advantages[index])
                self._keep(stage, step, rollout, group.rewards[index], parts, advantage=advantage)

    def keep_rollouts(
        self, stage: str, step: int, rollouts: Iterable[Rollout], rewards: Iterable[float]
    ) -> None:
        """Evaluation rollouts with their accuracy."""
        for rollout, reward in zip(rollouts, rewards, strict=True):
            self._keep(stage, step, rollout, reward, {"accuracy": reward})

    def _keep(
        self,
        stage: str,
        step: int,
        rollout: Rollout,
        reward: float,
        parts: dict[str, float],
        **more: Any,
    ) -> None:
        variant = rollout.variant
        pictures = zip(rollout.prompt.images, variant.images, strict=True)
        row = {
            "stage": stage,
            "step": step,
            "example": variant.example.id,
            "task": variant.example.task,
            "order": list(variant.order),
            "images": [self._picture(encoded, image) for encoded, image in pictures],
            "question": "\n".join(m.content for m in variant.messages),
            "answer": variant.answer,
            "text": rollout.text,
            "reward": _number(reward),
            "rewards": {name: _number(value) for name, value in parts.items()},
        }
        self.folder.append(self.folder.rollouts, row | more)

    def _picture(self, encoded: EncodedImage, image: Image.Image) -> str:
        path = self.folder.images / f"{encoded.key[:16]}.png"
        if not path.exists():
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
        return f"images/{path.name}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
