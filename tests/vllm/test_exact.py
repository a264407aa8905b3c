"""Tokens of a real server have the trainer's probabilities under each step's weights, and end where the trainer's end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from tests.stand_ins import processes
from tests.vllm_checks import apart, changed, prompt

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=24)


def after_syncs(
    engine: VLLMEngine, policy: Policy, processor: Processor, syncs: int
) -> list[float]:
    """Most |log p(engine) - log p(trainer)| over all orders of three pictures, at first and after each of some syncs."""
    prompts = [prompt(processor, *order) for order in permutations(range(3))]
    worst = []
    for version in range(syncs + 1):
        with engine.serving(version):
            found = engine.generate(prompts, PARAMS, seed=version)
        assert {c.weight_versions for each in found for c in each} == {
            ((version, 0, len(c.token_ids)),) for each in found for c in each
        }
        worst.append(
            max(apart(policy, processor, p, cs) for p, cs in zip(prompts, found, strict=True))
        )
        changed(policy)
    print("\nlargest |Δ log p| by sync:", " ".join(f"{w:.1e}" for w in worst))
    return worst


def test_permuted_pictures_before_and_after_each_of_ten_syncs(
    engine: VLLMEngine, policy: Policy, processor: Processor
) -> None:
    assert policy.vision.trained and policy.base.config.tie_word_embeddings
    assert max(after_syncs(engine, policy, processor, 10)) <= 1e-5


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-qwen2-vl"])
def test_other_families(name: str, serving: Callable, tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder(name)
    config = ModelConfig(path=str(folder))
    policy = load_policy(str(folder), config, torch.device("cpu"))
    processor = load_processor(str(folder), config)
    with serving(folder) as url:
        engine = VLLMEngine([Server(url, None, 60.0, 64)], policy, processor, processes())
        worst = after_syncs(engine, policy, processor, 2)
        engine.close()
    assert max(worst) <= 1e-5


def test_adapters_are_merged_for_the_server(url: str, folder: Path, processor: Processor) -> None:
    config = ModelConfig(path=str(folder), lora_rank=4)
    policy = load_policy(str(folder), config, torch.device("cpu"))
    engine = VLLMEngine([Server(url, None, 60.0, 64)], policy, processor, processes())
    worst = after_syncs(engine, policy, processor, 2)
    engine.close()
    assert max(worst) <= 1e-5


def test_greedy_completions_and_stops_are_those_of_the_engine_in_process(
    engine: VLLMEngine, policy: Policy, processor: Processor
) -> None:
    changed(policy)
    own = InProcessEngine(policy, processor, 4096)
    greedy = SamplingParams(n=1, temperature=0.0, max_new_tokens=24)
    prompts = [prompt(processor, *order) for order in permutations(range(3))]
    expected = own.generate(prompts, greedy, seed=0)
    word = processor.decode(expected[0][0].token_ids[3:5]).strip()
    stopped = replace(greedy, stop=(word,))
    with engine.serving(0):
        found = engine.generate(prompts, greedy, seed=0)
        found_stopped = engine.generate(prompts, stopped, seed=0)
    expected_stopped = own.generate(prompts, stopped, seed=0)
    assert len(expected_stopped[0][0].token_ids) <= 5 and expected_stopped[0][0].finished
    for theirs, ours in zip([*found, *found_stopped], [*expected, *expected_stopped], strict=True):
        assert theirs[0].token_ids.tolist() == ours[0].token_ids.tolist()
        assert theirs[0].finished == ours[0].finished
        assert np.abs(theirs[0].logprobs - ours[0].logprobs).max() <= 1e-5


def test_a_completion_that_ends_holds_its_end_token(
    engine: VLLMEngine, policy: Policy, processor: Processor
) -> None:
    params = SamplingParams(n=64, temperature=1.0, max_new_tokens=100)
    with engine.serving(0):
        (found,) = engine.generate([prompt(processor, 0, 1, 2)], params, seed=0)
    assert 0 < sum(c.finished for c in found) < 64
    for completion in found:
        ends = [int(t) in engine.ends for t in completion.token_ids]
        assert ends == [False] * (len(ends) - 1) + [completion.finished]
        assert completion.finished or len(ends) == 100
    banned = set(processor.unsampled_token_ids().tolist())
    assert not banned & {int(t) for c in found for t in c.token_ids}
    assert apart(policy, processor, prompt(processor, 0, 1, 2), found) <= 1e-5
