"""Decoding with shared prompts, in fp64, beside transformers' model that is fed one sequence alone, without a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from perl.config import ModelConfig
from perl.model.families import family_of
from perl.model.loading import load_processor
from perl.model.packed.attention import use_packed_attention
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import TINY_MODELS, TINY_QWEN
from perl.model.weights import prepared
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.types import EncodedPrompt
from tests.model.steps import segments_of, stock_inputs

N, LONGEST, TEMPERATURE = 3, 10, 0.7
EVERYTHING = 10**6

every = pytest.mark.parametrize("name", TINY_MODELS)


@dataclass
class Case:
    """A policy, transformers' model of equal weights, and prompts: two orders of two images, three images, none, one."""

    policy: Policy
    stock: Any
    processor: Processor
    prompts: list[EncodedPrompt]
    alone: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def generate(
        self,
        params: SamplingParams,
        seed: int = 1,
        budget: int = EVERYTHING,
        looks: int = 1,
        ends: Sequence[int] = (),
    ) -> list[list[Completion]]:
        self.policy.base.generation_config.eos_token_id = list(ends) or None
        engine = InProcessEngine(self.policy, self.processor, budget)
        engine.steps_between_looks = looks
        return engine.generate(self.prompts, params, seed)

    @torch.no_grad()
    def logits(self, prompt: int, completion: np.ndarray) -> torch.Tensor:
        """float64 [L, V]: what each token of a completion was drawn from; the sequence alone."""
        key = (prompt, *completion.tolist())
        if key not in self.alone:
            if hasattr(self.stock.model, "rope_deltas"):
                self.stock.model.rope_deltas = None
            inputs = stock_inputs(self.stock, self.prompts[prompt], completion[:-1])
            kept = len(completion)
            logits = self.stock(**inputs, use_cache=False, logits_to_keep=kept).logits[0]
            self.alone[key] = self.allowed(logits)
        return self.alone[key]

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, self.processor.unsampled_token_ids(), -torch.inf)

    def check(
        self, params: SamplingParams, ends: Sequence[int], out: Sequence[Sequence[Completion]]
    ) -> None:
        """Log-probs, greedy tokens and lengths are those of the sequence alone."""
        stops = {*ends, self.processor.eos_token_id}
        assert [len(completions) for completions in out] == [N] * len(self.prompts)
        for number, completions in enumerate(out):
            for c in completions:
                ids = c.token_ids
                logits = self.logits(number, ids)
                logprobs = (logits / (params.temperature or 1)).log_softmax(-1)
                own = logprobs[range(len(ids)), ids]
                np.testing.assert_allclose(c.logprobs, own.numpy(), rtol=0, atol=1e-6)
                if params.temperature == 0:
                    assert ids.tolist() == logits.argmax(-1).tolist()
                assert not stops & set(ids[:-1].tolist())
                assert c.finished == (ids[-1] in stops)
                assert c.finished or len(ids) == LONGEST


@pytest.fixture
def case(tiny_folder: Callable[[str], Path]) -> Callable[..., Case]:
    """A function from a tiny model's name and settings to a case of two layers with two key heads of four."""

    def make(name: str, rank: int = 0) -> Case:
        config = ModelConfig(max_pixels=28 * 28 * 8, lora_rank=rank)
        folder = tiny_folder(name)
        settings = AutoConfig.from_pretrained(folder)
        text = settings.text_config
        text.num_hidden_layers, text.num_key_value_heads = 2, 2
        text.layer_types = ["full_attention"] * 2
        family = family_of(settings.model_type)
        assert family is not None
        auto: Any = AutoModelForImageTextToText
        stock = auto.from_config(settings, dtype=torch.float32).double().eval()
        # As it is initialised a token's logits hardly depend on what stands before it, and are all alike.
        stock.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(stock.lm_head.weight))
        for parameter in stock.model.language_model.layers.parameters():
            parameter.data *= 6 if parameter.dim() > 1 else 1
        model = copy.deepcopy(stock)
        tower = family.tower(model.model) if family.packed_tower else ()
        use_packed_attention(model.model.language_model, tower, "sdpa")
        policy = Policy(prepared(model, config, family, str(folder)), family)
        if rank:
            for parameter_name, parameter in policy.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1)
            merged: Any = cast(Any, copy.deepcopy(policy.model)).merge_and_unload()
            stock.load_state_dict(merged.state_dict())
        processor = load_processor(str(folder), config)
        prompts = [s.prompt for s in segments_of(processor)]
        return Case(policy, stock, processor, prompts)

    return make


def budgets(prompts: Sequence[EncodedPrompt]) -> tuple[int, int, int]:
    """Of tokens: for all at once, for two slots, which are filled again, and for one with two of a prompt's completions."""
    longest = max(len(p.input_ids) for p in prompts)
    return EVERYTHING, 2 * (longest + N * LONGEST), longest + 2 * LONGEST


def lengths(out: Sequence[Sequence[Completion]]) -> set[int]:
    return {len(c.token_ids) for completions in out for c in completions}


@every
def test_completions_are_those_of_the_sequence_alone(name: str, case) -> None:
    """Several budgets, looks at every step and once at the end, completions that end at other steps than their
    neighbours."""
    made = case(name)
    greedy, sampled = (SamplingParams(N, t, LONGEST) for t in (0.0, TEMPERATURE))
    free = [completions[0].token_ids for completions in made.generate(greedy)]
    ends = [int(ids[min(2 * k, len(ids) - 1)]) for k, ids in enumerate(free)]
    first: list[list[int]] = []
    for budget in budgets(made.prompts):
        for looks in (1, 16):
            out = made.generate(greedy, budget=budget, looks=looks, ends=ends)
            made.check(greedy, ends, out)
            tokens = [c.token_ids.tolist() for completions in out for c in completions]
            assert (first := first or tokens) == tokens and len(lengths(out)) > 1

    ends = list(range(20, len(made.policy.head_weight), 8))
    _, refilled, _ = budgets(made.prompts)
    for seed, budget, looks in ((1, EVERYTHING, 1), (2, refilled, 3)):
        out = made.generate(sampled, seed, budget, looks, ends)
        made.check(sampled, ends, out)
        assert len(lengths(out)) > 3


@pytest.mark.parametrize(
    ("name", "rank"),
    [*((name, 0) for name in TINY_MODELS), (TINY_QWEN[0], 4)],
    ids=[*TINY_MODELS, "LoRA"],
)
def test_every_draw_is_that_of_a_plain_loop(name: str, rank: int, case) -> None:
    """Logits of every step to 1e-12; and in each the first of the clocks that ring at the rates that the sequence alone
    has, those of a generator of the same seed."""
    made, seen = case(name, rank), []
    hook = made.policy.base.lm_head.register_forward_hook(
        lambda m, x, out: seen.append(out.clone())
    )
    seed, ends = 3, list(range(20, len(made.policy.head_weight), 8))
    out = made.generate(SamplingParams(N, TEMPERATURE, LONGEST), seed, looks=LONGEST, ends=ends)
    hook.remove()
    # Longer prompts stand first; the first tokens of a prompt's completions are of the same logits.
    order = sorted(range(len(out)), key=lambda k: (-len(made.prompts[k].input_ids), k))
    rows = [(k, c.token_ids) for k in order for c in out[k]]
    steps = [seen[0].repeat_interleave(N, 0), *seen[1:]]
    assert len(steps) == LONGEST and len(lengths(out)) > 3
    generator = torch.Generator().manual_seed(seed)
    for step, logits in enumerate(steps):
        clocks = torch.empty_like(logits).exponential_(generator=generator)
        for row, (number, ids) in enumerate(rows):
            if step < len(ids):
                alone = made.logits(number, ids)[step]
                torch.testing.assert_close(made.allowed(logits[row]), alone, rtol=0, atol=1e-12)
                rates = (alone / TEMPERATURE).softmax(-1)
                assert (rates / clocks[row]).argmax() == ids[step]
