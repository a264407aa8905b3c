"""What is optimised: `PolicyLoss`, one frozen value that every loss function of this package takes.

A loss of the GRPO family is a point on a few independent axes (surrogate, ratio, KL, aggregation,
correction), not a name. `PolicyLoss.preset` gives the points that papers and libraries have named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .coefficient import Axes, Numbers

Surrogate = Literal["clip", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"]
Ratio = Literal["token", "sequence", "sequence_token"]
KL = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def check_number(name: str, got: object, wanted: str) -> float:
    """`got`, if it is an int or a float.

    Raises:
        TypeError: it is something else, a bool included; the message says `wanted`.
    """
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{name} is a {type(got).__name__}, must be {wanted}")
    return got


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The objective of a policy update, as axes.

    Notation, per token t of a completion: `lp` log-prob now, `old` at the time of sampling (`lp`
    without gradient if not given), `A` advantage, `r` the importance ratio, `sg` stop-gradient. All
    formulas are losses (to be minimised). Log-ratios are bounded to +-20 before `exp`, as in verl.

    Attributes:
        surrogate: the policy term.
            `clip`: -min(r A, clip(r, 1-clip_low, 1+clip_high) A) (PPO; TRL, verl).
            `cispo`: -sg[clip(r, 1-clip_low, 1+clip_high)] A lp (MiniMax-M1; verl's bounds. TRL's
            `epsilon_high` is the raw bound: clip_high = epsilon_high - 1, clip_low = 1).
            `sapo`: -sigmoid(tau (r-1)) 4/tau A, tau by the sign of A (SAPO paper, TRL).
            `vespo`: -sg[exp(lam + k log w - lam w)] A lp with w the ratio of the whole sequence,
            k and lam by the sign of A (VESPO paper, TRL).
            `gmpo`: -A exp(mean_t of the log-ratio clipped to [-clip_low, clip_high] on the side
            where A would gain) (GMPO paper, verl `geo_mean`); clip bounds are in log space.
            `dppo_tv`, `dppo_kl`: -sg[min(r, dppo_ratio_cap)] A lp where the divergence of the
            two-outcome distribution {y_t, not y_t} between old and new is within clip_low /
            clip_high or shrinking, else 0 (DPPO paper, verl).
            `reinforce`: -A lp.
        ratio: `token`: exp(lp - old). `sequence`: exp of the mean over the unmasked tokens of the
            completion, gradient through the mean (GSPO). `sequence_token`: the value of `sequence`
            with the gradient of the token's own log-prob (GSPO-token). For `clip`, `cispo`, `sapo`.
        clip_low, clip_high: see `surrogate`; `gmpo` reads them in log space, `dppo_*` as a
            divergence.
        dual_clip: for A < 0 the loss is at most -A * dual_clip; above 1 (`clip` only; verl).
        delta: two-sided clipping: r in the unclipped branch is at most delta; above 1 + clip_high
            (`clip` only; INTELLECT-2, TRL).
        sapo_tau_pos, sapo_tau_neg: temperatures of `sapo` for A > 0 and for the rest.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: for A >= 0 and for A < 0.
        dppo_ratio_cap: upper bound of the ratio in `dppo_*`.
        kl: estimator of KL(policy || reference), with d = ref - lp: `k1` -d, `abs` |d|, `k2` d^2/2,
            `k3` exp(d) - d - 1 (Schulman; TRL, verl). `k1+`, `k3+`: the value of the first, the
            gradient of `k2` (verl).
        kl_coef: factor of the KL term in the loss; with 0 the estimate is only a metric.
        kl_bias_correction: multiply the KL term by the importance ratio r, gradient through r
            (DeepSeek-V3.2; TRL `use_bias_correction_kl`).
        entropy_coef: factor of the entropy bonus; the loss gets -entropy_coef * entropy per token.
        aggregation: from tokens to a scalar, with token terms l, token weights w and B sequences:
            `token-mean` sum(w l) / sum(w); `seq-mean-token-mean` mean over sequences of
            sum(w l) / sum(w), sequences without weight left out; `seq-mean-token-sum`
            sum(w l) / B; `seq-mean-token-sum-norm` sum(w l) / (B * max_completion_length).
        max_completion_length: the constant of `seq-mean-token-sum-norm`, needed there.
        correction: importance weight of trainer against rollout engine, exp(old - rollout), on the
            policy term (not on KL or entropy). `token_*` per token, `sequence_*` of the summed
            log-ratio; `*_truncate` clamps it to [correction_low, correction_high], `*_mask` drops
            what lies outside (TRL's four modes; TIS and IcePop). `vespo` takes it into w instead.
        correction_low, correction_high: the bounds.

    Raises:
        TypeError: a number that is none.
        ValueError: a value outside its range, or two axes that exclude each other.
    """

    surrogate: Surrogate = "clip"
    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_ratio_cap: float = 20.0
    kl: KL | None = None
    kl_coef: float = 0.0
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"
    max_completion_length: int | None = None
    correction: Correction | None = None
    correction_low: float = 0.0
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        self._check_names()
        self._check_types()
        self._check_numbers()
        self._check_combinations()

    @property
    def axes(self) -> str:
        """The axes that have names, in the form in which operators take an objective."""
        names = (self.surrogate, self.ratio, self.kl or "", self.aggregation, self.correction or "")
        flags = ("bias" if self.kl_bias_correction else "", "entropy" if self.entropy_coef else "")
        return "|".join([*names, *flags])

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values of `NUMBERS`, 0 for None (which none of those that may be None can be)."""
        return tuple([float(getattr(self, name) or 0.0) for name in NUMBERS])

    @classmethod
    def of(cls, axes: str, numbers: tuple[float, ...]) -> PolicyLoss:
        """The objective with these `axes` and `numbers`."""
        surrogate, ratio, kl, aggregation, correction, bias, _ = axes.split("|")
        values: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
        for name in ("dual_clip", "delta", "max_completion_length"):
            values[name] = values[name] or None
        return cls(
            surrogate=surrogate,  # type: ignore[arg-type]
            ratio=ratio,  # type: ignore[arg-type]
            kl=kl or None,  # type: ignore[arg-type]
            aggregation=aggregation,  # type: ignore[arg-type]
            correction=correction or None,  # type: ignore[arg-type]
            kl_bias_correction=bool(bias),
            **values,
        )

    def _check_names(self) -> None:
        for field, kind, optional in (
            ("surrogate", Surrogate, False),
            ("ratio", Ratio, False),
            ("kl", KL, True),
            ("aggregation", Aggregation, False),
            ("correction", Correction, True),
        ):
            got, known = getattr(self, field), get_args(kind)
            if got not in known and not (optional and got is None):
                listed = ", ".join(repr(name) for name in known) + (" or None" if optional else "")
                raise ValueError(f"PolicyLoss.{field} is {got!r}, must be one of {listed}")

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            got, name = getattr(self, field.name), f"PolicyLoss.{field.name}"
            if field.type == "bool":
                if not isinstance(got, bool):
                    raise TypeError(f"{name} is a {type(got).__name__}, must be a bool")
            elif field.type == "float":
                check_number(name, got, "a number")
            elif field.type in ("float | None", "int | None") and got is not None:
                check_number(name, got, "a number or None")

    def _check_numbers(self) -> None:
        for field in ("clip_low", "clip_high", "correction_low", "vespo_k_pos", "vespo_k_neg"):
            self._require(field, getattr(self, field) >= 0, "at least 0")
        positive = ("sapo_tau_pos", "sapo_tau_neg", "vespo_lambda_pos", "vespo_lambda_neg")
        for field in (*positive, "dppo_ratio_cap", "correction_high"):
            self._require(field, getattr(self, field) > 0, "above 0")
        for field in ("kl_coef", "entropy_coef"):
            # Not math.isfinite, which torch.compile cannot trace for a float that has changed.
            self._require(field, -math.inf < getattr(self, field) < math.inf, "finite")
        if self.surrogate in ("clip", "cispo"):
            self._require("clip_low", self.clip_low <= 1, "at most 1: ratios are positive")
        if self.dual_clip is not None:
            self._require("dual_clip", self.dual_clip > 1, "above 1")
        if self.delta is not None:
            self._require("delta", self.delta > 1 + self.clip_high, "above 1 + clip_high")
        if self.max_completion_length is not None:
            self._require("max_completion_length", self.max_completion_length > 0, "above 0")
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"PolicyLoss.correction_low is {self.correction_low}, must not be above "
                f"correction_high, {self.correction_high}"
            )

    def _check_combinations(self) -> None:
        for field in ("dual_clip", "delta"):
            if getattr(self, field) is not None and self.surrogate != "clip":
                raise ValueError(
                    f"PolicyLoss.{field} bounds the 'clip' surrogate and does nothing in "
                    f"{self.surrogate!r}; leave it out"
                )
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError(
                "PolicyLoss.dual_clip and PolicyLoss.delta bound the same branch; choose one"
            )
        if self.ratio != "token" and self.surrogate not in ("clip", "cispo", "sapo"):
            raise ValueError(
                f"PolicyLoss.ratio is {self.ratio!r}, but the surrogate {self.surrogate!r} defines "
                "its own ratio; leave ratio at 'token'"
            )
        if self.kl is None and (self.kl_coef != 0 or self.kl_bias_correction):
            raise ValueError(
                "PolicyLoss.kl is None, but kl_coef or kl_bias_correction is set; choose an "
                "estimator, for instance kl='k3'"
            )

    def _require(self, field: str, holds: bool, wanted: str) -> None:
        # A comparison with NaN is false, so NaN is refused as well.
        if not holds:
            raise ValueError(f"PolicyLoss.{field} is {getattr(self, field)}, must be {wanted}")

    @property
    def has_kl(self) -> bool:
        """Whether the KL term reaches the loss, so that `ref_logprobs` is needed."""
        return self.kl is not None and self.kl_coef != 0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PolicyLoss:
        """A named objective, with single axes replaced by `overrides`.

        `perl`: the settings released with PeRL: clip 0.2 / 0.2, dual clip 3, k3 with 0.01,
        token-mean. `grpo`, `bnpo`, `dr_grpo`, `luspo`: TRL's loss types of that name (`luspo` with
        GSPO's clip bounds, which TRL takes from its config), KL off (TRL's
        default; TRL's means over completions count those without tokens too, which
        `normalizer`=B does). `dapo`: clip-higher 0.28, token-mean (DAPO paper). `gspo`, `gspo_token`: sequence
        ratio with the GSPO paper's 3e-4 / 4e-4. `cispo`: ratio bounded above by 5, not below
        (TRL's recommendation). `sapo`, `vespo`: TRL's. `gmpo`: log-ratio clipped to +-0.4 (GMPO
        paper). `dppo_tv`, `dppo_kl`: verl's, with the thresholds 0.15 and 0.05 of the DPPO
        authors. `reinforce`: -A lp, token-mean.

        `dr_grpo` needs `max_completion_length`, here or by `dataclasses.replace`, before use.

        Raises:
            ValueError: no preset of that name (the message lists those that exist).
            TypeError: an override that is no field.
        """
        if name not in _PRESETS:
            listed = ", ".join(sorted(_PRESETS))
            raise ValueError(f"no preset named {name!r}; there are: {listed}")
        for field in overrides:
            if field not in _FIELDS:
                raise TypeError(f"PolicyLoss has no field {field!r}; it has: {', '.join(_FIELDS)}")
        return cls(**{**_PRESETS[name], **overrides})


@functools.lru_cache(maxsize=256)
def coefficient_arguments(loss: PolicyLoss, has_ref: bool) -> tuple[Axes, Numbers]:
    """`loss` as the functions of `coefficient.py` take it."""
    axes = Axes(
        surrogate=loss.surrogate,
        ratio=loss.ratio,
        kl=loss.kl or "",
        correction=loss.correction or "",
        aggregation=loss.aggregation,
        dual_clip=loss.dual_clip is not None,
        delta=loss.delta is not None,
        has_kl=loss.has_kl,
        has_ref=has_ref,
        has_entropy=loss.entropy_coef != 0,
        kl_bias_correction=loss.kl_bias_correction,
    )
    numbers = Numbers(
        clip_low=float(loss.clip_low),
        clip_high=float(loss.clip_high),
        dual_clip=float(loss.dual_clip or 0.0),
        delta=float(loss.delta or 0.0),
        tau_pos=float(loss.sapo_tau_pos),
        tau_neg=float(loss.sapo_tau_neg),
        ratio_cap=float(loss.dppo_ratio_cap),
        kl_coef=float(loss.kl_coef),
        entropy_coef=float(loss.entropy_coef),
        correction_low=float(loss.correction_low),
        correction_high=float(loss.correction_high),
        k_pos=float(loss.vespo_k_pos),
        lambda_pos=float(loss.vespo_lambda_pos),
        k_neg=float(loss.vespo_k_neg),
        lambda_neg=float(loss.vespo_lambda_neg),
    )
    return axes, numbers


_FIELDS = tuple(field.name for field in dataclasses.fields(PolicyLoss))
NUMBERS = tuple(
    field.name
    for field in dataclasses.fields(PolicyLoss)
    if field.type.startswith(("float", "int"))  # type: ignore[union-attr]
)


_PER_SEQUENCE = "seq-mean-token-mean"
_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": _PER_SEQUENCE}

_PRESETS: dict[str, dict[str, Any]] = {
    "perl": {"dual_clip": 3.0, "kl": "k3", "kl_coef": 0.01, "aggregation": "token-mean"},
    "grpo": {"aggregation": _PER_SEQUENCE},
    "bnpo": {"aggregation": "token-mean"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm"},
    "dapo": {"clip_high": 0.28, "aggregation": "token-mean"},
    "gspo": {"ratio": "sequence", **_GSPO},
    "gspo_token": {"ratio": "sequence_token", **_GSPO},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "aggregation": _PER_SEQUENCE},
    "luspo": {"ratio": "sequence", **_GSPO, "aggregation": "seq-mean-token-sum"},
    "vespo": {"surrogate": "vespo"},
    "gmpo": {
        "surrogate": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": _PER_SEQUENCE,
    },
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.15, "clip_high": 0.15},
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05},
    "reinforce": {"surrogate": "reinforce"},
}
