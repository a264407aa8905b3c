"""The same prompts continued by transformers' `generate`, and by PeRL's engine, from equal weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.harness.models import special_tokens
from perl.model.families import family_of
from perl.model.packed.attention import choose, use_packed_attention
from perl.model.policy import Policy
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.types import EncodedPrompt


class Side(Protocol):
    """`n` completions of each prompt, at temperature 1, of at most `tokens` tokens; tokens in `ends` end one."""

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        tokens: int,
        seed: int,
        ends: Sequence[int] = (),
        logprobs: bool = False,
    ) -> list[list[Completion]]: ...


class Stock:
    """transformers' own, with what its options offer; prompts are padded on the left.

    Without `logprobs` those of the completions are zeros: keeping the scores of every step would be work that it need
    not do.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        tokens: int,
        seed: int,
        ends: Sequence[int] = (),
        logprobs: bool = False,
    ) -> list[list[Completion]]:
        torch.manual_seed(seed)
        inputs = stock_inputs(self.model, prompts)
        found = self.model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=tokens,
            suppress_tokens=special_tokens(self.model.config),
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=logprobs,
        )
        ids = found.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        scored = torch.zeros(ids.shape)
        if logprobs:
            columns = [
                scores.float().log_softmax(-1).gather(1, ids[:, k, None].to(scores.device))
                for k, scores in enumerate(found.scores)
            ]
            scored = torch.cat(columns, dim=1).cpu()
        ended = torch.isin(ids, torch.tensor(list(ends), dtype=ids.dtype))
        lengths = [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in ended]
        rows = [
            Completion(i[:length].numpy(), p[:length].numpy(), length < tokens)
            for i, p, length in zip(ids, scored, lengths, strict=True)
        ]
        return [rows[k * n : (k + 1) * n] for k in range(len(prompts))]


class Ours:
    """The engine, on a policy as `perl.model.loading.load_policy` makes one.

    Args:
        looks: its `steps_between_looks`; 0: what it takes by itself.
    """

    def __init__(self, model: Any, looks: int = 0) -> None:
        self.looks = looks
        family = family_of(model.config.model_type)
        assert family is not None
        half = model.dtype == torch.bfloat16
        attention, _ = choose("auto", model.device, half)
        tower = family.tower(model.model) if family.packed_tower else ()
        use_packed_attention(model.model.language_model, tower, attention)
        self.policy = Policy(model, family)

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        tokens: int,
        seed: int,
        ends: Sequence[int] = (),
        logprobs: bool = False,
    ) -> list[list[Completion]]:
        self.policy.base.generation_config.eos_token_id = list(ends) or None
        longest = max(len(p.input_ids) for p in prompts)
        budget = len(prompts) * (longest + n * tokens)
        processor: Any = _Tokens(self.policy.base.config)
        engine = InProcessEngine(self.policy, processor, budget)
        engine.steps_between_looks = self.looks or engine.steps_between_looks
        return engine.generate(prompts, SamplingParams(n, 1.0, tokens), seed)


class _Tokens:
    """What the engine asks of a processor, for a model of random weights, which has none."""

    pad_token_id = 0
    eos_token_id = -1

    def __init__(self, config: Any) -> None:
        self.config = config

    def unsampled_token_ids(self) -> torch.Tensor:
        return torch.tensor(special_tokens(self.config))


def stock_inputs(model: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """What transformers' Qwen-VL takes for prompts, and for what stands behind them."""
    longest = max(len(p.input_ids) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask[row, longest - len(prompt.input_ids) :] = 1
    images = [image for p in prompts for image in p.images]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).int() * mask.int(),
    }
    if images:
        inputs["pixel_values"] = torch.cat([i.pixel_values for i in images]).to(model.dtype)
        inputs["image_grid_thw"] = torch.tensor([i.grid for i in images])
    return {name: x.to(model.device) for name, x in inputs.items()}


@torch.no_grad()
def exact_logprobs(model: Any, prompt: EncodedPrompt, completion: np.ndarray) -> torch.Tensor:
    """float64 [L]: the sequence alone through transformers' model in fp64, without a cache."""
    model.model.rope_deltas = None
    ids = np.concatenate([prompt.input_ids, completion])
    whole = EncodedPrompt(ids, prompt.position_ids, 0, prompt.images, prompt.image_token_id)
    kept = len(completion) + 1
    logits = model(**stock_inputs(model, [whole]), use_cache=False, logits_to_keep=kept).logits
    logits = logits[0, :-1]
    logits[:, special_tokens(model.config)] = -torch.inf
    targets = torch.from_numpy(completion).to(logits.device)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).cpu()
