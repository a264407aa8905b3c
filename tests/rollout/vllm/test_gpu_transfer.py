"""Weights from GPU to GPU, with stand-ins of vLLM's trainer side: what it is given, in which sequence, and by which ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from perl.config import ModelConfig, RolloutConfig
from perl.model.loading import load_policy
from perl.model.policy import Policy
from perl.rollout.engines import transfer_of
from perl.rollout.vllm.client import Loop, Server
from perl.rollout.vllm.gpu import GPUTransfer
from tests.messages import refused
from tests.stand_ins import processes


class Client:
    """As vLLM 0.32's HTTPVLLMWeightSyncClient calls its `_post`."""

    def __init__(self, url: str) -> None: ...

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", None)

    def _post(self, path: str, json: Any = None) -> None:
        raise NotImplementedError


class Trainer:
    """As vLLM 0.32's trainer engines: rank 0 alone speaks to servers, all iterate the weights."""

    made: list[Trainer]

    def __init__(self, info: Any, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.sent: list[Any] = []
        if info.rank == 0:
            client.init_weight_transfer_engine({"rank_offset": 1, "world_size": info.world_size})
        self.made.append(self)

    def send_weights(self) -> None:
        self.sent.append([(m.name, m.dtype, m.shape) for m in self.source.metadata()])
        self.sent.append([(name, tensor.clone()) for name, tensor in self.source])
        if self.info.rank == 0:
            self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.sent.append("shut down")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The modules that are imported of it; what was made stands in the list."""

    def info(**fields: Any) -> Any:
        return SimpleNamespace(**{"world_size": None, **fields})

    def make(info: Any, *, client: Any, source: Any) -> Trainer:
        return Trainer(info, client, source)

    def meta(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        return SimpleNamespace(name=name, dtype=dtype, shape=shape)

    root = "vllm.distributed.weight_transfer"
    parts = {
        "base": {"ParamMeta": meta, "WeightSource": object},
        "clients": {"HTTPVLLMWeightSyncClient": Client},
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=make)},
        "ipc_engine": {"IPCTrainerInitInfo": info},
        "nccl_engine": {"NCCLTrainerInitInfo": info},
    }
    for name in ("vllm", "vllm.distributed", root):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in parts.items():
        module = ModuleType(f"{root}.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("perl.rollout.vllm.gpu.is_there", lambda: True)
    Trainer.made = []
    return Trainer.made


class TwoServers:
    """Of one worker and of four; what they were asked for stands in `asked`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        workers = {"http://127.0.0.1:1": 1, "http://127.0.0.1:2": 4}
        self.servers = [Server(url, None, 1.0, 1) for url in workers]

        async def get(server: Server, path: str) -> Any:
            assert path == "/get_world_size"
            return {"world_size": workers[server.url]}

        async def post(server: Server, path: str, body: Any = None) -> Any:
            self.asked.append((server.url[-1], path, body))

        monkeypatch.setattr(Server, "get", get)
        monkeypatch.setattr(Server, "post", post)


@pytest.fixture
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    folder = str(tiny_folder("tiny-qwen2.5-vl"))
    return load_policy(folder, ModelConfig(path=folder), torch.device("cpu"))


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_the_first_process_broadcasts_to_the_workers_of_all_servers(
    vllm: list[Trainer], policy: Policy, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = TwoServers(monkeypatch)
    transfer = GPUTransfer("nccl", policy, processes(), loop.run)
    for version in ("a-1", "a-2"):
        loop.run(transfer.send(two.servers, version))
    (trainer,) = vllm  # Connected once.
    assert (trainer.info.rank, trainer.info.world_size) == (0, 1 + 1 + 4)
    assert trainer.info.master_address == "127.0.0.1"
    joined = [(s, b["init_info"]["rank_offset"]) for s, p, b in two.asked if "init" in p]
    assert sorted(joined) == [("1", 1), ("2", 2)]
    finished = [(s, b) for s, p, b in two.asked if p == "/finish_weight_update"]
    assert sorted(s for s, _ in finished) == ["1", "1", "2", "2"]
    assert [b["weight_version"] for _, b in finished] == ["a-1", "a-1", "a-2", "a-2"]
    planned, sent, *_ = trainer.sent
    assert planned == [(n, torch.float32, tuple(t.shape)) for n, t in sent]
    assert "lm_head.weight" not in dict(sent)  # It is tied.
    stored = dict(policy.named_parameters())
    table = "model.model.language_model.embed_tokens.weight"
    (embedded,) = [t for n, t in sent if n.endswith("embed_tokens.weight")]
    assert torch.equal(embedded, stored[table])
    transfer.close()
    assert trainer.sent[-1] == "shut down"


def test_other_processes_iterate_the_weights_and_ask_nobody(
    vllm: list[Trainer], policy: Policy, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = TwoServers(monkeypatch)
    transfer = GPUTransfer("ipc", policy, processes(2, 1), loop.run)
    transfer.take_part()
    (trainer,) = vllm
    assert trainer.info.rank == 1 and trainer.info.packed and len(trainer.sent[1]) > 90
    assert not two.asked


@pytest.mark.parametrize(
    ("given", "cuda", "here", "found"),
    [
        ({}, False, True, "files"),
        ({}, True, False, "files"),
        ({}, True, True, "nccl"),
        ({"placement": "colocated"}, True, True, "ipc"),
        ({"transfer": "files"}, True, True, "files"),
    ],
)
def test_how_weights_go(
    given: dict[str, Any], cuda: bool, here: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.rollout.engines.vllm_is_here", lambda: here)
    assert transfer_of(RolloutConfig(**given), cuda) == found


def test_ways_that_cannot_be(policy: Policy, loop: Loop) -> None:
    with refused("rollout.transfer = nccl", "rollout.transfer = files"):
        transfer_of(RolloutConfig(transfer="nccl"), False)
    with refused("rollout.transfer = ipc", "rollout.placement = colocated"):
        transfer_of(RolloutConfig(transfer="ipc"), True)
    with refused("rollout.transfer = nccl", "vLLM", "rollout.transfer = files"):
        GPUTransfer("nccl", policy, processes(), loop.run)
