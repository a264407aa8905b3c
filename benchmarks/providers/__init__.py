"""Who takes part in which contest: one file a package, which adds its providers to the lists below.

To add one: a function that takes the problem and returns a `Run` under `@takes_part(LINEAR_LOSS, ...)`, or one that gives
log-probs alone under `@gives_logprobs(...)` (`common.py`), in a file that is imported here; the tables have them in this order.
"""

from collections.abc import Iterable

from benchmarks.harness.contest import Provider

from benchmarks.providers import (  # noqa: F401  # isort: skip
    ours,
    pytorch,
    liger,
    trl,
    verl,
    cut_cross_entropy,
    quack,
)
from benchmarks.providers.common import LINEAR_LOSS, LOGITS_LOGPROBS, LOGITS_LOSS, LOGPROBS

__all__ = ["LINEAR_LOSS", "LOGITS_LOGPROBS", "LOGITS_LOSS", "LOGPROBS", "soon_ready"]


def soon_ready(providers: Iterable[Provider]) -> list[Provider]:
    """Without those that compile for every size, which takes many times what they are timed for."""
    return [provider for provider in providers if "compile" not in provider.name]
