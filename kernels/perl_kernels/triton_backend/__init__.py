"""The operations in Triton: CUDA devices from sm_80 on, and any device in Triton's interpreter;
fp32, fp16 and bf16."""

from .advantage import group_advantages
from .head import head_stats
from .losses import evaluate
from .preparation import prepare
from .rows import row_gradient, row_loss, row_stats

__all__ = [
    "evaluate",
    "group_advantages",
    "head_stats",
    "prepare",
    "row_gradient",
    "row_loss",
    "row_stats",
]
