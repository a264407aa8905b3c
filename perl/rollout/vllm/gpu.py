"""Weights from GPU to GPU by vLLM's own trainer side, which needs vLLM in the trainer's environment."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch

from perl.distributed import Processes
from perl.model.export import Exported
from perl.model.policy import Policy
from perl.rollout.vllm.client import Server
from perl.types import UserError

PORT = 29600
"""That the trainer waits at for the servers' workers."""


def is_there() -> bool:
    return importlib.util.find_spec("vllm") is not None


class GPUTransfer:
    """`nccl`: broadcast to GPUs of servers; `ipc`: handles of memory on GPUs that servers share with the trainer.

    Written against the sources of vLLM 0.32; never run, for want of a GPU.

    Args:
        run: runs what servers are asked for to its end, from any thread but the event loop's.

    Raises:
        UserError: vLLM is not there.
    """

    repeatable = False

    def __init__(
        self,
        backend: Literal["nccl", "ipc"],
        policy: Policy,
        processes: Processes,
        run: Callable[[Awaitable[Any]], Any],
    ) -> None:
        if not is_there():
            raise UserError(
                f"rollout.transfer = {backend} needs vLLM in the trainer's own environment; install it there, or set "
                "rollout.transfer = files"
            )
        self.backend, self.policy, self.processes, self.run = backend, policy, processes, run
        self._trainer: Any = None

    def write(self) -> None:
        """Nothing: the weights are read where they lie."""

    async def send(self, servers: Sequence[Server], version: str) -> None:
        await asyncio.to_thread(self._send, servers, version)

    def take_part(self) -> None:
        self._send((), "")

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()

    def _send(self, servers: Sequence[Server], version: str) -> None:
        if self.policy.device.type == "cuda":  # Of this thread.
            torch.cuda.set_device(self.policy.device)
        if self._trainer is None:
            self._client = self._client_of(servers)
            self._trainer = self._connected(servers)
        self._client.version = version
        self._trainer.send_weights()

    def _connected(self, servers: Sequence[Server]) -> Any:
        from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
            WeightTransferTrainerFactory,
        )

        if self.backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import (  # pyright: ignore[reportMissingImports]
                IPCTrainerInitInfo,
            )

            # Packed: in buffers of bounded size.
            info: Any = IPCTrainerInitInfo(packed=True, rank=self.processes.index)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
                NCCLTrainerInitInfo,
            )

            info = NCCLTrainerInitInfo(
                master_address=_own_address(servers),
                master_port=PORT,
                world_size=1 + sum(self._client.workers),
                rank=self.processes.index,
            )
        return WeightTransferTrainerFactory.trainer_init(
            info, client=self._client, source=self._source()
        )

    def _source(self) -> Any:
        from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
            ParamMeta,
            WeightSource,
        )

        exported = Exported(self.policy.model, self.policy.dtype)

        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                planned = ((name, exported.planned[name]) for name in exported.sequence)
                return [ParamMeta(name, spec.dtype, tuple(spec.shape)) for name, spec in planned]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(exported)

        return Source()

    def _client_of(self, servers: Sequence[Server]) -> Any:
        from vllm.distributed.weight_transfer.clients import (  # pyright: ignore[reportMissingImports]
            HTTPVLLMWeightSyncClient,
        )

        run = self.run

        class Client(HTTPVLLMWeightSyncClient):
            """Speaks to all servers at once, by our own connections, which have the key."""

            version = ""
            workers: Sequence[int] = ()

            def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
                async def ask(server: Server, before: int) -> None:
                    said = json
                    if path == "finish_weight_update":
                        said = {"weight_version": self.version}
                    elif (
                        path == "init_weight_transfer_engine"
                        and json
                        and "rank_offset" in json["init_info"]
                    ):
                        # Ranks behind the trainer's one, server after server.
                        said = {"init_info": {**json["init_info"], "rank_offset": 1 + before}}
                    await server.post(f"/{path}", said)

                async def ask_all() -> None:
                    before = [0, *accumulate(self.workers)]
                    await asyncio.gather(*map(ask, servers, before))

                run(ask_all())

        async def workers() -> list[int]:
            found = await asyncio.gather(*(s.get("/get_world_size") for s in servers))
            return [answer["world_size"] for answer in found]

        client = Client("")
        client.workers = run(workers())
        return client


def _own_address(servers: Sequence[Server]) -> str:
    """Of this machine, as the servers reach it."""
    from urllib.parse import urlsplit

    if not servers:
        return "127.0.0.1"
    parts = urlsplit(servers[0].url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # Sends nothing.
        return probe.getsockname()[0]
