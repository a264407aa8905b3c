"""PolicyLoss: presets, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest

from perl_kernels import PolicyLoss

PRESETS = [
    *("perl", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "luspo"),
    *("cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"),
]


def test_perl_preset_is_the_released_recipe() -> None:
    wanted = PolicyLoss(
        surrogate="clip",
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        kl="k3",
        kl_coef=0.01,
        entropy_coef=0.0,
        aggregation="token-mean",
    )
    assert PolicyLoss.preset("perl") == wanted


def test_presets_exist_and_take_overrides() -> None:
    for name in PRESETS:
        loss = PolicyLoss.preset(name, kl="k2", kl_coef=0.5, aggregation="token-mean")
        assert (loss.kl, loss.kl_coef, loss.aggregation) == ("k2", 0.5, "token-mean")
    with pytest.raises(ValueError, match="no preset named 'ppo'; there are: bnpo, cispo, dapo"):
        PolicyLoss.preset("ppo")
    with pytest.raises(TypeError, match="PolicyLoss has no field 'clip'"):
        PolicyLoss.preset("grpo", clip=0.1)


def test_frozen_and_hashable() -> None:
    loss = PolicyLoss()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.clip_low = 0.1  # type: ignore[misc]
    assert hash(loss) == hash(PolicyLoss())
    with pytest.raises(TypeError):
        PolicyLoss("clip")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"surrogate": "ppo"}, "surrogate is 'ppo', must be one of 'clip', 'cispo'"),
        ({"ratio": None}, "ratio is None, must be one of 'token'"),
        ({"kl": "k4"}, "kl is 'k4', must be one of .* or None"),
        ({"aggregation": "mean"}, "aggregation is 'mean', must be one of 'token-mean'"),
        ({"correction": "clip"}, "correction is 'clip', must be one of"),
        ({"clip_low": -0.1}, "clip_low is -0.1, must be at least 0"),
        ({"clip_high": float("nan")}, "clip_high is nan, must be at least 0"),
        ({"clip_low": 1.5}, "clip_low is 1.5, must be at most 1"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0, must be above 1"),
        ({"delta": 1.1}, r"delta is 1.1, must be above 1 \+ clip_high"),
        ({"sapo_tau_pos": 0.0}, "sapo_tau_pos is 0.0, must be above 0"),
        ({"kl": "k3", "kl_coef": float("inf")}, "kl_coef is inf, must be finite"),
        ({"max_completion_length": 0}, "max_completion_length is 0, must be above 0"),
        ({"correction_low": 3.0}, "correction_low is 3.0, must not be above correction_high, 2.0"),
        ({"surrogate": "cispo", "delta": 4.0}, "delta bounds the 'clip' surrogate .* in 'cispo'"),
        ({"surrogate": "sapo", "dual_clip": 3.0}, "dual_clip bounds the 'clip' surrogate"),
        ({"dual_clip": 3.0, "delta": 4.0}, "dual_clip and PolicyLoss.delta"),
        ({"surrogate": "vespo", "ratio": "sequence"}, "ratio is 'sequence', but .* 'vespo'"),
        ({"surrogate": "gmpo", "ratio": "sequence_token"}, "'gmpo' defines its own ratio"),
        ({"kl_coef": 0.1}, "kl is None, but kl_coef"),
        ({"kl_bias_correction": True}, "kl is None, but kl_coef or kl_bias_correction is set"),
    ],
)
def test_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PolicyLoss(**fields)


@pytest.mark.parametrize("field", dataclasses.fields(PolicyLoss), ids=lambda field: field.name)
def test_wrong_type_is_refused_by_name(field: dataclasses.Field[Any]) -> None:
    # The axes are strings, and one that is unknown is a ValueError.
    error = ValueError if "Literal" in str(get_type_hints(PolicyLoss)[field.name]) else TypeError
    with pytest.raises(error, match=rf"PolicyLoss\.{field.name} is .*'?a'?.*, must be"):
        PolicyLoss(**{field.name: "a"})
