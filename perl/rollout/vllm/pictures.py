"""Pictures on a server: each travels once, however many prompts in whatever orders show it."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from perl.report.gallery import as_shown
from perl.rollout.vllm.client import MODEL, Server, ServerError
from perl.types import EncodedImage, EncodedPrompt


class Pictures:
    """Those that one server has in its cache, by the content's hash, which is what requests name them by."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._there: dict[str, asyncio.Task[None]] = {}

    def forget(self) -> None:
        """The server has cleared its caches."""
        self._there.clear()

    async def bring(self, prompt: EncodedPrompt) -> None:
        """See to it that the server has all pictures of a prompt."""
        for encoded, picture in zip(prompt.images, prompt.pictures, strict=True):
            if encoded.key not in self._there:
                work = self._bring(encoded, picture, prompt.image_token_id)
                self._there[encoded.key] = asyncio.create_task(work)
        for encoded in prompt.images:
            await self._there[encoded.key]

    async def _bring(self, encoded: EncodedImage, picture: Image.Image, token: int) -> None:
        # In the size that the trainer sees it, which the server's processor then leaves as it is.
        rendered = await self.server.render(_data_url(as_shown(encoded, picture)))
        (place,) = rendered["mm_placeholders"]["image"]
        if place["length"] != encoded.tokens:
            raise ServerError(
                self.server,
                f"makes {place['length']} tokens of a picture that are {encoded.tokens} here; do --mm-processor-kwargs differ?",
            )
        # A request of its own puts it into the cache, so that none of those that follow needs the data.
        alone = features([encoded], [0], rendered["kwargs_data"])
        body = {
            "model": MODEL,
            "token_ids": [token] * encoded.tokens,
            "features": alone,
            "sampling_params": {"max_tokens": 1},
        }
        await self.server.generate(body)


def features(
    images: Sequence[EncodedImage],
    offsets: Sequence[int],
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a request says of the pictures in its tokens: their hashes, where they stand, and their pixels if they are sent."""
    places = [{"offset": o, "length": i.tokens} for o, i in zip(offsets, images, strict=True)]
    said: dict[str, Any] = {
        "mm_hashes": {"image": [image.key for image in images]},
        "mm_placeholders": {"image": places},
    }
    return said | ({"kwargs_data": dict(data)} if data else {})


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
