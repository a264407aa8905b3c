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

    def keep_groups(
        self, stage: str, step: int, groups: Iterable[Group], per_order: int = 1
    ) -> None:
        """Some rollouts of every order of the groups, with rewards and advantages."""
        for group in groups:
            shown: dict[tuple[int, ...], int] = {}
            for index, rollout in enumerate(group.rollouts):
                order = rollout.variant.order
                shown[order] = shown.get(order, 0) + 1
                if shown[order] > per_order:
                    continue
                scores = {
                    "reward": _number(group.rewards[index]),
                    "rewards": {
                        name: _number(values[index]) for name, values in group.reward_parts.items()
                    },
                    "advantage": _number(group.advantages[index]),
                }
                self._keep(stage, step, rollout, scores)

    def keep_rollouts(
        self, stage: str, step: int, rollouts: Iterable[Rollout], rewards: Iterable[float]
    ) -> None:
        """Evaluation rollouts with their accuracy."""
        for rollout, reward in zip(rollouts, rewards, strict=True):
            self._keep(
                stage,
                step,
                rollout,
                {"reward": _number(reward), "rewards": {"accuracy": _number(reward)}},
            )

    def _keep(self, stage: str, step: int, rollout: Rollout, scores: dict[str, Any]) -> None:
        variant = rollout.variant
        names = [
            self._picture(encoded, image)
            for encoded, image in zip(rollout.prompt.images, variant.images, strict=True)
        ]
        row = {
            "stage": stage,
            "step": step,
            "example": variant.example.id,
            "task": variant.example.task,
            "order": list(variant.order),
            "images": names,
            "question": "\n".join(m.content for m in variant.messages),
            "answer": variant.answer,
            "text": rollout.text,
            **scores,
        }
        self.folder.append(self.folder.rollouts, row)

    def _picture(self, encoded: EncodedImage, image: Image.Image) -> str:
        path = self.folder.images / f"{encoded.key[:16]}.png"
        if not path.exists():
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
        return f"images/{path.name}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
