"""How many rows of logits to hold at once, and which of two ways to take."""

from __future__ import annotations

import os

import torch

_GPU_BYTES = 1280 * 2**20
"""About 4096 rows of 152k logits in bf16: below that, reading and writing the fp32 gradient of the
head once per block takes a noticeable part of the time of the block's products."""

_CPU_BYTES = 4 * 2**20
"""A block that stays in the cache of a core; LOG.md has the measurement."""

_EAGER_BYTES = 32 * 2**20
_MULTIPLE = 128  # rows of a tile of the matrix units


def head_rows(
    n_tokens: int,
    vocab: int,
    logits_dtype: torch.dtype,
    device: torch.device,
    chunk_size: int | None,
    memory_budget: int | None,
) -> int:
    """Rows of a block of logits made from hidden states.

    `chunk_size` is taken as it is; else `memory_budget` bytes, or a default by device, are filled.
    Blocks are made equally large, so that the last one does not run at a worse rate.
    """
    if chunk_size is not None:
        return chunk_size
    budget = memory_budget or (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES)
    fitting = budget // (max(vocab, 1) * logits_dtype.itemsize)
    if memory_budget is None:
        fitting = max(fitting, 128)
    fitting = max(fitting, 1)
    blocks = -(-n_tokens // fitting)
    even = -(-n_tokens // max(blocks, 1))
    rounded = -(-even // _MULTIPLE) * _MULTIPLE
    return max(min(rounded if rounded <= fitting else even, fitting), 1)


def logits_rows(n_tokens: int, vocab: int, backend: str) -> int:
    """Rows of logits that are there already, worked on at once: all of them in Triton, as many as
    keep fp32 temporaries small in PyTorch."""
    if backend == "triton":
        return max(n_tokens, 1)
    return max(16, _EAGER_BYTES // (4 * max(vocab, 1)))


def persistent_wanted() -> bool:
    """Whether log-probs that need no gradient come from the persistent kernel, instead of products
    by blocks: as PERL_PERSISTENT=1 says. It must reach 74 % of the rate of cuBLAS at H = 1024, 85 %
    at 2048 and 92 % at 4096 to be quicker; until that has been measured, nothing chooses it."""
    return os.environ.get("PERL_PERSISTENT") == "1"
