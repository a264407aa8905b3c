"""Rollouts kept to look at: one line each in rollouts.jsonl, each distinct picture once in images/, of the size in which
the model saw it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageOps

from perl.files import RunFolder, replacing
from perl.types import EncodedImage, Group, Message, Rollout

Rows = list[dict[str, Any]]
"""Lines of rollouts.jsonl; `images` names the pictures' files, in the order that the model saw."""

_SMALL = 4096
"""Bytes of a lossless file that are not worth losing anything for."""
_LONGEST = 16383
"""Pixels of a side that WebP takes."""


class Gallery:
    """Appends rollouts to a run folder's record."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def keep_groups(self, stage: str, step: int, groups: Iterable[Group]) -> Rows:
        """The first rollout of every order of the groups, with rewards and advantages."""
        rows = []
        for group in groups:
            orders = [rollout.variant.order for rollout in group.rollouts]
            for index in sorted(orders.index(order) for order in set(orders)):
                parts = {name: values[index] for name, values in group.reward_parts.items()}
                rollout, reward = group.rollouts[index], group.rewards[index]
                more: dict[str, Any] = {"advantage": _number(group.advantages[index])}
                if group.logged:
                    logged = group.logged.items()
                    more["logged"] = {name: _plain(values[index]) for name, values in logged}
                rows.append(self._keep(stage, step, rollout, reward, parts, **more))
        return rows

    def keep_rollouts(
        self, stage: str, step: int, scored: Iterable[tuple[Rollout, float, dict[str, float]]]
    ) -> Rows:
        """Evaluation rollouts, each with its reward and the scores of the functions."""
        return [self._keep(stage, step, *each) for each in scored]

    def _keep(
        self,
        stage: str,
        step: int,
        rollout: Rollout,
        reward: float,
        parts: dict[str, float],
        **more: Any,
    ) -> dict[str, Any]:
        variant = rollout.variant
        pictures = zip(rollout.prompt.images, variant.images, strict=True)
        row = {
            "stage": stage,
            "step": step,
            "example": variant.example.id,
            "task": variant.example.task,
            "order": list(variant.order),
            "images": [self._picture(encoded, image) for encoded, image in pictures],
            "question": chat_text(variant.messages),
            "answer": variant.answer,
            "text": rollout.text,
            "reward": _number(reward),
            "rewards": {name: _number(value) for name, value in parts.items()},
            **more,
        }
        if rollout.weight_versions:
            row["weight_versions"] = [list(span) for span in rollout.weight_versions]
        self.folder.append(self.folder.rollouts, row)
        return row

    def _picture(self, encoded: EncodedImage, image: Image.Image) -> str:
        path = self.folder.images / f"{encoded.key[:16]}.webp"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_bytes(compact(as_shown(encoded, image)))
        return f"images/{path.name}"


def chat_text(messages: Sequence[Message]) -> str:
    """What the model is asked; the turns with their roles if there are several."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


def as_shown(encoded: EncodedImage, image: Image.Image) -> Image.Image:
    """The picture as the model saw it, RGB in the size that it was resized to."""
    image = image.convert("RGB")
    size = encoded.size or image.size
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def compact(image: Image.Image) -> bytes:
    """A WebP file: a photo at quality 90, without loss where that is smaller (drawings, text) or small anyway.

    A photo of 640 x 427 pixels takes 88 KiB, where PNG takes 479.
    """
    if max(image.size) > _LONGEST:
        image = ImageOps.contain(image, (_LONGEST, _LONGEST))
    lossless, lossy = (
        _webp(image, **options)
        for options in ({"lossless": True, "quality": 20, "method": 1}, {"quality": 90})
    )
    return lossless if len(lossless) <= max(len(lossy), _SMALL) else lossy


def _webp(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", **options)
    return file.getvalue()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _plain(value: Any) -> Any:
    """What JSON can hold as it is, else its text."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
