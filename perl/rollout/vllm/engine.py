"""Sampling by vLLM servers, with the tokens and the pictures of this side and under weights that are known."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast
from zlib import crc32

import numpy as np

from perl.distributed import Processes
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.sharding import gathered
from perl.rollout.engine import Completion, Ended, SamplingParams, end_tokens
from perl.rollout.vllm.client import MODEL, Loop, Server, ServerError
from perl.rollout.vllm.examine import examine
from perl.rollout.vllm.pictures import Pictures, features, offsets_of
from perl.rollout.vllm.probe import PARAMS, Probe
from perl.rollout.vllm.weights import FileTransfer, RunVersions, Transfer, Versions, pause, resume
from perl.types import EncodedPrompt, RunFailed, UserError

logger = logging.getLogger(__name__)

TRIES = 4
"""How often a request is made of a server that is well."""
_LONGEST_WAIT = 10.0


class ServedModel:
    """A model that vLLM servers have by themselves; see `perl.rollout.engine.Engine`.

    Args:
        servers: all of them have the same model.
        processor: for the tokens a completion must not hold.
        ends: tokens that end a completion.
        loop: that requests go on in, if there is one.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        processor: Processor,
        ends: Collection[int],
        loop: Loop | None = None,
    ) -> None:
        self.servers = servers
        self.pictures = [Pictures(server) for server in servers]
        self.ends = sorted(ends)
        self.banned = {str(token): -100.0 for token in processor.unsampled_token_ids().tolist()}
        self.versions = Versions()
        self._recovering = [asyncio.Lock() for _ in servers]
        self._recovered = Counter[int]()
        self._retried = 0
        self._counted: Counter[str] = Counter()
        self._loop = loop or Loop()

    def check(self, model: str) -> None:
        """Raise UserError unless servers have this model, as they were started with it."""
        for server in self.servers:
            try:
                served, weights = (
                    self._loop.run(server.model()),
                    self._loop.run(server.weight_version()),
                )
            except ServerError as error:
                raise UserError(
                    f"{error}; start it as docs/rollouts.md says, or leave rollout.url out for one that is started"
                ) from error
            if served != model and Path(served).resolve() != Path(model).resolve():
                raise UserError(
                    f"vLLM at {server.url} has the model {served}, not {model}; start it with that, or leave rollout.url out"
                )
            if weights not in self.versions.names():
                raise UserError(
                    f"vLLM at {server.url} has weights of a run ({weights}), not those of {model}; start it again"
                )

    def serving(self, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt. Servers draw them with a generator of their own, not with this seed: with
        one for each request, vLLM samples request by request, and its build for CPUs dies of a prompt that is read in parts."""
        out: list[list[Completion]] = [[] for _ in prompts]
        for number, completions in self.begin(prompts, params, seed):
            out[number] = completions
        return out

    def begin(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int) -> Ended:
        """Ask for all at once; see `perl.rollout.engine.Engine`.

        Raises:
            RunFailed: when it is iterated: a server does not answer, and did not come back.
        """
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

        def as_they_end() -> Iterator[Any]:
            try:
                yield None
                for _ in prompts:
                    found = ended.get()
                    if isinstance(found, BaseException):
                        raise found
                    yield found
            finally:
                future.cancel()

        waiting = as_they_end()
        next(waiting)  # One that has not begun would not note that it is closed.
        return cast(Ended, waiting)

    def counts(self) -> dict[str, float]:
        """Requests and their bytes, pictures that travelled, and requests that had to be made again."""
        total = sum((server.sent for server in self.servers), Counter())
        total["pictures_sent"] = sum(pictures.sent for pictures in self.pictures)
        total["retried"] = self._retried
        new, self._counted = total - self._counted, total
        names = ("requests", "bytes_sent", "pictures_sent", "retried")
        return {f"rollout/{name}": float(new[name]) for name in names}

    def close(self) -> None:
        """End what is under way, stop the servers that are ours."""
        for server in self.servers:
            self._loop.run(server.close())
            if server.own:
                server.own.stop()
        self._loop.close()

    async def _ask(self, prompt: EncodedPrompt, params: SamplingParams) -> list[Completion]:
        # All prompts over the same pictures go to one server.
        shown = "".join(sorted(image.key for image in prompt.images)).encode()
        at = crc32(shown or prompt.input_ids.tobytes()) % len(self.servers)
        for tries in range(1, TRIES + 1):
            known = self._recovered[at]
            try:
                if found := await self._ask_at(at, prompt, params):
                    return found
                error = ServerError(
                    self.servers[at], "answered under other weights than it was given"
                )
            except ServerError as raised:
                error = raised
            if tries == TRIES:
                raise RunFailed(
                    f"{error}, {TRIES} times; what is wrong stands in the server's log"
                ) from error
            self._retried += 1
            # One recovers a server for all that wait for it.
            async with self._recovering[at]:
                if known == self._recovered[at]:
                    await self._recover(at, error, tries)
                    self._recovered[at] += 1
        raise AssertionError

    async def _ask_at(
        self, at: int, prompt: EncodedPrompt, params: SamplingParams
    ) -> list[Completion] | None:
        """Of one server; None if it answered under weights that may not sample now, or gave a completion up."""
        await self.pictures[at].bring(prompt)
        body: dict[str, Any] = {
            "model": MODEL,
            "token_ids": prompt.input_ids.tolist(),
            "sampling_params": self._sampling(params),
        }
        if prompt.images:
            body["features"] = features(prompt.images, offsets_of(prompt))
        out = []
        for choice in await self.servers[at].generate(body):
            spans = self.versions.spans(choice["weight_versions"])
            if spans is None or choice["finish_reason"] not in ("stop", "length"):
                return None
            content = choice["logprobs"]["content"]
            ids = np.array(choice["token_ids"], np.int64)
            logprobs = np.array([token["logprob"] for token in content], np.float32)
            out.append(Completion(ids, logprobs, choice["finish_reason"] == "stop", spans))
        return out if params.temperature else out * params.n

    async def _recover(self, at: int, error: ServerError, tries: int) -> None:
        """Have a server answer again under the present weights.

        Raises:
            RunFailed: it will not.
        """
        server = self.servers[at]
        if error.status is not None and error.status < 500 and error.status not in (408, 429):
            raise RunFailed(
                f"{error}; see docs/rollouts.md for the flags that it must be started with"
            ) from error
        logger.warning("%s; asking again", error)
        until = asyncio.get_running_loop().time() + server.timeout
        # It may have dropped pictures from its cache.
        self.pictures[at].forget()
        if server.own and (error.hangs or not await server.is_well()):
            await asyncio.to_thread(server.own.restart)
        wait = 0.1 * 2**tries
        while not await server.is_well():
            if asyncio.get_running_loop().time() > until:
                raise RunFailed(
                    f"{error}, and is not back after {server.timeout:g} seconds (rollout.timeout); start it again, and go on"
                ) from error
            await asyncio.sleep(wait := min(2 * wait, _LONGEST_WAIT))
        await asyncio.sleep(wait)
        if await self._weights_of(server) not in self.versions.names():
            await self._give_again(server, error)

    async def _weights_of(self, server: Server) -> str:
        try:
            return await server.weight_version()
        except ServerError as error:
            raise RunFailed(f"{error}; is it started with VLLM_SERVER_DEV_MODE=1?") from error

    async def _give_again(self, server: Server, error: ServerError) -> None:
        """Give a server that has come back the weights that it had.

        Raises:
            RunFailed: they cannot be given.
        """
        raise RunFailed(
            f"{error}, and has other weights than before; start it again with the model"
        ) from error

    def _sampling(self, params: SamplingParams) -> dict[str, Any]:
        return {
            # Of the likeliest completion vLLM gives one.
            "n": params.n if params.temperature else 1,
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


class VLLMEngine(ServedModel):
    """Servers that are given the weights that are trained.

    Args:
        policy: that is trained.
        processes: of the run.
        transfer: how weights come to the servers; None: by files in shared memory.
        tolerance: most mean |Δ log p| of the probe; 0: by the dtype.
        sleeps: whether servers leave their memory to the trainer outside of `serving`.
        loop: that requests go on in, if `transfer` has one.
        keeps: whether requests may be under way when weights change; they go on under the new ones.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        policy: Policy,
        processor: Processor,
        processes: Processes,
        transfer: Transfer | None = None,
        tolerance: float = 0.0,
        sleeps: bool = False,
        loop: Loop | None = None,
        keeps: bool = False,
    ) -> None:
        settings = getattr(policy.base, "generation_config", None)
        super().__init__(servers, processor, end_tokens(settings, processor), loop)
        self.policy, self.processes = policy, processes
        self.transfer, self.sleeps = transfer or FileTransfer(policy, processes), sleeps
        self.keeps = keeps
        self.probe = Probe(policy, processor, tolerance)
        self.versions = RunVersions()
        self.version: int | None = None
        self._examined = False

    @contextmanager
    def serving(self, version: int) -> Iterator[None]:
        """The policy's present weights answer in the block, those after `version` steps; all processes enter it together.

        Raises:
            RunFailed: a server has not taken them.
        """
        if version != self.version:
            self.sync(version, self.keeps)
        try:
            yield
        finally:
            if self.sleeps:
                self.version = None
                self._on_main(self._each("/sleep", level="2"))

    def sync(self, version: int, keep: bool = False) -> None:
        """Give servers the policy's present weights; all processes take part.

        Args:
            version: steps that made them.
            keep: requests that are under way go on under them, and say from which token on; else they end first.

        Raises:
            RunFailed: a server has not taken them, or does not answer as the trainer would. It is not used any more.
        """
        if not self._examined:
            self._on_main(self._examine())
            self._examined = True
        before = [self.version] if keep and self.version is not None else []
        self.versions.allowed = {*before, version}
        self.version = None
        if self.sleeps:
            self._on_main(self._each("/wake_up", tags="weights"))
        self.transfer.write()
        name = self.versions.name(version)
        self._on_main(pause(self.servers, keep))
        self._on_main(self.transfer.send(self.servers, name), self.transfer.take_part)
        self._on_main(resume(self.servers, name))
        if self.sleeps:
            self._on_main(self._each("/wake_up", tags="kv_cache"))
        for pictures in self.pictures:
            pictures.forget()
        with gathered(self.policy):
            self._on_main(self._prove())
        self.version = version

    def close(self) -> None:
        """And remove what they have read."""
        super().close()
        self.transfer.close()

    async def _give_again(self, server: Server, error: ServerError) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + server.timeout
        while self.processes.index and clock() < until:  # The first process sends them.
            if await self._weights_of(server) in self.versions.names():
                return
            await asyncio.sleep(1.0)
        if not self.transfer.repeatable or self.version is None or self.processes.index:
            raise RunFailed(
                f"{error}, and has come back without this run's weights, which cannot be sent to it now; go on from the last step"
            ) from error
        # The very weights whose sync was proved; the trainer's own may have changed since.
        name = self.versions.name(self.version)
        try:
            await pause([server], keep=False)
            await self.transfer.send([server], name)
            await resume([server], name)
        except ServerError as again:
            raise RunFailed(f"{again}; it has not taken the weights a second time") from again

    async def _examine(self) -> None:
        """Raise UserError for a server that was started without what is needed."""
        for server in self.servers:
            found = await examine(server)
            if found.lacks:
                raise UserError(
                    f"vLLM at {server.url} lacks {', '.join(found.lacks)}; start it with that (perl-rl serve RECIPE --print "
                    "writes the whole command)"
                )
            if not found.tested:
                logger.warning("vLLM at %s: %s", server.url, found.said[0])

    async def _prove(self) -> None:
        """Raise RunFailed unless all servers answer the probe as the trainer would."""
        for number in range(len(self.servers)):
            found = await self._ask_at(number, self.probe.prompt, PARAMS)
            if found is None:
                raise RunFailed(
                    f"vLLM at {self.servers[number].url} answers under other weights than it was given"
                )
            apart = self.probe.apart(found)
            if not apart <= self.probe.tolerance:
                raise RunFailed(
                    f"vLLM at {self.servers[number].url} gives the tokens of a question over pictures other log-probs than the "
                    f"trainer, {apart:.2g} apart in the mean where {self.probe.tolerance:g} are allowed (rollout.tolerance): it has "
                    "other weights, pictures, flags or another dtype; nothing was sampled with them (docs/rollouts.md)"
                )

    async def _each(self, path: str, **query: str) -> None:
        await asyncio.gather(*(server.post(path, None, **query) for server in self.servers))

    def _on_main(self, work: Any, elsewhere: Callable[[], None] = lambda: None) -> None:
        """What one process does for all, which go on or fail together."""
        with self.processes.jointly():
            if self.processes.index:
                work.close()
                elsewhere()
                return
            try:
                self._loop.run(work)
            except ServerError as error:
                raise RunFailed(
                    f"{error}; its weights are not to be trusted, so start it again before you go on (docs/rollouts.md)"
                ) from error
