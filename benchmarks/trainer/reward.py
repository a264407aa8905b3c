"""A reward that both trainers compute alike, and that differs between any two completions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

REWARD = "benchmarks.trainer.reward:text_hash"
"""As `reward.functions` names it."""


def text_hash(completions: Sequence[Any], **_: Any) -> list[float]:
    """0 to 1, from a checksum of the text: random weights write nothing that could be right or wrong.

    Args:
        completions: texts, or chats that end with one, as TRL hands them over.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]
