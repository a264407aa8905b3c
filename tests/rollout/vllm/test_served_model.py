"""Commands that ask a model, on a vLLM server that has it: as in process, and without its weights here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perl.config import EVAL_SEED, Config, ModelConfig, RolloutConfig
from perl.model.loading import load_processor
from perl.rollout.engine import SamplingParams
from perl.rollout.opening import engine_and_encoder
from tests.command_line import run
from tests.messages import refused
from tests.vllm_checks import prompt
from tests.vllm_server import VLLMServer, vllm_server


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("tiny-qwen2.5-vl")


@pytest.fixture
def server(folder: Path) -> Iterator[VLLMServer]:
    with vllm_server(folder) as made:
        yield made


def config_of(folder: Path | str, *url: str) -> Config:
    rollout = RolloutConfig(engine="vllm" if url else "inprocess", url=url, kv_cache_tokens=600)
    return Config(model=ModelConfig(path=str(folder)), rollout=rollout)


def test_the_likeliest_completions_are_those_of_this_process(
    server: VLLMServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=2, temperature=0.0, max_new_tokens=5)
    asked = [prompt(load_processor(str(folder), ModelConfig()), 2, 0, 1)]
    here, _ = engine_and_encoder(config_of(folder))
    expected = here.generate(asked, params, EVAL_SEED)
    monkeypatch.setattr("perl.model.loading.load_policy", None)  # Nobody asks for the weights.
    there, encoder = engine_and_encoder(config_of(folder, server.url))
    found = there.generate(asked, params, EVAL_SEED)
    assert [[c.token_ids.tolist() for c in one] for one in found] == [
        [c.token_ids.tolist() for c in one] for one in expected
    ]
    # The cache in process is nothing to a server.
    assert encoder.limit.tokens == 8192
    assert {c.weight_versions for one in found for c in one} == {()}
    # Of the likeliest one, which vLLM gives once.
    (body,) = [b for p, b in server.asked if p.endswith("generate") and "features" in b]
    assert body["sampling_params"]["n"] == 1
    there.close()


def test_generate_asks_it(
    server: VLLMServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("generate", str(folder), "--prompt", "which 3", "--max-new-tokens", "4")
    run(*asked)
    expected = capsys.readouterr().out
    run(*asked, "--rollout.engine", "vllm", "--rollout.url", server.url)
    assert capsys.readouterr().out == expected
    assert "/inference/v1/generate" in server.paths()


def test_servers_with_another_model(server: VLLMServer, folder: Path, tmp_path: Path) -> None:
    server.config = ModelConfig(path=str(tmp_path))
    with refused(server.url, tmp_path, folder, "rollout.url"):
        engine_and_encoder(config_of(folder, server.url))
    server.config = ModelConfig(path=str(folder))
    server.version = "abcd-7"
    with refused(server.url, "abcd-7", folder):
        engine_and_encoder(config_of(folder, server.url))
    with refused("http://127.0.0.1:9", "rollout.url"):
        engine_and_encoder(config_of(folder, "http://127.0.0.1:9"))
