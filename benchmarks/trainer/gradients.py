"""Gradients as they stand before an optimizer's step."""

from __future__ import annotations

import torch

from benchmarks.train_step import measure

CPU = torch.device("cpu")


def copied_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the name of the parameter, copies on the CPU that outlive the step; those without a gradient are left out."""
    return {name: g.clone() for name, g in measure.gradients(model, CPU).items()}
