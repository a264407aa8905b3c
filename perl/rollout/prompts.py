"""Prompts of variants, within the token budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from perl.config import Config
from perl.model.processor import Processor
from perl.rollout.instruction import Instruction
from perl.types import EncodedPrompt, UserError, Variant

Shown = tuple[Variant, EncodedPrompt]
"""A variant with its prompt."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """Most tokens of a prompt, the setting that says so, and what to do about a longer one."""

    tokens: int
    name: str
    advice: str = 'raise it, lower model.max_pixels, or set data.overlong = "drop"'

    @classmethod
    def to_generate(cls, config: Config) -> PromptLimit:
        """`data.max_prompt_tokens`, or what the cache leaves beside the longest completion if it is less."""
        return cls._least(config, _cache(config))

    @classmethod
    def to_train(cls, config: Config) -> PromptLimit:
        """That, or what a micro-batch leaves beside the longest completion if it is less."""
        row = {"train.tokens_per_micro_batch": config.train.tokens_per_micro_batch}
        return cls._least(config, _cache(config) | row)

    @classmethod
    def _least(cls, config: Config, budgets: Mapping[str, int]) -> PromptLimit:
        completion, wanted = config.rollout.max_new_tokens, config.data.max_prompt_tokens
        key = min(budgets, key=lambda key: budgets[key], default="")
        if not key:
            return cls(wanted, f"data.max_prompt_tokens = {wanted}")
        left = budgets[key] - completion
        if left >= wanted:
            return cls(wanted, f"data.max_prompt_tokens = {wanted}")
        name = f"the {left} that {key} = {budgets[key]} leaves beside rollout.max_new_tokens = {completion}"
        return cls(left, name)


def _cache(config: Config) -> dict[str, int]:
    """The budget of the engine in process; servers have their own."""
    rollout = config.rollout
    own = rollout.engine == "inprocess"
    return {"rollout.kv_cache_tokens": rollout.kv_cache_tokens} if own else {}


class PromptEncoder:
    """Tokens of variants with their instruction, within the prompt budget."""

    def __init__(
        self,
        processor: Processor,
        limit: PromptLimit,
        overlong: str,
        instruction: Instruction | None = None,
        control_tokens: str = "error",
    ) -> None:
        self.escapes = control_tokens == "escape"
        self.processor, self.limit, self.overlong = processor, limit, overlong
        self.instruction = (instruction or Instruction()).fitted(processor)
        self.dropped = 0

    def ask(self, variant: Variant) -> Variant:
        """The variant as it is asked. The instruction comes after the permutation, whose rules neither read nor rewrite it,
        and control tokens are escaped in all of it, if they are to be."""
        plain = replace(variant, asked=None)
        asked = self.instruction.add(plain.messages)
        asked = tuple(replace(m, content=self.plain(m.content)) for m in asked)
        return variant if asked == variant.messages else replace(plain, asked=asked)

    def plain(self, text: str) -> str:
        """A text of the data as the model is to read it."""
        return self.processor.control_tokens.escaped(text) if self.escapes else text

    def encode(self, variants: Sequence[Variant]) -> list[Shown]:
        """One example's variants, as they are asked, with their prompts; none if one is over the budget and they are to
        be dropped.

        Raises:
            UserError: over the budget and `overlong` is "error".
        """
        variants = [self.ask(v) for v in variants]
        prompts = [self.processor.encode(v) for v in variants]
        longest = max(len(p.input_ids) for p in prompts)
        if longest <= self.limit.tokens:
            return list(zip(variants, prompts, strict=True))
        if self.overlong == "error":
            raise UserError(
                f"example {variants[0].example.id}: its prompt has {longest} tokens, over {self.limit.name}; "
                f"{self.limit.advice}"
            )
        if not self.dropped:
            logger.warning(
                "example %s is left out: its prompt has %d tokens, over %s (said once)",
                variants[0].example.id,
                longest,
                self.limit.name,
            )
        self.dropped += 1
        return []
