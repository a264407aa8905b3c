"""LM heads by the name of their model, and the least that operations on them cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.contest import Work


@dataclass(frozen=True)
class Head:
    """N rows of H features before a vocabulary of V tokens, `itemsize` bytes an element."""

    model: str
    N: int
    H: int
    V: int
    itemsize: int

    def at(self, **sizes: int) -> Head:
        return replace(self, **sizes)

    @property
    def case(self) -> str:
        return f"{self.model}, N = {self.N}"

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def loss(self, frozen: bool = False) -> Work:
        """Forward and backward: a product of 2NHV for the logits, one for the gradient of the hidden states, one for
        that of the head unless it is frozen. Hidden states and head are read once, gradients written once. The logits
        need not be kept.
        """
        matrices = self.N * self.H + (0 if frozen else self.V * self.H)
        read = self.N * self.H + self.V * self.H
        return Work(
            (4 if frozen else 6) * self.N * self.H * self.V, self.itemsize * (read + matrices)
        )

    def logprobs(self) -> Work:
        """Forward alone."""
        read = self.N * self.H + self.V * self.H
        return Work(2 * self.N * self.H * self.V, self.itemsize * read + 8 * self.N)

    def logits_loss(self) -> Work:
        """Logits in, their gradient out: each is moved once. A row is larger than what a multiprocessor holds, so
        real kernels read twice, unless a cache helps."""
        return Work(0, 2 * self.itemsize * self.N * self.V)

    def logits_logprobs(self) -> Work:
        """Forward alone: the logits are read once."""
        return Work(0, self.itemsize * self.N * self.V + 8 * self.N)


# hidden_size and vocab_size of config.json (text_config where there is one).
_MODELS = {
    "Qwen3-0.6B": (1024, 151_936),
    "Qwen2.5-VL-3B": (2048, 151_936),
    "Qwen2.5-VL-7B": (3584, 152_064),
    "Qwen3-VL-4B": (2560, 151_936),
    "Qwen3-VL-8B": (4096, 151_936),
    "Qwen3.5-4B": (2560, 248_320),
}

MODELS = tuple(_MODELS)


def head(model: str, n: int, itemsize: int, fraction: int = 1) -> Head:
    """The head of a model behind `n` rows; of `1/fraction` of its width and vocabulary, for a CPU."""
    hidden, vocabulary = _MODELS[model]
    name = model if fraction == 1 else f"{model} / {fraction}"
    return Head(name, n, hidden // fraction, vocabulary // fraction, itemsize)
