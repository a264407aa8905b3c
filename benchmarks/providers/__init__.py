"""Who takes part in which contest."""

from collections.abc import Iterable

from benchmarks.contest import Provider
from benchmarks.providers import cut_cross_entropy, liger, ours, pytorch, quack, trl, verl

LINEAR_LOSS = [
    *ours.LINEAR_LOSS,
    *pytorch.LINEAR_LOSS,
    *liger.LINEAR_LOSS,
    *trl.LINEAR_LOSS,
    *verl.LINEAR_LOSS,
    *cut_cross_entropy.LINEAR_LOSS,
    *quack.LINEAR_LOSS,
]
LOGPROBS = [
    *ours.LOGPROBS,
    *pytorch.LOGPROBS,
    *liger.LOGPROBS,
    *trl.LOGPROBS,
    *verl.LOGPROBS,
    *cut_cross_entropy.LOGPROBS,
    *quack.LOGPROBS,
]
LOGITS_LOSS = [
    *ours.LOGITS_LOSS,
    *pytorch.LOGITS_LOSS,
    *liger.LOGITS_LOSS,
    *trl.LOGITS_LOSS,
    *quack.LOGITS_LOSS,
]
LOGITS_LOGPROBS = [
    *ours.LOGITS_LOGPROBS,
    *pytorch.LOGITS_LOGPROBS,
    *liger.LOGITS_LOGPROBS,
    *trl.LOGITS_LOGPROBS,
    *quack.LOGITS_LOGPROBS,
]


def soon_ready(providers: Iterable[Provider]) -> list[Provider]:
    """Without those that compile for every size, which takes many times what they are timed for."""
    return [provider for provider in providers if "compile" not in provider.name]
