"""The operations in PyTorch: any device, any floating dtype."""

from .advantage import group_advantages
from .losses import evaluate, prepare
from .rows import row_gradient, row_loss, row_stats

__all__ = ["evaluate", "group_advantages", "prepare", "row_gradient", "row_loss", "row_stats"]
