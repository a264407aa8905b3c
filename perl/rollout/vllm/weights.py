"""The weights that are trained, on vLLM servers, by vLLM's weight-transfer routes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perl.distributed import Processes
from perl.model.policy import Policy
from perl.rollout.vllm.client import Server, ServerError

SHARED = Path("/dev/shm")
"""Files here lie in memory."""


class FileTransfer:
    """By safetensors files in memory, which servers on the same machine read with this package's plug-in."""

    def __init__(self, policy: Policy, processes: Processes) -> None:
        self.policy, self.processes = policy, processes
        self._folder: Path | None = None

    def write(self) -> None:
        """Write the present weights in the dtype they are computed with; all processes take part."""
        is_main = self.processes.index == 0
        with self.processes.jointly():
            if is_main:
                self.close()
                self._folder = Path(tempfile.mkdtemp(prefix="perl-rl-", dir=SHARED))
        with self.processes.jointly():
            self.policy.save_pretrained(self._folder or SHARED, self.policy.dtype, is_main)

    async def send(self, servers: Sequence[Server], version: str) -> None:
        """Give them to servers, which are known to have them when it returns."""
        await asyncio.gather(*(self._send(server, version) for server in servers))

    async def _send(self, server: Server, version: str) -> None:
        # All caches: the tower may have changed, so that features of known pictures are old.
        await server.post("/pause", mode="wait", clear_cache="true")
        await server.post("/init_weight_transfer_engine", {"init_info": {}})
        await server.post("/start_weight_update")
        await server.post("/update_weights", {"update_info": {"path": str(self._folder)}})
        await server.post("/finish_weight_update", {"weight_version": version})
        # Only now: a server whose update failed has no weights, and must not answer.
        await server.post("/resume")
        found = await server.weight_version()
        if found != version:
            raise ServerError(server, f"has weights {found} behind an update to {version}")

    def close(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
