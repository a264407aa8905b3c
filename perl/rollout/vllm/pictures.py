"""Pictures on a server: each travels once, however many prompts in whatever orders show it."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from perl.report.gallery import as_shown
from perl.rollout.vllm.client import Server
from perl.types import EncodedImage, EncodedPrompt, RunFailed


class Pictures:
    """Those that one server has in its cache under the hashes of their contents, which requests name them by."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.sent = 0
        """Pictures that have travelled so far."""
        self._there: dict[str, asyncio.Task[None]] = {}

    def forget(self) -> None:
        """The server has cleared its caches."""
        self._there.clear()

    async def bring(self, prompt: EncodedPrompt) -> None:
        """See to it that the server has all pictures of a prompt."""
        brought = []
        for encoded, picture in zip(prompt.images, prompt.pictures, strict=True):
            if (task := self._there.get(encoded.key)) is None:
                work = self._bring(encoded, picture, prompt.image_token_id)
                task = self._there[encoded.key] = asyncio.create_task(work)
            brought.append(task)
        # They may be forgotten meanwhile, as caches are cleared under requests that are kept.
        await asyncio.gather(*brought)

    async def _bring(self, encoded: EncodedImage, picture: Image.Image, token: int) -> None:
        # In the size that the trainer sees it, which the server's processor then leaves as it is. A request of its own puts it
        # into the cache, so that none of those that follow needs the pixels.
        shown = _data_url(as_shown(encoded, picture))
        self.sent += 1
        tokens = await self.server.show(shown, encoded.key, token)
        if tokens != encoded.tokens:
            raise RunFailed(
                f"vLLM at {self.server.url} makes {tokens} tokens of a picture that are {encoded.tokens} here; start it with the "
                "--mm-processor-kwargs that docs/rollouts.md gives for model.min_pixels and max_pixels"
            )


def features(images: Sequence[EncodedImage], offsets: Sequence[int]) -> dict[str, Any]:
    """What a request says of the pictures in its tokens: by which keys the server has them, and where they stand."""
    places = [{"offset": o, "length": i.tokens} for o, i in zip(offsets, images, strict=True)]
    return {
        "mm_hashes": {"image": [image.key for image in images]},
        "mm_placeholders": {"image": places},
    }


def offsets_of(prompt: EncodedPrompt) -> list[int]:
    """Where each image's tokens begin."""
    places, out, at = np.flatnonzero(prompt.input_ids == prompt.image_token_id), [], 0
    for image in prompt.images:
        out.append(int(places[at]))
        at += image.tokens
    return out


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
