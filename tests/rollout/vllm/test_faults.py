"""What goes wrong between trainer and servers: requests are made again under the same weights, or the run stops in one line."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import SamplingParams
from perl.rollout.vllm import weights
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.types import Message, RunFailed
from tests.messages import refused, tells
from tests.stand_ins import processes
from tests.vllm_checks import apart, changed, prompt
from tests.vllm_server import VLLMServer, vllm_server

PARAMS = SamplingParams(n=2, temperature=1.0, max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("tiny-qwen2.5-vl")


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(str(folder), ModelConfig(path=str(folder)), torch.device("cpu"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(str(folder), ModelConfig(path=str(folder)))


@pytest.fixture
def server(folder: Path) -> Iterator[VLLMServer]:
    with vllm_server(folder) as made:
        yield made


@pytest.fixture
def engine(server: VLLMServer, policy: Policy, processor: Processor) -> Iterator[VLLMEngine]:
    made = VLLMEngine([Server(server.url, None, 3.0, 8)], policy, processor, processes())
    yield made
    made.close()


def generated(body: Any) -> bool:
    """Whether it is a request of the step, not one that brings a picture or the probe's."""
    return isinstance(body, dict) and body.get("sampling_params", {}).get("n") == PARAMS.n


def failing(
    server: VLLMServer, fault: Callable[[], tuple[int, Any] | None], times: int = 1
) -> None:
    """Something happens to the first requests of the step."""
    left = iter(range(times))

    def before(path: str, body: Any) -> tuple[int, Any] | None:
        if generated(body) and next(left, None) is not None:
            return fault()
        return None

    server.before = before


def asked(engine: VLLMEngine, processor: Processor, policy: Policy) -> dict[str, float]:
    """Two prompts of two completions are answered once each, as the trainer would; the counts of that."""
    prompts = [prompt(processor, 0, 1, 2), prompt(processor, 2, 0, 1)]
    engine.counts()
    with engine.serving(1):
        found = engine.generate(prompts, PARAMS, 0)
    assert [len(completions) for completions in found] == [2, 2]
    for one, completions in zip(prompts, found, strict=True):
        assert apart(policy, processor, one, completions) < 1e-5
        assert {v for c in completions for v, *_ in c.weight_versions} == {1}
    return engine.counts()


def test_an_error_of_the_server_is_asked_again(
    engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    failing(server, lambda: (503, {"error": "busy"}))
    assert asked(engine, processor, policy)["rollout/retried"] == 1


def test_pictures_that_were_dropped_travel_again(
    engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    def drop() -> None:
        server.pictures.clear()

    failing(server, drop)
    counts = asked(engine, processor, policy)
    # Three, and the two of the probe; then the three again.
    assert counts["rollout/pictures_sent"] == 3 + 2 + 3
    assert counts["rollout/retried"] in (1, 2)


def test_a_server_that_was_started_anew_gets_the_weights_again(
    engine: VLLMEngine, server: VLLMServer, folder: Path, policy: Policy, processor: Processor
) -> None:
    def restart() -> None:
        server.version, server.policy = (
            "default",
            load_policy(str(folder), server.config, torch.device("cpu")),
        )
        server.pictures.clear()

    changed(policy)
    failing(server, restart)
    assert asked(engine, processor, policy)["rollout/retried"] >= 1
    assert server.paths().count("/update_weights") == 2


def test_one_of_ours_that_is_dead_is_started_again(
    engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    started: list[bool] = []

    def before(path: str, body: Any) -> tuple[int, Any] | None:
        dead = not started and any(generated(b) for _, b in server.asked)
        return (502, {}) if dead and path in ("/health", "/inference/v1/generate") else None

    server.before = before
    own = SimpleNamespace(restart=lambda: started.append(True), stop=lambda: None)
    engine.servers[0].own = own  # type: ignore[assignment]
    asked(engine, processor, policy)
    assert started == [True]


def test_one_that_hangs_and_stays_so_stops_the_run(
    server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    engine = VLLMEngine([Server(server.url, None, 0.6, 8)], policy, processor, processes())
    ended = threading.Event()

    def before(path: str, body: Any) -> tuple[int, Any] | None:
        if any(generated(b) for _, b in server.asked):
            ended.wait(5)
            return 502, {}
        return None

    server.before = before
    began = time.monotonic()
    with refused(server.url, "rollout.timeout", error=RunFailed):
        asked(engine, processor, policy)
    ended.set()
    engine.close()
    assert time.monotonic() - began < 15


def test_a_request_that_is_refused_each_time_stops_the_run(
    engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    failing(server, lambda: (400, {"error": "max_model_len"}), 9)
    with refused(server.url, "400", "max_model_len", "docs/rollouts.md", error=RunFailed):
        asked(engine, processor, policy)
    failing(server, lambda: (500, {"error": "broken"}), 99)
    with refused(server.url, "500", "broken", error=RunFailed):
        asked(engine, processor, policy)


@pytest.mark.parametrize(
    "path", ["/start_weight_update", "/update_weights", "/finish_weight_update"]
)
def test_a_server_whose_update_failed_is_not_resumed(
    path: str, engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    server.before = lambda asked, body: (500, {"error": "lost"}) if asked == path else None
    with refused(server.url, path, "500", error=RunFailed):
        asked(engine, processor, policy)
    assert "/resume" not in server.paths()
    assert engine.version is None


def test_no_room_for_the_weights(
    engine: VLLMEngine,
    server: VLLMServer,
    policy: Policy,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "SHARED", tmp_path)
    monkeypatch.setattr(type(policy), "save_pretrained", full)
    with refused(tmp_path, "--shm-size", error=RunFailed):
        asked(engine, processor, policy)
    assert not [*tmp_path.iterdir()] and "/pause" not in server.paths()


def test_what_a_killed_run_left_is_removed(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "SHARED", tmp_path)
    alive, dead = tmp_path / "perl-rl-1-a", tmp_path / "perl-rl-4194999-b"
    for folder in (alive, dead):
        folder.mkdir()
    transfer = weights.FileTransfer(policy, processes())
    transfer.write()
    assert alive.exists() and not dead.exists()
    assert transfer.folder and [*transfer.folder.glob("*.safetensors")]
    transfer.close()
    assert [*tmp_path.iterdir()] == [alive]
    shutil.rmtree(alive)


def test_answers_under_another_runs_weights_are_not_taken(
    engine: VLLMEngine, server: VLLMServer, policy: Policy, processor: Processor
) -> None:
    """Another run gave the server its own meanwhile: it is given ours again."""

    def other() -> None:
        server.version = "00000000-1"

    failing(server, other)
    engine.servers[0].own = SimpleNamespace(stop=lambda: None)  # type: ignore[assignment]  # No restart.
    assert asked(engine, processor, policy)["rollout/retried"] >= 1
    assert server.paths().count("/update_weights") == 2


def test_the_first_process_sends_them_again_for_all(
    server: VLLMServer, folder: Path, policy: Policy, processor: Processor
) -> None:
    """The second waits for it, and does not send them itself."""
    own = Server(server.url, None, 10.0, 8)
    engine = VLLMEngine([own], policy, processor, processes(2, 1))
    engine.versions.allowed = {1}
    server.version = engine.versions.name(1)
    asked_for: list[str] = []

    def other(path: str, body: Any) -> None:
        if generated(body) and not asked_for:
            asked_for.append(server.version)
            server.version = "default"
            threading.Timer(0.5, setattr, (server, "version", engine.versions.name(1))).start()

    server.before = other
    (found,) = engine.generate([prompt(processor, 0, 1, 2)], PARAMS, 0)
    assert {v for c in found for v, *_ in c.weight_versions} == {1}
    assert "/update_weights" not in server.paths()
    engine.close()


def test_prompts_are_shared_out_by_pictures_and_else_by_tokens(
    policy: Policy, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All orders of the same pictures go to one server; prompts without any to both."""
    servers = [Server(f"http://127.0.0.1:{port}", None, 1.0, 8) for port in (1, 2)]
    engine = VLLMEngine(servers, policy, processor, processes())
    asked_of: list[int] = []

    async def ask(at: int, *_: Any) -> list[Any]:
        asked_of.append(at)
        return [None]

    monkeypatch.setattr(engine, "_ask_at", ask)
    orders = [prompt(processor, *order) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    engine.generate(orders, PARAMS, 0)
    assert len(set(asked_of)) == 1
    asked_of.clear()
    texts = [
        processor.encode_messages([Message("user", w)], []) for w in ["1", "2", "3", "4", "5", "6"]
    ]
    engine.generate(texts, PARAMS, 0)
    assert set(asked_of) == {0, 1}
    engine.close()


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("127.0.0.1:8000", ["rollout.url", "http://127.0.0.1:8000"]),
        ("http://[::1", ["rollout.url"]),
        ("http://10.0.0.3:8000", ["rollout.url", "PERL_VLLM_API_KEY", "--api-key"]),
    ],
)
def test_addresses_that_cannot_be(url: str, names: list[str]) -> None:
    with refused(*names):
        Server(url, None, 1.0, 1)


def test_the_key_goes_along(policy: Policy, server: VLLMServer) -> None:
    made = Server("http://10.0.0.3:8000", "secret", 1.0, 1)
    assert made._client.headers["Authorization"] == "Bearer secret"


def test_a_server_that_is_asked_again_is_told_of(
    engine: VLLMEngine,
    server: VLLMServer,
    policy: Policy,
    processor: Processor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing(server, lambda: (503, {"error": "busy"}))
    with caplog.at_level(logging.WARNING):
        asked(engine, processor, policy)
    tells(caplog.text, server.url, "503", "busy")
