"""What surrounds a component, without a model: an engine that answers from a table and records what it is asked, a
processor whose tokens are words, examples in a row, processes that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from perl.data.dataset import Stored
from perl.data.readahead import Read
from perl.data.streams import Drawn
from perl.distributed import Processes
from perl.rollout.engine import Completion, SamplingParams
from perl.types import EncodedPrompt, Example, Message, UserError, Variant


def example(id: str, *greys: int, **fields: Any) -> Example:
    """Which of its pictures, of one pixel each, is the darkest: the answer is its letter and follows it."""
    question = " ".join(f"{letter} <image>" for letter in "ABCDEFGH"[: len(greys)])
    pictures = tuple(Image.new("L", (1, 1), grey) for grey in greys)
    answer = "ABCDEFGH"[greys.index(min(greys))]
    values = {"images": pictures, "question": f"{question} Which is darkest?", "answer": answer}
    return Example(id, **{**values, **fields})


def greys(variant: Variant) -> list[int]:
    """What the slots of a variant of such an example show."""
    return [image.getpixel((0, 0)) for image in variant.images]


def darkest(variant: Variant) -> str:
    """The right letter, read off the pictures."""
    return "ABCDEFGH"[greys(variant).index(min(greys(variant)))]


@dataclass(frozen=True, slots=True)
class WordPrompt(EncodedPrompt):
    variant: Variant | None = None


class Words:
    """A processor whose tokens are words; an image slot is one of them."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def tokens(self, text: str) -> np.ndarray:
        return np.array([self._ids.setdefault(w, len(self._ids)) for w in text.split(" ")])

    def encode(self, variant: Variant) -> WordPrompt:
        ids = self.tokens(" ".join(message.content for message in variant.messages))
        return WordPrompt(ids, np.arange(len(ids))[None], len(ids), (), -1, variant=variant)

    def render(self, messages: Sequence[Message], where: str = "") -> str:
        return "".join(f"[{message.role}] {message.content}" for message in messages)

    def unknown_words(self, messages: Sequence[Message]) -> list[str]:
        return []

    def decode(self, token_ids: np.ndarray) -> str:
        words = list(self._ids)
        return " ".join(words[i] for i in token_ids)


@dataclass(frozen=True)
class Asked:
    """One completion that the engine is to give: its number among those of its prompt, and the draws of its call."""

    variant: Variant
    number: int
    params: SamplingParams
    draw: np.random.Generator


@dataclass(frozen=True)
class Call:
    """One `generate` of the engine."""

    variants: tuple[Variant, ...]
    params: SamplingParams
    seed: int


class TableEngine:
    """Answers as told, cut at the longest completion; `calls` has what it was asked. A word's log-prob is -1."""

    def __init__(self, answer: Callable[[Asked], str]) -> None:
        self.answer, self.processor = answer, Words()
        self.calls: list[Call] = []

    def serving(self, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def counts(self) -> dict[str, float]:
        return {}

    def begin(self, prompts: Any, params: SamplingParams, seed: int) -> Any:
        yield from enumerate(self.generate(prompts, params, seed))

    def generate(
        self, prompts: Sequence[WordPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        self.calls.append(Call(tuple(prompt.variant for prompt in prompts), params, seed))
        draw = np.random.default_rng(seed)
        return [
            [self._completion(Asked(p.variant, k, params, draw)) for k in range(params.n)]
            for p in prompts
        ]

    def _completion(self, asked: Asked) -> Completion:
        ids = self.processor.tokens(self.answer(asked))
        longest = asked.params.max_new_tokens
        logprobs = np.full(len(ids), -1, np.float32)
        return Completion(ids[:longest], logprobs[:longest], len(ids) <= longest)


class InARow:
    """A source of examples that come one after the other, each process taking its share of them."""

    def __init__(self, examples: Sequence[Example], processes: int = 1) -> None:
        self.examples, self.processes, self.next = examples, processes, 0

    def draw(self, count: int) -> list[Drawn]:
        start, self.next = self.next, self.next + count // self.processes
        return [Drawn((i,), 0, self.examples[i]) for i in range(start, self.next)]

    def draw_one(self, wanted: bool = True) -> Drawn | None:
        (drawn,) = self.draw(self.processes)
        return drawn if wanted else None

    def find(self, key: Sequence[int]) -> Example:
        return self.examples[key[0]]


class HereWorker:
    """What reads ahead, in this process. `opened` has the rows that were read, each of 1,000 bytes."""

    opened: ClassVar[list[str]] = []
    ended = False

    def __init__(self, encode: Any) -> None: ...

    def read(self, stored: Stored, pin: bool) -> Read | None:
        self.opened.append(stored.where.rpartition(" ")[2])
        try:
            return Read(stored.open(), 1000)
        except UserError:
            return None

    def kill(self, error: Any = None) -> str:
        return ""


def processes(count: int = 1, index: int = 0) -> Processes:
    """One process of several that all find the same."""

    def reduce(values: Any, reduction: str) -> Any:
        return values * count

    return Processes(
        SimpleNamespace(num_processes=count, process_index=index, device="cpu", reduce=reduce)
    )
