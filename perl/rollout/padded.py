"""Sampling from a model that is trained on padded batches, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from perl.model.head import HeadLoss
from perl.model.padded import PaddedPolicy
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.timing import span
from perl.types import EncodedPrompt, Segment

_TOKENS_AT_ONCE = 2**14
"""Most tokens, padding included, of a forward pass that computes log-probs."""


class PaddedEngine(InProcessEngine):
    """Generates with the weights that are being trained; each completion's prompt and images are read anew.

    The log-probs of the samples come from padded forward passes like those of training.
    """

    def _generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, generator: torch.Generator
    ) -> list[list[Completion]]:
        """Prompts of like length together, so that little is padded."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        size = self.kv_cache_tokens // ((longest + params.max_new_tokens) * params.n)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].input_ids), i))
        out: list[list[Completion]] = [[]] * len(prompts)
        for chunk in (order[i : i + max(1, size)] for i in range(0, len(order), max(1, size))):
            found = self._batch([prompts[i] for i in chunk], params, generator)
            for i, completions in zip(chunk, found, strict=True):
                out[i] = completions
        return out

    def _batch(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, generator: torch.Generator
    ) -> list[list[Completion]]:
        """Those with and without images are generated apart."""
        ids: list[tuple[np.ndarray, ...]] = [()] * len(prompts)
        for shows in (False, True):
            chosen = [i for i, p in enumerate(prompts) if bool(p.images) == shows]
            if chosen:
                found = self._sample_ids([prompts[i] for i in chosen], params, generator)
                for place, i in enumerate(chosen):
                    ids[i] = tuple(found[place * params.n : (place + 1) * params.n])
        logprobs = self._logprobs(prompts, ids, params.temperature or 1.0)
        return [
            [
                Completion(own, logprobs[i, r], self._finished(own.tolist(), params.stop))
                for r, own in enumerate(completions)
            ]
            for i, completions in enumerate(ids)
        ]

    def _sample_ids(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, generator: torch.Generator
    ) -> list[np.ndarray]:
        policy = cast(PaddedPolicy, self.policy)
        # num_return_sequences would repeat pictures one by one, which breaks the order of prompts with several.
        inputs = policy.prompt_inputs([p for p in prompts for _ in range(params.n)], "left")
        seed = torch.randint(2**31, (), generator=generator, device=policy.device)
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._settings(params):
            torch.manual_seed(int(seed))
            start = inputs["input_ids"].shape[1]
            stops = [_Stops(self._stops, start, params.stop)] if params.stop else None
            with span("generate"):
                out = policy.base.generate(**inputs, stopping_criteria=stops)
        return [self._cut(row, params.stop) for row in out[:, start:].cpu().numpy()]

    @contextmanager
    def _settings(self, params: SamplingParams) -> Iterator[None]:
        """What is asked for, whatever top-k or penalty the checkpoint comes with."""
        from transformers import GenerationConfig

        base: Any = self.policy.base
        sampling = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        before = base.generation_config
        base.generation_config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad,
            suppress_tokens=self.banned.tolist() or None,
            do_sample=params.temperature > 0,
            **(sampling if params.temperature > 0 else {}),
        )
        try:
            yield
        finally:
            base.generation_config = before

    def _cut(self, ids: np.ndarray, stop: Sequence[str]) -> np.ndarray:
        """int64 [L]: up to the first end token or stop text, which is kept; behind it there is padding."""
        ended = np.isin(ids, self.end_ids)
        length = int(ended.argmax()) + 1 if ended.any() else len(ids)
        if stop:
            length = next(
                (n for n in range(1, length) if self._stops(ids[:n].tolist(), stop)), length
            )
        return ids[:length].astype(np.int64)

    def _logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        completions: Sequence[tuple[np.ndarray, ...]],
        temperature: float,
    ) -> dict[tuple[int, int], np.ndarray]:
        """float32 [L] for each (prompt, completion)."""
        head = HeadLoss(self.policy, self.banned, temperature)
        segments = [
            Segment(p, own, (0.0,) * len(own)) for p, own in zip(prompts, completions, strict=True)
        ]
        out: dict[tuple[int, int], np.ndarray] = {}
        for batch in self.policy.pack(segments, _TOKENS_AT_ONCE, share=False):
            flat = head.logprobs(batch).logprobs.float().cpu()
            parts = flat.split(batch.completion_cu_seqlens.diff().tolist())
            out.update((s, p.numpy()) for s, p in zip(batch.source, parts, strict=True))
        return out


class _Stops:
    """Which sequences have come to a stop text, as transformers' `generate` asks after each token."""

    def __init__(self, stops: Callable[..., bool], start: int, stop: Sequence[str]) -> None:
        self.stops, self.start, self.stop = stops, start, stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        found = [self.stops(row, self.stop) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(found, device=input_ids.device)
