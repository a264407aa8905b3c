"""What samples completions; and sampling from the policy's own weights, in this process.

Each distinct image is encoded once, and each prompt is read once however many completions continue it: its keys and
values are kept once, and read once a step for all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from perl.model.layers import uncompiled
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.sharding import gathered
from perl.rollout.decoding.cache import slots_and_rows
from perl.rollout.decoding.sampling import SamplingParams, sample
from perl.rollout.decoding.slots import Job, Slots
from perl.timing import span
from perl.types import EncodedPrompt, WeightSpan


@dataclass(frozen=True, slots=True)
class Completion:
    """`token_ids` int64 [L], with the end token or the stop text when `finished`; `logprobs` float32 [L] of the policy at
    the sampling temperature, whatever top-p and top-k leave out."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: bool
    weight_versions: tuple[WeightSpan, ...] = ()


Ended = Generator[tuple[int, list[Completion]], None, None]
"""The number of each prompt and its completions, as they end. Closed, it gives up what has not."""


class Engine(Protocol):
    """What completes prompts."""

    def serving(self, version: int) -> AbstractContextManager[None]:
        """The policy's present weights, those after `version` steps of the run, answer in the block; all processes enter it
        together."""
        ...

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt, sampled with this seed."""
        ...

    def begin(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int) -> Ended:
        """`generate` in parts. An engine elsewhere is at it while the caller does something else, in process it is when the
        first is asked for."""
        ...

    def counts(self) -> dict[str, float]:
        """What the engine did since the last call, for a step's metrics: numbers that are summed over processes."""
        ...


class InProcessEngine:
    """Generates with the weights that are being trained; nothing has to be synchronised.

    Args:
        policy: the model.
        processor: for the end token, the padding token and the tokens a completion must not hold.
        kv_cache_tokens: most tokens of prompts and completions whose keys and values are kept at once.

    Attributes:
        steps_between_looks: after how many tokens the host asks which completions have ended; until then these go on
            in vain. On a GPU asking is to wait for it.
    """

    def __init__(self, policy: Policy, processor: Processor, kv_cache_tokens: int) -> None:
        self.policy = policy
        self.pad, self.processor = processor.pad_token_id, processor
        # On the host as well: whether a completion has ended is asked without waiting for the device.
        self.end_ids = sorted(
            end_tokens(getattr(policy.base, "generation_config", None), processor)
        )
        self.ends = torch.tensor(self.end_ids, device=policy.device)
        self.banned = processor.unsampled_token_ids()
        self.kv_cache_tokens = kv_cache_tokens
        self.steps_between_looks = 16 if self.ends.is_cuda else 1

    def serving(self, version: int) -> AbstractContextManager[None]:
        """All weights whole in every process."""
        return gathered(self.policy)

    def begin(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int) -> Ended:
        yield from enumerate(self.generate(prompts, params, seed))

    def counts(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt; the same seed gives the same completions.

        Raises:
            UserError: a prompt and one completion may take more tokens than the cache holds.
        """
        if not prompts:
            return []
        training = self.policy.training
        self.policy.eval()
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        try:
            with uncompiled() if self.policy.compiled else nullcontext():
                return self._generate(prompts, params, generator)
        finally:
            self.policy.train(training)

    def _generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, generator: torch.Generator
    ) -> list[list[Completion]]:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        most = params.max_new_tokens
        shape = slots_and_rows(self.kv_cache_tokens, len(prompts), longest, params.n, most)
        waiting = deque(_jobs(prompts, params.n, shape[1]))
        slots = Slots(self.policy, prompts, shape, most)
        banned = torch.zeros(len(self.policy.head_weight), dtype=torch.bool)
        banned = banned.index_fill(0, self.banned.cpu(), True).to(slots.device)
        ended: list[tuple[int, torch.Tensor]] = []
        while waiting or slots.steps_left:
            free = [slot for slot, job in enumerate(slots.jobs) if job is None]
            if free and waiting:
                jobs = [waiting.popleft() for _ in free[: len(waiting)]]
                with span("prefill"):
                    slots.fill(free[: len(jobs)], jobs)
            steps = min(self.steps_between_looks, slots.steps_left)
            for _ in range(steps):
                slots.put(*sample(slots.logits(), banned, params, generator), self.ends)
            if params.stop:
                self._stop(slots, params.stop, steps)
            ended += slots.look()
            if not waiting and slots.steps_left:
                slots.compact()
        return self._completions(ended, len(prompts), params.stop)

    def _stop(self, slots: Slots, stop: Sequence[str], steps: int) -> None:
        """Cut rows right behind the first of their last tokens with which one of the texts is there."""
        # One copy for all, which waits once.
        tokens = slots.record[0].cpu().numpy()
        for slot, (homes, going) in enumerate(zip(slots.homes, slots.going, strict=True)):
            for row in (row for row, goes_on in enumerate(going) if goes_on):
                ids = tokens[homes[row]]
                count = int((ids >= 0).sum())
                for length in range(max(1, count - steps + 1), count + 1):
                    if self._stops(ids[:length], stop):
                        slots.end(slot, row, length)
                        break

    def _completions(
        self, ended: Sequence[tuple[int, torch.Tensor]], prompts: int, stop: Sequence[str]
    ) -> list[list[Completion]]:
        """From the records of jobs and their numbers."""
        out: list[list[Completion]] = [[] for _ in range(prompts)]
        # One copy for all, which waits once.
        records = torch.cat([record for _, record in ended], 1).cpu().numpy()
        numbers = [number for number, record in ended for _ in range(record.shape[1])]
        for number, tokens, bits in zip(numbers, *records, strict=True):
            ids = tokens[tokens >= 0].astype(np.int64)
            logprobs = bits[: len(ids)].view(np.float32)
            out[number].append(Completion(ids, logprobs, self._finished(ids.tolist(), stop)))
        return out

    def _stops(self, tokens: Sequence[int] | np.ndarray, stop: Sequence[str]) -> bool:
        """Whether one of the texts stands in the last tokens."""
        # A token holds a byte of text at least; some more, as a tokenizer may strip what it begins with.
        longest = max(len(text.encode()) for text in stop) + 8
        tail = np.asarray(tokens[-longest:], np.int64)
        return any(text in self.processor.decode(tail) for text in stop)

    def _finished(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        return tokens[-1] in self.end_ids or (bool(stop) and self._stops(tokens, stop))


def _jobs(prompts: Sequence[EncodedPrompt], n: int, rows: int) -> list[Job]:
    """n completions of each prompt, at most `rows` a job; long prompts first, so that those at a time are alike."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].input_ids), i))
    counts = [min(rows, n - start) for start in range(0, n, rows)]
    return [Job(i, prompts[i], count) for i in order for count in counts]


def end_tokens(settings: Any, processor: Processor) -> set[int]:
    """The tokenizer's end token and those of a checkpoint's generation settings; Qwen has two."""
    more = getattr(settings, "eos_token_id", None) or []
    return {processor.eos_token_id, *([more] if isinstance(more, int) else more)}
