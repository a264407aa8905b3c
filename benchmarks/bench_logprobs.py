"""Log-probs of sampled tokens without gradients, as of the policy that sampled them, from hidden states or logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from benchmarks.conftest import TakeTurn, turns
from benchmarks.contest import Contest, Provider
from benchmarks.head_problem import LogitsLogprobsProblem, LogprobsProblem, make_problem
from benchmarks.heads import MODELS, Head, head
from benchmarks.providers import LOGITS_LOGPROBS, LOGPROBS, soon_ready


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Every model's head, the first with everybody."""
    models = ("Qwen2.5-VL-3B", *([] if quick else MODELS))
    if cuda:
        sizes = [head(model, 8192, 2) for model in dict.fromkeys(models)]
    else:
        sizes = [
            head(model, 256 if quick else 512, 4, fraction=8) for model in dict.fromkeys(models)
        ]
    return [
        _linear(sizes[0], LOGPROBS),
        _logits(sizes[0], LOGITS_LOGPROBS),
        *[_linear(size, soon_ready(LOGPROBS)) for size in sizes[1:]],
    ]


def _linear(size: Head, providers: Sequence[Provider]) -> Contest:
    return Contest(
        "Log-probs of hidden states, forward",
        size.case,
        size.asdict(),
        partial(make_problem, LogprobsProblem, size),
        providers,
        size.logprobs(),
    )


def _logits(size: Head, providers: Sequence[Provider]) -> Contest:
    return Contest(
        "Log-probs of logits, forward",
        size.case,
        size.asdict(),
        partial(make_problem, LogitsLogprobsProblem, size),
        providers,
        size.logits_logprobs(),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    turns(metafunc, contests)


def test_logprobs(race: TakeTurn) -> None:
    race()
