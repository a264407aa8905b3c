"""The routes of a vLLM server: tokens in, tokens out, and those that change its weights.

Named and shaped as in vLLM 0.32 and 0.33: `vllm/entrypoints/scale_out/token_in_token_out/protocol.py` and
`vllm/entrypoints/rl/online/api_router.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import httpx2

T = TypeVar("T")

MODEL = "perl"
"""The name that servers serve the model by."""


class ServerError(Exception):
    """A server did not do what it was asked for; `status` is that of HTTP, None where no answer came."""

    def __init__(self, server: Server, what: str, status: int | None = None) -> None:
        super().__init__(f"vLLM at {server.url}: {what}")
        self.server, self.status = server, status


class Server:
    """One server.

    Args:
        url: `http://127.0.0.1:8000`.
        key: that it was started with, if it was.
        timeout: seconds that an answer may take.
        requests: most of them under way at once.
    """

    def __init__(self, url: str, key: str | None, timeout: float, requests: int) -> None:
        self.url, self.timeout, self.requests = url.rstrip("/"), timeout, requests
        self._free = asyncio.Semaphore(requests)
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None),
        )

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, **query: str
    ) -> dict[str, Any]:
        return await self._ask("POST", path, json=body, params=query)

    async def get(self, path: str) -> dict[str, Any]:
        return await self._ask("GET", path)

    async def generate(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of a request for completions, in the order of their index; waits while too many are under way."""
        async with self._free:
            answer = await self.post("/inference/v1/generate", body)
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    async def show(self, picture: str, key: str, token: int) -> int:
        """Put a picture, given as a data URL, into the server's cache under a key; returns how many tokens it is there.

        Args:
            token: that stands for pictures.
        """
        part = {"type": "image_url", "url": picture, "uuid": key}
        body = {
            "model": MODEL,
            # One, which the server makes as many of as the picture is tokens.
            "token_ids": [token],
            "content_parts": [part],
            "sampling_params": {"max_tokens": 1},
            "return_token_ids": True,
        }
        async with self._free:
            answer = await self.post("/inference/v1/generate", body)
        (place,) = answer["mm_placeholders"]["image"]
        return place["length"]

    async def weight_version(self) -> str:
        return (await self.get("/weight_info"))["weight_version"]

    async def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = await self._client.request(method, path, **content)
        except httpx2.HTTPError as error:
            raise ServerError(self, f"{path} failed ({type(error).__name__}: {error})") from error
        if answer.status_code != 200:
            raise ServerError(self, f"{path} answered {answer.text[:200]}", answer.status_code)
        return answer.json()


class Loop:
    """An event loop in a thread of its own, for the requests that go on while the caller does something else."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm").start()

    def start(self, work: Awaitable[T]) -> Any:
        """A `concurrent.futures.Future`; cancelling it cancels the work."""
        return asyncio.run_coroutine_threadsafe(_coroutine(work), self._loop)

    def run(self, work: Awaitable[T]) -> T:
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()


async def _coroutine(work: Awaitable[T]) -> T:
    return await work
