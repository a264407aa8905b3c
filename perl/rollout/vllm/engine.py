"""Sampling by vLLM servers, with the tokens and the pictures of the trainer and under weights that are known."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any
from zlib import crc32

import numpy as np

from perl.distributed import Processes
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import Completion, SamplingParams, end_tokens
from perl.rollout.vllm.client import MODEL, Loop, Server
from perl.rollout.vllm.pictures import Pictures, features, offsets_of
from perl.rollout.vllm.weights import FileTransfer
from perl.types import EncodedPrompt, RunFailed, WeightSpan


class VLLMEngine:
    """Asks servers for completions; see `perl.rollout.engine.Engine`.

    Args:
        servers: all of them have the model's weights.
        policy: that is trained.
        processor: for the end tokens, and the tokens a completion must not hold.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        policy: Policy,
        processor: Processor,
        processes: Processes,
    ) -> None:
        self.servers, self.processes = servers, processes
        self.pictures = [Pictures(server) for server in servers]
        self.ends = sorted(end_tokens(policy, processor))
        self.banned = {str(token): -100.0 for token in processor.unsampled_token_ids().tolist()}
        self.transfer = FileTransfer(policy, processes)
        self.version: int | None = None
        # Two runs that share a server by mistake must not take each other's weights for theirs.
        self._run = secrets.token_hex(4)
        self._loop = Loop()

    @contextmanager
    def serving(self, version: int) -> Iterator[None]:
        """The policy's present weights answer in the block, those after `version` steps; all processes enter it together."""
        if version != self.version:
            self.transfer.write()
            with self.processes.jointly():
                if self.processes.index == 0:
                    self._loop.run(self.transfer.send(self.servers, self._named(version)))
            for pictures in self.pictures:
                pictures.forget()
            self.version = version
        yield

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt. Servers draw them with a generator of their own, not with this seed: with
        one for each request, vLLM samples request by request, and its build for CPUs dies of a prompt that is read in parts."""
        out: list[list[Completion]] = [[] for _ in prompts]
        for number, completions in self.stream(prompts, params):
            out[number] = completions
        return out

    def stream(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The completions of each prompt with its number, as they end. What is under way ends when the iterator is closed."""
        ended: SimpleQueue[tuple[int, list[Completion]] | BaseException] = SimpleQueue()

        async def ask(number: int, prompt: EncodedPrompt) -> None:
            ended.put((number, await self._ask(prompt, params)))

        async def ask_all() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for number, prompt in enumerate(prompts):
                        tasks.create_task(ask(number, prompt))
            except BaseExceptionGroup as errors:
                ended.put(errors.exceptions[0])

        future = self._loop.start(ask_all())
        try:
            for _ in prompts:
                found = ended.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            future.cancel()

    async def _ask(self, prompt: EncodedPrompt, params: SamplingParams) -> list[Completion]:
        # All prompts over the same pictures go to one server.
        shown = "".join(sorted(image.key for image in prompt.images))
        at = crc32(shown.encode()) % len(self.servers)
        await self.pictures[at].bring(prompt)
        body: dict[str, Any] = {
            "model": MODEL,
            "token_ids": prompt.input_ids.tolist(),
            "sampling_params": self._sampling(params),
        }
        if prompt.images:
            body["features"] = features(prompt.images, offsets_of(prompt))
        return [self._completion(choice) for choice in await self.servers[at].generate(body)]

    def _sampling(self, params: SamplingParams) -> dict[str, Any]:
        return {
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_new_tokens,
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": self.ends,
            "logit_bias": self.banned,
            "logprobs": 0,
        }

    def _completion(self, choice: dict[str, Any]) -> Completion:
        content = choice["logprobs"]["content"]
        ids = np.array(choice["token_ids"], np.int64)
        logprobs = np.array([token["logprob"] for token in content], np.float32)
        spans = tuple(
            WeightSpan(self._number(s["version"]), s["start"], s["end"])
            for s in choice["weight_versions"]
        )
        return Completion(ids, logprobs, choice["finish_reason"] == "stop", spans)

    def _named(self, version: int) -> str:
        return f"{self._run}-{version}"

    def _number(self, named: str) -> int:
        run, _, version = named.rpartition("-")
        if run != self._run:
            raise RunFailed(f"a server answered with weights {named}, which are not of this run")
        return int(version)
