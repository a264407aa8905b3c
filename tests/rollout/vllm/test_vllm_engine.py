"""Completions of a vLLM server are those of the trainer's tokens, pictures and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import SamplingParams
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from tests.stand_ins import processes
from tests.vllm_checks import apart, changed, prompt
from tests.vllm_server import VLLMServer, vllm_server

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("tiny-qwen2.5-vl")


@pytest.fixture
def server(folder: Path) -> Iterator[VLLMServer]:
    with vllm_server(folder) as made:
        yield made


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_policy(str(folder), ModelConfig(path=str(folder)), torch.device("cpu"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(str(folder), ModelConfig(path=str(folder)))


@pytest.fixture
def engine(server: VLLMServer, policy: Policy, processor: Processor) -> VLLMEngine:
    return VLLMEngine([Server(server.url, None, 60.0, 8)], policy, processor, processes())


def test_its_tokens_have_the_trainers_probabilities_before_and_after_each_step(
    engine: VLLMEngine, policy: Policy, processor: Processor
) -> None:
    prompts = [prompt(processor, 0, 1, 2), prompt(processor, 2, 0, 1)]
    for version in range(3):
        with engine.serving(version):
            found = engine.generate(prompts, PARAMS, seed=version)
        for asked, completions in zip(prompts, found, strict=True):
            assert len(completions) == 3
            assert apart(policy, processor, asked, completions) < 1e-5
            assert {c.weight_versions for c in completions} == {
                ((version, 0, len(c.token_ids)),) for c in completions
            }
        changed(policy)


def test_each_picture_travels_once_between_two_syncs(
    engine: VLLMEngine, server: VLLMServer, processor: Processor
) -> None:
    prompts = [prompt(processor, 0, 1, 2), prompt(processor, 2, 0, 1), prompt(processor, 1, 2, 0)]
    with engine.serving(0):
        engine.generate(prompts, PARAMS, seed=0)
        engine.generate(prompts, PARAMS, seed=1)
    asked = [body for path, body in server.asked if path.endswith("generate")]
    # Two more and one more for the probe of the sync.
    assert sum("content_parts" in body for body in asked) == 3 + 2
    assert sum("features" in body for body in asked) == 6 + 1
