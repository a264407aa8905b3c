"""Hidden states and LM head to the GRPO loss and its gradients: `linear_grpo_loss` against everybody's way.

The loss is the same for all sizes: clipped ratios, with a KL term at the token level (see `harness/head_problem.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.head_problem import MODELS, Head, HeadProblem, Level, head, head_contest
from benchmarks.providers import LINEAR_LOSS, soon_ready

OP = "Linear GRPO loss, forward and backward"
MAIN = "Qwen2.5-VL-3B"


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """Every model's head with 8192 rows; on a CPU with 1024, or 512, rows and an eighth of the width and vocabulary."""
    sizes = {
        model: head(model, 8192, 2) if cuda else head(model, 512 if quick else 1024, 4, fraction=8)
        for model in MODELS
    }
    main, light = sizes.pop(MAIN), soon_ready(LINEAR_LOSS)
    # Compiling takes a CPU longer than all the rest.
    every = LINEAR_LOSS if cuda else light
    first = [
        _contest(main, LINEAR_LOSS),
        _contest(main, every, frozen=True),
        _contest(main, every, level="sequence"),
    ]
    if quick:
        return first
    whole = [] if cuda else [head("Qwen3-0.6B", 64, 4)]
    return [*first, *(_contest(size, light) for size in (*sizes.values(), *whole))]


def _contest(
    size: Head, providers: Sequence[Provider], level: Level = "token", frozen: bool = False
) -> Contest:
    what = ["sequence-level"] * (level == "sequence") + ["frozen head"] * frozen
    case = ", ".join([size.case, *what])
    return head_contest(OP, HeadProblem, size, providers, case, level=level, frozen=frozen)
