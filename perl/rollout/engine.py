"""Sampling from the policy's own weights, in this process, with a key-value cache.

Each distinct image is encoded once and each prompt is read once however many completions continue it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from perl.config import RolloutConfig
from perl.model.layers import uncompiled
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.timing import span
from perl.types import EncodedPrompt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 takes the most likely token; see `RolloutConfig` for the rest."""

    n: int
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RolloutConfig, n: int) -> SamplingParams:
        """As rollouts are sampled."""
        longest = config.max_new_tokens
        return cls(n, config.temperature, longest, config.top_p, config.top_k, config.stop)


@dataclass(frozen=True, slots=True)
class Completion:
    """`token_ids` int64 [L], with the end token or the stop text when `finished`; `logprobs` float32 [L] of the policy at
    the sampling temperature, whatever top-p and top-k leave out."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


class InProcessEngine:
    """Generates with the weights that are being trained; nothing has to be synchronised.

    Args:
        policy: the model.
        processor: for the end token, the padding token and the tokens a completion must not hold.
        batch_size: most sequences generated together.
        autocast: a context for the forward passes, as training uses it.
    """

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.policy = policy
        self.pad, self.processor = processor.pad_token_id, processor
        # On the host as well: whether a completion has ended is asked without waiting for the device.
        self.end_ids = sorted(_end_tokens(policy, processor))
        self.ends = torch.tensor(self.end_ids, device=policy.device)
        self.banned = processor.unsampled_token_ids()
        self.batch_size = batch_size
        self.autocast = autocast

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt; the same seed gives the same completions."""
        training = self.policy.training
        self.policy.eval()
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        per_batch = max(1, self.batch_size // params.n)
        out: list[list[Completion]] = [[] for _ in prompts]
        try:
            for chunk in _by_length(prompts, per_batch):
                with self.autocast(), uncompiled() if self.policy.compiled else nullcontext():
                    completions = self._generate([prompts[i] for i in chunk], params, generator)
                for row, completion in enumerate(completions):
                    out[chunk[row // params.n]].append(completion)
        finally:
            self.policy.train(training)
        return out

    def _generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, generator: torch.Generator
    ) -> list[Completion]:
        with span("prefill"):
            state, logits = self._prefill(prompts, params.n)
        rows = len(prompts) * params.n
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]
        alive = torch.arange(rows, device=self.policy.device)
        for step in range(params.max_new_tokens):
            token, logprob = self._sample(logits, params, generator)
            for row, t, p in zip(alive.tolist(), token.tolist(), logprob.tolist(), strict=True):
                tokens[row].append(t)
                logprobs[row].append(p)
            ended = torch.isin(token, self.ends)
            if params.stop:
                stopped = [self._stops(tokens[row], params.stop) for row in alive.tolist()]
                ended |= torch.tensor(stopped, device=ended.device)
            # Rows that have ended leave the cache, so that the longest completions are decoded alone.
            going = (~ended).nonzero().squeeze(1)
            if len(going) == 0 or step + 1 == params.max_new_tokens:
                break
            if len(going) < len(alive):
                alive, token = alive[going], token[going]
                state.keep(going)
            with span("decode"):
                logits = state.decode_step(token)
        return [
            Completion(
                np.asarray(t, np.int64), np.asarray(p, np.float32), self._finished(t, params.stop)
            )
            for t, p in zip(tokens, logprobs, strict=True)
        ]

    def _stops(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one of the texts stands in the last tokens."""
        # A token holds a byte of text at least; some more, as a tokenizer may strip what it begins with.
        longest = max(len(text.encode()) for text in stop) + 8
        tail = np.asarray(tokens[-longest:], np.int64)
        return any(text in self.processor.decode(tail) for text in stop)

    def _finished(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        return tokens[-1] in self.end_ids or (bool(stop) and self._stops(tokens, stop))

    def _sample(
        self, logits: torch.Tensor, params: SamplingParams, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # In fp32 at least: the log-probs are compared with the trainer's, and bf16 has three digits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits.index_fill(1, self.banned.to(logits.device), -torch.inf)
        if params.temperature == 0:
            logprobs = logits.log_softmax(-1)
            token = logprobs.argmax(-1)
        else:
            logprobs = (logits / params.temperature).log_softmax(-1)
            likely = _likeliest(logprobs, params.top_p, params.top_k).exp()
            token = torch.multinomial(likely, 1, generator=generator).squeeze(1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)

    def _prefill(self, prompts: Sequence[EncodedPrompt], n: int) -> tuple[_Decoding, torch.Tensor]:
        """Encode the images, read every prompt once, and repeat what was read n times."""
        from transformers import DynamicCache

        policy, device = self.policy, self.policy.device
        longest = max(len(p.input_ids) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        axes = len(prompts[0].position_ids)
        positions = torch.zeros(axes, len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        visual = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.input_ids)
            ids[row, start:] = torch.from_numpy(prompt.input_ids)
            positions[:, row, start:] = torch.from_numpy(prompt.position_ids)
            mask[row, start:] = True
            visual[row, start:] = torch.from_numpy(prompt.input_ids == prompt.image_token_id)
        features = policy.vision.features([image for p in prompts for image in p.images])
        embeds, extra = policy.embed(ids.to(device), visual.to(device), features)
        cache = DynamicCache(config=policy.core.language_model.config)
        output = policy.core.language_model(
            inputs_embeds=embeds,
            position_ids=policy.position_ids(positions),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        logits = policy.base.lm_head(output.last_hidden_state[:, -1])
        if n > 1:
            cache.batch_repeat_interleave(n)
        following = torch.tensor([p.next_position for p in prompts])
        state = _Decoding(
            policy,
            cache,
            following.expand(axes, -1).repeat_interleave(n, dim=1).to(device),
            mask.repeat_interleave(n, dim=0).to(device),
        )
        return state, logits.repeat_interleave(n, dim=0)


class _Decoding:
    """The cache of the sequences that still go on."""

    def __init__(
        self, policy: Policy, cache: Any, position: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self.policy, self.cache, self.position, self.mask = policy, cache, position, mask

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.position, self.mask = self.position[:, rows], self.mask[rows]

    def decode_step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        output = self.policy.core.language_model(
            input_ids=token[:, None],
            position_ids=self.policy.position_ids(self.position[..., None]),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position = self.position + 1
        return self.policy.base.lm_head(output.last_hidden_state[:, -1])


def _end_tokens(policy: Policy, processor: Processor) -> set[int]:
    """The tokenizer's end token and those of the checkpoint's generation settings; Qwen has two."""
    settings = getattr(policy.base, "generation_config", None)
    more = getattr(settings, "eos_token_id", None) or []
    return {processor.eos_token_id, *([more] if isinstance(more, int) else more)}


def _likeliest(logprobs: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Log-probs [B, V] with -inf for what top-k, and of its rest top-p, leave out, by transformers' own rules."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    none: Any = None  # What came before, which neither looks at.
    if top_k:
        logprobs = TopKLogitsWarper(top_k)(none, logprobs)
    return TopPLogitsWarper(top_p)(none, logprobs) if top_p < 1 else logprobs


def _by_length(prompts: Sequence[EncodedPrompt], size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].input_ids), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
