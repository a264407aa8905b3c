"""PolicyLoss: presets, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest

from perl_kernels import PolicyLoss
from tests.messages import refused

PRESETS = [
    *("perl", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "luspo"),
    *("cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"),
]
NAN = math.nan
AT_LEAST_0 = ("clip_low", "clip_high", "correction_low", "vespo_k_pos", "vespo_k_neg")
ABOVE_0 = (
    *("sapo_tau_pos", "sapo_tau_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    *("dppo_ratio_cap", "correction_high"),
)
FINITE = ("kl_coef", "entropy_coef")
PER_SEQUENCE = {"aggregation": "seq-mean-token-mean"}
PPO = {"surrogate": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2}
PPO |= {"entropy_coef": 0.0, "aggregation": "token-mean"}
GSPO = {"clip_low": 3e-4, "clip_high": 4e-4, **PER_SEQUENCE}


def test_presets_exist_and_take_overrides() -> None:
    for name in PRESETS:
        loss = PolicyLoss.preset(name, kl="k2", kl_coef=0.5, aggregation="token-mean")
        assert (loss.kl, loss.kl_coef, loss.aggregation) == ("k2", 0.5, "token-mean")
    with refused("'ppo'", *PRESETS, error=ValueError):
        PolicyLoss.preset("ppo")
    with refused("PolicyLoss", "'clip'", "clip_low", "clip_high", error=TypeError):
        PolicyLoss.preset("grpo", clip=0.1)


def test_frozen_and_hashable() -> None:
    loss = PolicyLoss()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.clip_low = 0.1  # type: ignore[misc]
    assert hash(loss) == hash(PolicyLoss())
    with pytest.raises(TypeError):
        PolicyLoss("clip")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        # what came, what is wanted
        ({"surrogate": "ppo"}, ("'ppo'", "'clip'", "'reinforce'")),
        ({"ratio": None}, (None, "'token'", "'sequence_token'")),
        ({"kl": "k4"}, ("'k4'", "'k3'", None)),
        ({"aggregation": "mean"}, ("'mean'", "'token-mean'")),
        ({"aggregation": None}, (None, "'token-mean'")),
        ({"correction": "clip"}, ("'clip'", "'token_mask'", None)),
        *(({name: -0.1}, (-0.1, 0)) for name in AT_LEAST_0),
        *(({name: NAN}, ("nan", 0)) for name in AT_LEAST_0),
        *(({name: x}, (x, 0)) for name in ABOVE_0 for x in (0.0, NAN)),
        *(({name: x, "kl": "k3"}, (x, "finite")) for name in FINITE for x in (math.inf, NAN)),
        ({"clip_low": 1.5}, (1.5, 1)),
        ({"clip_low": 1.5, "surrogate": "cispo"}, (1.5, 1)),
        ({"dual_clip": 1.0}, (1.0, 1)),
        ({"delta": 1.2}, (1.2, "1 + clip_high")),
        ({"max_completion_length": 0}, (0,)),
        ({"max_completion_length": -1}, (-1, 0)),
        # what goes against it
        ({"correction_low": 3.0}, (3.0, "correction_high", 2.0)),
        ({"delta": 4.0, "surrogate": "cispo"}, ("'clip'", "'cispo'")),
        ({"dual_clip": 3.0, "surrogate": "sapo"}, ("'clip'", "'sapo'")),
        ({"dual_clip": 3.0, "delta": 4.0}, ("PolicyLoss.delta",)),
        ({"ratio": "sequence", "surrogate": "vespo"}, ("'sequence'", "'vespo'", "'token'")),
        ({"ratio": "sequence_token", "surrogate": "gmpo"}, ("'gmpo'", "'token'")),
        ({"kl_coef": 0.1}, ("PolicyLoss.kl", "kl='k3'")),
        ({"kl_bias_correction": True}, ("PolicyLoss.kl", "kl='k3'")),
    ],
)
def test_refused(fields: dict[str, Any], names: tuple[Any, ...]) -> None:
    where = f"PolicyLoss.{next(iter(fields))}" if "PolicyLoss.kl" not in names else "kl"
    with refused(where, *names, error=ValueError):
        PolicyLoss(**fields)


def test_the_bounds_themselves_are_allowed() -> None:
    tight = dict.fromkeys(AT_LEAST_0, 0.0) | dict.fromkeys(ABOVE_0, 1e-6)
    PolicyLoss(**tight, max_completion_length=1)
    PolicyLoss(clip_low=1.0, delta=1.2 + 1e-6, correction_low=2.0)
    PolicyLoss(surrogate="gmpo", clip_low=1.5, kl="k3", kl_coef=-0.1, entropy_coef=-0.1)


@pytest.mark.parametrize("field", dataclasses.fields(PolicyLoss), ids=lambda field: field.name)
def test_wrong_type_is_refused_by_name(field: dataclasses.Field[Any]) -> None:
    # The axes are strings, and one that is unknown is a ValueError.
    axis = "Literal" in str(get_type_hints(PolicyLoss)[field.name])
    error, came = (ValueError, "'a'") if axis else (TypeError, "str")
    with refused(f"PolicyLoss.{field.name}", came, error=error):
        PolicyLoss(**{field.name: "a"})
    if not axis and field.name != "kl_bias_correction":
        with refused(f"PolicyLoss.{field.name}", "bool", error=TypeError):
            PolicyLoss(**{field.name: True})


@pytest.mark.parametrize("name", PRESETS)
def test_what_operators_take_is_the_objective(name: str) -> None:
    """`axes` and `numbers` hold all of it, and `of` gives it back."""
    plain = PolicyLoss.preset(name)
    assert PolicyLoss.of(plain.axes, plain.numbers) == plain
    every = {"kl": "k1+", "kl_coef": 0.3, "kl_bias_correction": True, "entropy_coef": -0.2}
    every |= {"correction": "token_mask", "correction_low": 0.5, "max_completion_length": 7}
    loss = PolicyLoss.preset(name, **every)
    assert PolicyLoss.of(loss.axes, loss.numbers) == loss != plain


@pytest.mark.parametrize(
    ("name", "fields"),
    {
        "perl": {"dual_clip": 3.0, "kl": "k3", "kl_coef": 0.01} | PPO,
        "grpo": {"aggregation": "seq-mean-token-mean"},
        "bnpo": {},
        "dr_grpo": {"aggregation": "seq-mean-token-sum-norm"},
        "dapo": {"clip_high": 0.28},
        "gspo": {"ratio": "sequence", **GSPO},
        "gspo_token": {"ratio": "sequence_token", **GSPO},
        "luspo": {"ratio": "sequence", **GSPO, "aggregation": "seq-mean-token-sum"},
        "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
        "sapo": {"surrogate": "sapo", "aggregation": "seq-mean-token-mean"},
        "vespo": {"surrogate": "vespo"},
        "gmpo": {"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4} | PER_SEQUENCE,
        "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.15, "clip_high": 0.15},
        "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05},
        "reinforce": {"surrogate": "reinforce"},
    }.items(),
)
def test_presets_are_the_papers(name: str, fields: dict[str, Any]) -> None:
    assert PolicyLoss.preset(name) == PolicyLoss(**fields)
