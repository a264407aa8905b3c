"""The weights that are trained, on vLLM servers, by vLLM's weight-transfer routes, and proof that they are there."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from perl.distributed import Processes
from perl.model.policy import Policy
from perl.rollout.vllm.client import Server, ServerError
from perl.types import RunFailed, WeightSpan

SHARED = Path("/dev/shm")
"""Files here lie in memory."""


class Transfer(Protocol):
    """A way from the trainer to servers."""

    repeatable: bool
    """Whether `send` can give a server once more what it was given, without the trainer's other processes."""

    def write(self) -> None:
        """Make the present weights ready to be sent; all processes take part."""
        ...

    async def send(self, servers: Sequence[Server], version: str) -> None:
        """Start an update of servers that are paused, bring the weights, and finish it under this version."""
        ...

    def take_part(self) -> None:
        """What the other processes do while the first one sends."""
        ...

    def close(self) -> None: ...


class FileTransfer:
    """By safetensors files in memory, which servers on the same machine read with this package's plug-in."""

    repeatable = True

    def __init__(self, policy: Policy, processes: Processes) -> None:
        self.policy, self.processes = policy, processes
        self.folder: Path | None = None

    def write(self) -> None:
        """In the dtype that the weights are computed with. One version is there at a time.

        Raises:
            RunFailed: there is no room for them.
        """
        is_main = self.processes.index == 0
        with self.processes.jointly():
            if is_main:
                self.close()
                _remove_leftovers()
                self.folder = Path(tempfile.mkdtemp(prefix=f"perl-rl-{os.getpid()}-", dir=SHARED))
        with self.processes.jointly():
            try:
                self.policy.save_pretrained(self.folder or SHARED, self.policy.dtype, is_main)
            except OSError as error:
                self.close()
                if error.errno != errno.ENOSPC:
                    raise
                raise RunFailed(
                    f"{SHARED} has no room for the weights that vLLM servers are to read; make it larger (mount -o "
                    "remount,size=..., or docker's --shm-size)"
                ) from error

    async def send(self, servers: Sequence[Server], version: str) -> None:
        await asyncio.gather(*(self._send(server, version) for server in servers))

    async def _send(self, server: Server, version: str) -> None:
        await server.post("/init_weight_transfer_engine", {"init_info": {}})
        await server.post("/start_weight_update")
        await server.post("/update_weights", {"update_info": {"path": str(self.folder)}})
        await server.post("/finish_weight_update", {"weight_version": version})

    def take_part(self) -> None: ...

    def close(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def _remove_leftovers() -> None:
    """What killed runs have left."""
    for folder in SHARED.glob("perl-rl-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class Versions:
    """Names of weights on the wire; here of those that servers began with."""

    def names(self) -> set[str]:
        """Those that may sample now."""
        return {"default"}

    def spans(self, said: Sequence[dict[str, Any]]) -> tuple[WeightSpan, ...] | None:
        """What a server says of a completion's tokens; None if some are of weights that may not sample now."""
        return () if {span["version"] for span in said} <= self.names() else None


class RunVersions(Versions):
    """`<the run>-<steps that made them>`.

    Two runs that share a server by mistake must not take each other's weights for theirs.
    """

    def __init__(self) -> None:
        self._run = secrets.token_hex(4)
        self.allowed: set[int] = set()
        """Those that may sample now."""

    def name(self, version: int) -> str:
        return f"{self._run}-{version}"

    def names(self) -> set[str]:
        return {self.name(version) for version in self.allowed}

    def spans(self, said: Sequence[dict[str, Any]]) -> tuple[WeightSpan, ...] | None:
        if super().spans(said) is None:
            return None
        return tuple(
            WeightSpan(int(span["version"].rpartition("-")[2]), span["start"], span["end"])
            for span in said
        )


async def pause(servers: Sequence[Server], keep: bool) -> None:
    """Before an update; requests that are under way end first, or are kept and go on behind it.

    All caches are cleared: features of known pictures are of the old tower, and keys and values of the old weights. vLLM computes
    those of a kept request anew.
    """
    mode = "keep" if keep else "wait"
    await asyncio.gather(*(s.post("/pause", mode=mode, clear_cache="true") for s in servers))


async def resume(servers: Sequence[Server], version: str) -> None:
    """Behind an update that has come to its end. A server whose update failed has no weights, and its next request would end it.

    Raises:
        ServerError: a server has other weights.
    """
    for server in servers:
        found = await server.weight_version()
        if found != version:
            raise ServerError(server, f"has weights {found} behind an update to {version}")
    await asyncio.gather(*(s.post("/resume") for s in servers))
