"""Log-probs of sampled tokens without gradients, as of the policy that sampled them, from hidden states or logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.conftest import TakeTurn
from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.head_problem import (
    MODELS,
    Head,
    HeadProblem,
    LogitsLogprobsProblem,
    LogprobsProblem,
    head,
    make_problem,
)
from benchmarks.providers import LOGITS_LOGPROBS, LOGPROBS, soon_ready


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Every model's head, the first with everybody."""
    models = dict.fromkeys(["Qwen2.5-VL-3B", *([] if quick else MODELS)])
    if cuda:
        sizes = [head(model, 8192, 2) for model in models]
    else:
        sizes = [head(model, 256 if quick else 512, 4, fraction=8) for model in models]

    def contest(
        inputs: str, problem: type[HeadProblem], size: Head, providers: Sequence[Provider]
    ) -> Contest:
        work = size.logprobs() if problem is LogprobsProblem else size.logits_logprobs()
        return Contest(
            f"Log-probs of {inputs}, forward",
            size.case,
            size.asdict(),
            partial(make_problem, problem, size),
            providers,
            work,
        )

    return [
        contest("hidden states", LogprobsProblem, sizes[0], LOGPROBS),
        contest("logits", LogitsLogprobsProblem, sizes[0], LOGITS_LOGPROBS),
        *(contest("hidden states", LogprobsProblem, s, soon_ready(LOGPROBS)) for s in sizes[1:]),
    ]


def test_logprobs(race: TakeTurn) -> None:
    race()
