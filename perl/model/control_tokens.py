"""Tokens that write a model's chat format, such as `<|im_end|>`: a text from elsewhere must not hold them, or it could end
its own turn and write the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from perl.types import IMAGE_SLOT


class ControlTokens:
    """The control tokens of one model, found in texts and made plain text there.

    `<image>` stays what it is, a slot. One character alone is no control token, as some tokenizers pad with `!`.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(t for t in tokens if len(t) > 1)
        # Some tokenizers have thousands; all begin with one of few characters.
        self._first = re.compile("|".join(map(re.escape, sorted({t[0] for t in self._tokens}))))
        self._lengths = sorted({len(t) for t in self._tokens}, reverse=True)

    @classmethod
    def of(cls, tokenizer: Any, *more: str) -> ControlTokens:
        """The special tokens of a tokenizer, and `more`. What else it has added, as `<think>`, is text."""
        added = tokenizer.added_tokens_decoder.values()
        return cls({*(t.content for t in added if t.special), *tokenizer.all_special_tokens, *more})

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tokens))

    def found_in(self, text: str) -> str:
        """The first that a text holds outside of slots; empty if none."""
        return next((found for part in text.split(IMAGE_SLOT) if (found := self._in(part))), "")

    def escaped(self, text: str) -> str:
        """The text with a space behind the first character of each: `< |im_end|>`."""
        return IMAGE_SLOT.join(map(self._escaped, text.split(IMAGE_SLOT)))

    def _escaped(self, part: str) -> str:
        while found := self._in(part):
            part = part.replace(found, f"{found[0]} {found[1:]}")
        return part

    def _in(self, part: str) -> str:
        for match in self._first.finditer(part):
            for length in self._lengths:
                if (token := part[match.start() : match.start() + length]) in self._tokens:
                    return token
        return ""
