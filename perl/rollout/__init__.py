"""Rollout engines: prompts in, sampled completions out."""

from perl.rollout.engine import Completion, InProcessEngine, SamplingParams

__all__ = ["Completion", "InProcessEngine", "SamplingParams"]
