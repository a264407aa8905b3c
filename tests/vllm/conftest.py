"""Real vLLM servers of tiny models in float32, with this tree's plug-in. `make vllm-test` says which `vllm` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perl.config import Config, DataConfig, ModelConfig, RolloutConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.serve import OwnServer, launch
from tests.stand_ins import processes


@pytest.fixture(scope="session")
def serving(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., AbstractContextManager[str]]:
    """`with serving(folder, *flags) as url`: a server of the model in a folder, with the plug-in of `packages`."""

    @contextmanager
    def serve(folder: Path, *flags: str, packages: Path | None = None) -> Iterator[str]:
        config = Config(
            model=ModelConfig(path=str(folder)),
            data=DataConfig(max_prompt_tokens=512),
            rollout=RolloutConfig(vllm=os.environ["PERL_TEST_VLLM"], serve_args=flags),
        )
        made = launch(config, str(folder), "float32", "files", cuda=False)
        if packages:
            environment = {**made.environment, "PYTHONPATH": str(packages)}
            made = replace(made, environment=environment)
        server = OwnServer(made, tmp_path_factory.mktemp("server") / "log.txt", 300.0)
        server.start()
        try:
            server.wait()
            yield made.url
        finally:
            server.stop()

    return serve


@pytest.fixture(scope="session")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    """The tiny Qwen2.5-VL, whose head is tied."""
    return tiny_folder("tiny-qwen2.5-vl")


@pytest.fixture(scope="session")
def url(serving: Callable[..., AbstractContextManager[str]], folder: Path) -> Iterator[str]:
    """The server that most tests share: each gives it weights of its own."""
    with serving(folder) as made:
        yield made


@pytest.fixture
def policy(folder: Path) -> Policy:
    return load_policy(str(folder), ModelConfig(path=str(folder)), torch.device("cpu"))


@pytest.fixture(scope="session")
def processor(folder: Path) -> Processor:
    return load_processor(str(folder), ModelConfig(path=str(folder)))


@pytest.fixture
def engine(url: str, policy: Policy, processor: Processor) -> Iterator[VLLMEngine]:
    made = VLLMEngine([Server(url, None, 60.0, 64)], policy, processor, processes())
    yield made
    made.close()
