"""Real vLLM servers of tiny models in float32, with this tree's plug-in. `make vllm-test` says which `vllm` starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import torch

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from tests.stand_ins import processes

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN = 300.0
"""Seconds; half a minute on two free cores."""


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that gives a server this tree's plug-in as an installed package would: the modules and the entry point."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "perl").symlink_to(ROOT / "perl")
    info = folder / "perl_rl-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: perl-rl\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {where}" for name, where in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def serving(
    plugin_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AbstractContextManager[str]]:
    """`with serving(folder, *flags) as url`: a server of the model in a folder, with the plug-in of `packages`."""

    @contextmanager
    def serve(folder: Path, *flags: str, packages: Path = plugin_path) -> Iterator[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            os.environ["PERL_TEST_VLLM"],
            *("serve", str(folder), "--served-model-name", "perl"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
            *("--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
            *("--weight-transfer-config", json.dumps({"backend": "perl"})),
            *("--limit-mm-per-prompt", json.dumps({"image": 8, "video": 0})),
            *flags,
        ]
        environment = os.environ | {
            "PYTHONPATH": str(packages),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        log = tmp_path_factory.mktemp("server") / "log.txt"
        with log.open("w") as out:
            server = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(server, url, log)
            yield url
        finally:
            # The group: its own processes outlive one that failed.
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

    return serve


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.5)
    pytest.fail(f"no server; the end of {log}:\n{log.read_text()[-3000:]}")


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
