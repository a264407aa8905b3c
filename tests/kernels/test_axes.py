"""The compiled backends along every axis of an objective and of its inputs; Triton is interpreted where
there is no GPU. `test_losses.py` has the formulas in fp32, `test_fuzz.py` the combinations."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any, get_args

import pytest
import torch

from perl_kernels import PolicyLoss
from perl_kernels.objective import KL, Aggregation, Correction, Ratio
from tests.kernels.call import BACKENDS
from tests.kernels.test_fuzz import DTYPES, Case, NearThreshold, check
from tests.kernels.test_losses import preset
from tests.kernels.test_objective import PRESETS


def check_case(loss: PolicyLoss, entry: str = "policy_loss", **fields: Any) -> None:
    """One case on each backend, of the first seed for which no token is next to a threshold."""
    given: dict[str, Any] = {"lengths": (3, 1, 0, 4), "vocab": 11, "weights": "zeros", **fields}
    for backend in BACKENDS:
        if backend == "torch" or given.get("dtype", torch.float32) not in DTYPES[backend]:
            continue
        for seed in count():
            try:
                check(Case(backend=backend, entry=entry, loss=loss, seed=seed, **given))
                break
            except NearThreshold:
                assert seed < 50


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str, old: bool) -> None:
    """In half precision; `test_losses.py` has fp32."""
    entry, dtype = ("linear_grpo_loss", torch.bfloat16) if old else ("grpo_loss", torch.float16)
    check_case(preset(name), entry, old=old, dtype=dtype)


@pytest.mark.parametrize(
    ("old", "advantages"), [(True, "token"), (True, "grouped"), (False, "completion")]
)
@pytest.mark.parametrize("ratio", get_args(Ratio))
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_ratio(surrogate: Any, ratio: Any, old: bool, advantages: str) -> None:
    check_case(PolicyLoss(surrogate=surrogate, ratio=ratio), old=old, advantages=advantages)


@pytest.mark.parametrize("kl", get_args(KL))
def test_kl(kl: Any) -> None:
    """In a row of logits and of a completion; times the ratio, or alone."""
    loss = PolicyLoss(kl=kl, kl_coef=0.3, entropy_coef=0.1)
    corrected = replace(loss, kl_bias_correction=True)
    check_case(corrected, "grpo_loss")
    check_case(replace(loss, ratio="sequence"), upstream=-2.0)
    if kl in ("k1+", "k3"):
        check_case(corrected)
        check_case(replace(corrected, ratio="sequence"))
        check_case(replace(corrected, surrogate="gmpo"))


@pytest.mark.parametrize(
    ("name", "old"), [("perl", True), ("gspo", True), ("vespo", True), ("gmpo", False)]
)
@pytest.mark.parametrize("correction", get_args(Correction))
def test_correction(correction: Any, name: str, old: bool) -> None:
    loss = preset(name, correction=correction, correction_low=0.8, correction_high=1.3)
    check_case(loss, old=old)


@pytest.mark.parametrize(
    ("normalizer", "weights"),
    [("none", "zeros"), ("float", "none"), ("tensor", "zeros")],
)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_aggregation(aggregation: Any, normalizer: str, weights: str) -> None:
    loss = PolicyLoss(aggregation=aggregation, max_completion_length=9)
    check_case(loss, normalizer=normalizer, weights=weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab": 8229, "lengths": (2, 1), "dtype": torch.bfloat16},
        {"layout": "rows", "options": (("inplace", True),)},
        {"layout": "rows"},
        {"layout": "columns"},
        {"layout": "expanded"},
    ],
    ids=["two-blocks", "rows-apart-inplace", "rows-apart", "transposed", "one-row"],
)
def test_logits(fields: dict[str, Any]) -> None:
    check_case(PolicyLoss(entropy_coef=0.1), "grpo_loss", **fields)


def test_long_completion() -> None:
    loss = preset("gspo", aggregation="seq-mean-token-sum")
    check_case(loss, lengths=(2, 100_000, 1))
