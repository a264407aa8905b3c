"""How much is sent for pictures, against requests that carry their own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from itertools import permutations

import httpx2

from perl.model.processor import Processor
from perl.report.gallery import as_shown
from perl.rollout.engine import SamplingParams
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.pictures import _data_url
from perl.types import EncodedPrompt
from tests.vllm_checks import prompt


class Sent:
    """Bytes of requests, and of the pictures in them."""

    def __init__(self) -> None:
        self.all = self.pictures = 0

    async def count(self, request: httpx2.Request) -> None:
        self.all += len(request.content)
        self.pictures += sum(map(len, re.findall(rb"data:image[^\"]*", request.content)))


async def naively(url: str, prompts: Sequence[EncodedPrompt], rollouts: int, sent: Sent) -> None:
    """A request for each rollout, which carries the pictures."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        client.event_hooks = {"request": [sent.count]}
        for asked in prompts:
            ids, token = asked.input_ids.tolist(), asked.image_token_id
            body = {
                "model": "perl",
                # One placeholder for each picture.
                "token_ids": [
                    t
                    for t, before in zip(ids, [None, *ids], strict=False)
                    if token != t or token != before
                ],
                "content_parts": [
                    {"type": "image_url", "url": _data_url(as_shown(*each))}
                    for each in zip(asked.images, asked.pictures, strict=True)
                ],
                "return_token_ids": True,
                "sampling_params": {"max_tokens": 8},
            }
            for _ in range(rollouts):
                answer = await client.post("/inference/v1/generate", json=body)
                assert answer.json()["prompt_token_ids"] == ids


def test_pixels_are_sent_once_for_all_orders_and_rollouts(
    url: str, engine: VLLMEngine, processor: Processor
) -> None:
    prompts, rollouts = [prompt(processor, *order) for order in permutations(range(3))], 4
    ours, naive = Sent(), Sent()
    with engine.serving(0):
        engine.servers[0]._client.event_hooks = {"request": [ours.count]}
        params = SamplingParams(n=rollouts, temperature=1.0, max_new_tokens=8)
        engine.generate(prompts, params, seed=0)

    asyncio.run(naively(url, prompts, rollouts, naive))
    print(
        f"\n{len(prompts)} orders, {rollouts} rollouts of each: {ours.pictures} bytes of pictures of {ours.all}; "
        f"a request for each rollout: {naive.pictures} of {naive.all}"
    )
    assert naive.pictures >= len(prompts) * rollouts * ours.pictures
