"""The routes of a vLLM server: tokens in, tokens out, and those that change its weights.

Named and shaped as in vLLM 0.32 and 0.33: `vllm/entrypoints/scale_out/token_in_token_out/protocol.py` and
`vllm/entrypoints/rl/online/api_router.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from json import dumps
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2

from perl.types import UserError, one_line

T = TypeVar("T")

MODEL = "perl"
"""The name that servers serve the model by."""
KEY = "PERL_VLLM_API_KEY"
"""The environment's variable with the key that vLLM servers were started with; it stands in no file."""


class ServerError(Exception):
    """A server did not do what it was asked for; `status` is that of HTTP, None where no answer came, as it `hangs` or is gone."""

    def __init__(
        self, server: Server, what: str, status: int | None = None, hangs: bool = False
    ) -> None:
        super().__init__(f"vLLM at {server.url}: {what}")
        self.server, self.status, self.hangs = server, status, hangs


class Own(Protocol):
    """A server that is ours to start and to stop."""

    def restart(self) -> None:
        """At the same address; returns when it is well."""
        ...

    def stop(self) -> None: ...


class Server:
    """One server.

    Args:
        url: `http://127.0.0.1:8000`.
        key: that it was started with, if it was.
        timeout: seconds after which a server that answers nothing hangs.
        requests: most of them under way at once.
        own: what has started it, if we have.

    Raises:
        UserError: no address of HTTP, or one beyond this machine without a key.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        requests: int,
        own: Own | None = None,
    ) -> None:
        _check_address(url, key)
        self.url, self.timeout, self.requests = url.rstrip("/"), timeout, requests
        self.own = own
        self.sent: Counter[str] = Counter()
        """`requests` and `bytes_sent` so far."""
        self._free = asyncio.Semaphore(requests)
        self._heard = time.monotonic()
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # A completion may take long; whether the server hangs is told by all of its answers together.
            timeout=httpx2.Timeout(None, connect=10.0),
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

    async def model(self) -> str:
        """The folder or hub name that it was started with."""
        found = (await self.get("/v1/models"))["data"]
        return next((str(m["root"]) for m in found if m["id"] == MODEL), f"none called {MODEL}")

    async def is_well(self) -> bool:
        try:
            async with asyncio.timeout(min(10.0, self.timeout)):
                answer = await self._client.get("/health")
        except (httpx2.HTTPError, TimeoutError):
            return False
        return answer.status_code == 200

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(
        self, method: str, path: str, json: Any = None, params: Any = None
    ) -> dict[str, Any]:
        content = dumps(json).encode() if json is not None else b""
        self.sent += Counter(requests=1, bytes_sent=len(content))
        request = asyncio.ensure_future(
            self._client.request(
                method,
                path,
                content=content,
                params=params,
                headers={"Content-Type": "application/json"},
            )
        )
        began = time.monotonic()
        try:
            while not request.done():
                left = max(began, self._heard) + self.timeout - time.monotonic()
                if left <= 0:
                    raise ServerError(
                        self, f"has answered nothing for {self.timeout:g} seconds", hangs=True
                    )
                await asyncio.wait({request}, timeout=left)
            answer = request.result()
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ServerError(self, f"{path} failed ({why})") from error
        finally:
            request.cancel()
        self._heard = time.monotonic()
        if answer.status_code != 200:
            said = one_line(answer.text)
            raise ServerError(
                self, f"{path} answered {answer.status_code}: {said}", answer.status_code
            )
        return answer.json()


def _check_address(url: str, key: str | None) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            f"rollout.url: {url} is no address of a server; give one such as http://127.0.0.1:8000"
        )
    if host not in ("localhost", "::1") and not host.startswith("127.") and not key:
        raise UserError(
            f"rollout.url: {url} is another machine, where anyone can reach a server without a key; start it with --api-key and "
            f"set {KEY} here"
        )


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

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _coroutine(work: Awaitable[T]) -> T:
    return await work
