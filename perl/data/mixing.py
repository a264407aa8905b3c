"""Training examples from several sources, each with its share of the draws."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

from perl.data.dataset import Drawn
from perl.types import Example, UserError


class Stream(Protocol):
    """An endless row of examples whose position can be saved."""

    def draw(self, n: int) -> list[Drawn]: ...

    def find(self, key: Sequence[int]) -> Example: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def read_mix(entries: Sequence[str]) -> list[tuple[str, float]]:
    """`data.mix` as sources with weights: `"k12.jsonl*0.5"` is `("k12.jsonl", 0.5)`, without a weight 1.

    Raises:
        UserError: a weight that is no positive number.
    """
    out = []
    for entry in entries:
        source, star, weight = entry.rpartition("*")
        if entry and not star:
            out.append((entry, 1.0))
            continue
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or not 0 < value < math.inf:
            raise UserError(
                f"data.mix: '{entry}' must be SOURCE or SOURCE*WEIGHT with a weight above 0"
            )
        out.append((source, value))
    return out


class MixedStream:
    """Draws from several streams in turn, at random in proportion to their weights.

    Which source the k-th draw comes from depends on `(seed, k)` alone.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int) -> None:
        self.streams, self.weights, self.seed = list(streams), list(weights), seed
        self._drawn = 0

    def draw(self, n: int) -> list[Drawn]:
        """The next `n` examples; `epoch` is that of its source, and `key` begins with the source's number."""
        out = []
        for _ in range(n):
            dice = random.Random(f"{self.seed}/mix/{self._drawn}")
            (source,) = dice.choices(range(len(self.streams)), self.weights)
            (drawn,) = self.streams[source].draw(1)
            out.append(drawn._replace(key=(source, *drawn.key)))
            self._drawn += 1
        return out

    def find(self, key: Sequence[int]) -> Example:
        """The example that was drawn with this key."""
        source, *rest = key
        return self.streams[source].find(rest)

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {
            "drawn": self._drawn,
            "weights": self.weights,
            "streams": [s.state_dict() for s in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if it belongs to other data or seed."""
        if len(state.get("streams", ())) != len(self.streams):
            raise UserError(
                f"the data now come from {len(self.streams)} sources, those of the checkpoint from "
                f"{len(state.get('streams', ())) or 1}; resume with the data it was trained on"
            )
        if state["weights"] != self.weights:
            raise UserError(
                f"data.mix now has the weights {self.weights[1:]}, the checkpoint {state['weights'][1:]}; "
                "resume with those it was trained on, or start a new run"
            )
        self._drawn = int(state["drawn"])
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)
