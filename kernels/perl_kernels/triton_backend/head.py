"""Statistics of rows straight from hidden states and LM head, where the persistent kernel can."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..scores import RowStats, Scoring
from .persistent import persistent_logprobs, supported

_logger = logging.getLogger("perl_kernels")


def head_stats(hidden: Tensor, weight: Tensor, scoring: Scoring) -> RowStats | None:
    """Statistics of the rows of hidden [N, H] @ weight [V, H].T, whose logits are never rounded or
    stored; None, said once in the log, where the kernel cannot take these operands."""
    why_not = supported(hidden, weight)
    if why_not is not None:
        _refuse(why_not)
        return None
    logprobs, entropy, lse = persistent_logprobs(
        hidden, weight, scoring.targets, scoring.bias, scoring.temperature, scoring.softcap
    )
    return RowStats(logprobs, entropy, lse, torch.zeros_like(lse))


@functools.cache
def _refuse(why_not: str) -> None:
    _logger.info("PERL_PERSISTENT=1 has no effect: %s", why_not)
