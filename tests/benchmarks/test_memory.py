"""`benchmarks.memory`: what is counted in a step is what `perl-rl plan` computes, within 10 %."""

from dataclasses import replace

import pytest

from benchmarks.memory import CASES, TRUE, peaks, true_update


def test_memory_of_a_step_is_what_is_computed() -> None:
    [case] = [case for case in CASES if case.name == "small, checkpointed, frozen tower"]
    found = peaks(case)
    assert {*found} == {"rollout", "logprobs", "update"}
    for stage, (counted, computed) in found.items():
        assert computed == pytest.approx(counted, rel=0.1), stage


@pytest.mark.slow
def test_memory_of_an_update_of_true_width_is_what_is_computed() -> None:
    """Two of its layers, in bfloat16 and in flash attention's form, on the meta device."""
    [case] = [case for case in TRUE if case.name == "Qwen2.5-VL-3B, LoRA, checkpointed"]
    for what, (counted, computed) in true_update(
        replace(case, text={"num_hidden_layers": 2}, questions=1)
    ).items():
        assert computed == pytest.approx(counted, rel=0.1), what
