"""Log-probs of sampled tokens without gradients, as of the policy that sampled them, from hidden states or logits."""

from __future__ import annotations

from benchmarks.harness.contest import Contest
from benchmarks.harness.head_problem import (
    MODELS,
    LogitsLogprobsProblem,
    LogprobsProblem,
    head,
    head_contest,
    logits_head,
)
from benchmarks.providers import LOGITS_LOGPROBS, LOGPROBS, soon_ready

HIDDEN, LOGITS = (f"Log-probs of {inputs}, forward" for inputs in ("hidden states", "logits"))


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Every model's head, the first with everybody."""
    main, *others = (
        head(model, 8192, 2) if cuda else head(model, 512 if quick else 1024, 4, fraction=8)
        for model in dict.fromkeys(["Qwen2.5-VL-3B", *([] if quick else MODELS)])
    )
    light = soon_ready(LOGPROBS)
    logits = main if cuda else logits_head("Qwen2.5-VL-3B", 256, 4)
    return [
        head_contest(HIDDEN, LogprobsProblem, main, LOGPROBS),
        head_contest(LOGITS, LogitsLogprobsProblem, logits, LOGITS_LOGPROBS),
        *(head_contest(HIDDEN, LogprobsProblem, size, light) for size in others),
    ]
