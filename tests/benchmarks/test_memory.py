"""`benchmarks.memory`: what PyTorch's allocator counts in a step is what `perl-rl plan` computes, within 10 %."""

import pytest

from benchmarks.memory import CASES, peaks


def test_memory_of_a_step_is_what_is_computed() -> None:
    [case] = [case for case in CASES if case.name == "small, checkpointed, frozen tower"]
    found = peaks(case)
    assert {*found} == {"rollout", "logprobs", "update"}
    for stage, (counted, computed) in found.items():
        assert computed == pytest.approx(counted, rel=0.1), stage
