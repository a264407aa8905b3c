"""Rollout engines: prompts in, sampled completions out."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from perl.model.padded import PaddedPolicy
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.counts import generate_counts
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.rollout.padded import PaddedEngine

__all__ = [
    "Completion",
    "InProcessEngine",
    "PaddedEngine",
    "SamplingParams",
    "generate_counts",
    "make_engine",
]


def make_engine(
    policy: Policy,
    processor: Processor,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> InProcessEngine:
    """The engine that can sample from this policy; see `InProcessEngine`."""
    engine = PaddedEngine if isinstance(policy, PaddedPolicy) else InProcessEngine
    return engine(policy, processor, batch_size, autocast)
