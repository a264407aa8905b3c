"""Keys and values of the prompts and completions that go on at a time, stored once, where they stay."""

from __future__ import annotations

import math

from torch import Tensor

from perl.types import UserError


def slots_and_rows(
    budget: int, prompts: int, longest_prompt: int, n: int, max_new_tokens: int
) -> tuple[int, int]:
    """How many prompts are continued at a time, and by how many completions each.

    The n completions of a prompt are split over several slots, each with the prompt again, only where the budget holds no
    slot with all of them.

    Args:
        budget: most tokens that are kept, `rollout.kv_cache_tokens`.

    Raises:
        UserError: it does not hold a prompt with one completion.
    """
    rows = min(n, (budget - longest_prompt) // max_new_tokens)
    if rows < 1:
        raise UserError(
            f"rollout.kv_cache_tokens = {budget} is less than the {longest_prompt + max_new_tokens} tokens of a prompt "
            f"of {longest_prompt} with rollout.max_new_tokens = {max_new_tokens}; raise it, or lower that or "
            "data.max_prompt_tokens"
        )
    parts = math.ceil(n / rows)
    rows = math.ceil(n / parts)
    return min(prompts * parts, budget // (longest_prompt + rows * max_new_tokens)), rows


class KVCache:
    """S slots, each a prompt of up to P tokens with R completions of up to T, for every layer.

    Per layer `prompts` [2, S, KV, P, d] and `completions` [S, KV, T, 2, R, d], keys before values: a completion's
    token is written with those of the slot's other completions, which all go on in step.
    """

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int, int, int], like: Tensor
    ) -> None:
        """
        Args:
            shape: (S, KV, P, R, T, d).
            like: a tensor of the dtype and device.
        """
        slots, kv_heads, longest, rows, new, head = shape
        self.prompts = [like.new_zeros(2, slots, kv_heads, longest, head) for _ in range(layers)]
        self.completions = [
            like.new_zeros(slots, kv_heads, new, 2, rows, head) for _ in self.prompts
        ]
        self.places: tuple[Tensor, Tensor] | None = None
        """Of each token of the row that is read next: its slot and its number in the prompt, int64 [tokens]."""

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        slots, kv_heads, new, _, rows, head = self.completions[0].shape
        return slots, kv_heads, self.prompts[0].shape[3], rows, new, head

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the keys and values of a packed row of prompts, [1, KV, tokens, d], where `places` says."""
        assert self.places is not None
        slot, place = self.places
        for stored, new in zip(self.prompts[layer], (key, value), strict=True):
            stored[slot, :, place] = new[0].transpose(0, 1).to(stored.dtype)

    def keep(self, slots: Tensor, rows: Tensor) -> None:
        """Let go of all but `slots` int64 [S'] and of those all but `rows` int64 [S', R'].

        One layer after the other, so that hardly more memory is taken than before.
        """
        for layer, (prompts, completions) in enumerate(
            zip(self.prompts, self.completions, strict=True)
        ):
            if len(slots) < prompts.shape[1]:
                self.prompts[layer] = prompts.index_select(1, slots)
                completions = completions.index_select(0, slots)
            if rows.shape[1] < completions.shape[4]:
                index = rows[:, None, None, None, :, None]
                completions = completions.take_along_dim(index, 4)
            self.completions[layer] = completions
