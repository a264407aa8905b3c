"""Hidden states and LM head to the GRPO loss and its gradients: `linear_grpo_loss` against everybody's way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.conftest import TakeTurn
from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.head_problem import (
    MODELS,
    Head,
    HeadProblem,
    Level,
    head,
    make_problem,
)
from benchmarks.providers import LINEAR_LOSS, soon_ready

OP = "Linear GRPO loss, forward and backward"
MAIN = "Qwen2.5-VL-3B"


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Every model's head with 8192 rows; on a CPU with 512, or 256, rows and an eighth of the width and vocabulary."""
    if cuda:
        models = [head(model, 8192, 2) for model in MODELS]
    else:
        models = [head(model, 256 if quick else 512, 4, fraction=8) for model in MODELS]
    main = next(size for size in models if size.model.startswith(MAIN))
    # Compiling takes a CPU longer than all the rest.
    every = LINEAR_LOSS if cuda else soon_ready(LINEAR_LOSS)
    first = [
        _contest(main, LINEAR_LOSS),
        _contest(main, every, frozen=True),
        _contest(main, every, level="sequence"),
    ]
    if quick:
        return first
    whole = [] if cuda else [_contest(head("Qwen3-0.6B", 64, 4))]
    return [*first, *[_contest(size) for size in models if size != main], *whole]


def _contest(
    size: Head,
    providers: Sequence[Provider] = tuple(soon_ready(LINEAR_LOSS)),
    level: Level = "token",
    frozen: bool = False,
) -> Contest:
    """The loss is the same for all sizes: clipped ratios, with a KL term at the token level (see `harness/head_problem.py`)."""
    what = ["sequence-level"] * (level == "sequence") + ["frozen head"] * frozen
    return Contest(
        OP,
        ", ".join([size.case, *what]),
        {**size.asdict(), "level": level, "frozen": frozen},
        partial(make_problem, HeadProblem, size, level=level, frozen=frozen),
        providers,
        size.loss(frozen),
    )


def test_linear_loss(race: TakeTurn) -> None:
    race()
