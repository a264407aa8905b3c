"""The families of models that the packed trainer knows; to add one: its file here, its instance in `FAMILIES`."""

from __future__ import annotations

from perl.model.families.base import Family, ImageFeatures
from perl.model.families.internvl import InternVL
from perl.model.families.qwen import QwenVL

__all__ = ["FAMILIES", "Family", "ImageFeatures", "family_of"]

FAMILIES: tuple[Family, ...] = (QwenVL(), InternVL())
"""Families whose packed log-probs and gradients are tested to equal one sequence at a time with the stock model."""


def family_of(model_type: str) -> Family | None:
    """The family of a `model_type`; None: the model is trained on padded batches instead."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)
