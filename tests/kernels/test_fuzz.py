"""Random cases of every public function against `perl_kernels.reference` in fp64, each tensor argument
in a layout and a dtype of its own.

    pytest tests/kernels/test_fuzz.py --fuzz 20000      # so many, over the backends that are there
    pytest tests/kernels/test_fuzz.py --fuzz-seed 7     # those of a run that printed "--fuzz-seed 7"

What is allowed: |ours - truth| <= k max|plain - truth| + atol, where plain is the reference in the
dtype of the case and k is 2 for values and 3 for gradients. `Scale` says what atol is.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import Tensor

import perl_kernels
from perl_kernels import GroupedRewards, PolicyLoss, dispatch, group_advantages, reference
from perl_kernels.objective import KL, Aggregation, Correction, Ratio, Surrogate
from perl_kernels.values import Baseline, Combine
from perl_kernels.values import Scale as RewardScale
from tests.kernels.naive import naive_advantages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled rather than interpreted, nearly every case needs kernels of its own, a second or more each.
CASES = {"torch": 500, "native": 300, "triton": 80 if DEVICE == "cpu" else 100}
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)
NUMBERS = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.bool)
INTEGERS = (torch.int64, torch.int32)

# Factor of atol, see `Scale`, in units of the last place of the dtype that is computed in: over
# twice what any of several thousand cases needed.
UNITS = 8.0

# Log-ratios lp - old, ref - lp and old - rollout are drawn around these, at a distance from every
# bound below: which side of a threshold a token falls on must not be left to rounding, because the
# gradient jumps there and both sides are right.
GAPS = (-0.6, -0.05, 0.05, 0.6, 1.6)
JITTER = 0.02
CLIP = {
    "clip": ((0.2, 0.3, 1.0), (0.2, 0.28, 3.0)),
    "cispo": ((0.2, 0.3, 1.0), (0.2, 0.28, 3.0)),
    "gmpo": ((0.2, 0.4), (0.2, 0.4)),
    "dppo_tv": ((0.05, 0.15), (0.05, 0.15)),
    "dppo_kl": ((0.02, 0.05), (0.02, 0.05)),
}
CORRECTION_BOUNDS = ((0.0, 2.5), (0.8, 1.3), (0.8, math.inf))


class NearThreshold(Exception):
    """A case that says nothing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call, small enough to be printed; tensors follow from `seed`."""

    backend: str
    entry: str
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 1, 0, 7, 3)
    vocab: int = 13
    features: int = 6
    seed: int = 0
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    advantages: str = "completion"  # or "token", "grouped"
    old: bool = True
    ref: bool = True
    rollout: bool = True
    entropy: bool = True
    weights: str = "none"  # or "zeros", "nothing"
    normalizer: str = "none"  # or "float", "tensor", "huge"
    layout: str = "contiguous"  # or "strided", "columns", "rows", "expanded"
    forms: dict[str, tuple[str, torch.dtype | None]] = field(default_factory=dict)
    """By argument: its layout, and its dtype if it is not the one that goes without saying."""
    temperature: float | str = 1.0  # or "rows"
    softcap: float | None = None
    bias: bool = False
    floor: float = 0.0  # what stands in some columns of logits or bias: -inf, or the least number
    frozen: str = ""  # "hidden" or "weight"
    gap: float = 0.0  # added to every third log-ratio: +-25 is beyond the bound of 20
    upstream: float = 1.0
    scale: float = 2.0  # of the logits
    options: tuple[tuple[str, Any], ...] = ()  # chunk_size, inplace and so on

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def scores(self) -> bool:
        """Whether log-probs are computed here."""
        return self.entry != "policy_loss"

    @property
    def is_loss(self) -> bool:
        return self.entry.endswith("_loss")


@dataclass
class Call:
    """The tensors of a case: `leaves` are differentiated, `fixed` are not."""

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]
    upstream: tuple[Tensor, ...]

    def in_dtype(self, dtype: torch.dtype | None) -> Call:
        """Dense and on its own, with what is floating point in another dtype; as it is if None."""

        def convert(value: Any) -> Any:
            if isinstance(value, GroupedRewards):
                return dataclasses.replace(value, rewards=convert(value.rewards))
            if not isinstance(value, Tensor):
                return value
            dense = value.detach().clone(memory_format=torch.contiguous_format)
            return dense.to(dtype) if dtype is not None and dense.is_floating_point() else dense

        leaves = {name: convert(value) for name, value in self.leaves.items()}
        return Call(leaves, {n: convert(x) for n, x in self.fixed.items()}, self.upstream)

    def plain(self, compute: torch.dtype) -> Call:
        """Arguments wider than what is computed in are rounded to it, as an eager call does."""
        same = self.in_dtype(None)
        for given in (same.leaves, same.fixed):
            for name, value in given.items():
                if isinstance(value, Tensor) and value.dtype == torch.float64:
                    given[name] = value.to(compute)
        return same

    def tensors(self) -> Iterator[Tensor]:
        for value in (*self.leaves.values(), *self.fixed.values()):
            if isinstance(value, GroupedRewards):
                yield value.rewards
            elif isinstance(value, Tensor):
                yield value

    def run(
        self, function: Callable[..., Any], *, frozen: str = "", options: Any = ()
    ) -> dict[str, Tensor]:
        """Everything that comes out of `function`, by name."""
        leaves = {n: x.detach().requires_grad_(n != frozen) for n, x in self.leaves.items()}
        output = function(**leaves, **self.fixed, **dict(options))
        results = {
            name: value.detach() for name, value in output._asdict().items() if name != "metrics"
        }
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        outputs = [output.loss] if hasattr(output, "loss") else list(output)
        upstream = [x.to(y) for x, y in zip(self.upstream, outputs, strict=True)]
        if hasattr(output, "metrics"):
            results.update({f"metric {name}": value for name, value in output.metrics.items()})
        gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
        for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
            results[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
            assert results[f"grad {name}"].dtype == leaf.dtype, name
        return results


def build(case: Case) -> Call:
    generator = torch.Generator().manual_seed(case.seed)
    count, n_completions = sum(case.lengths), len(case.lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(DEVICE)

    def rand(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64).to(DEVICE)

    def randint(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator).to(DEVICE)

    def formed(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        layout, wanted = case.forms.get(name, (case.layout, None))
        # Bounds that are all the same are none.
        layout = "strided" if (name, layout) == ("cu_seqlens", "expanded") else layout
        return _laid_out(tensor.to(wanted or dtype or case.compute), layout)

    leaves: dict[str, Tensor] = {}
    fixed: dict[str, Any] = {}
    floor = torch.zeros(case.vocab, dtype=torch.bool, device=DEVICE)
    if case.scores:
        fixed["targets"] = formed("targets", randint(case.vocab, count), torch.int64)
        fixed["temperature"] = case.temperature
        if case.temperature == "rows":
            fixed["temperature"] = formed("temperature", rand(count) + 0.5)
        floor = (rand(case.vocab) < 0.4) & (case.floor != 0)
        floor[fixed["targets"].long()] = False

    def floored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Some columns are at the floor."""
        dtype = case.forms.get(name, ("", None))[1] or dtype
        lowest = max(case.floor, torch.finfo(dtype).min) if case.floor > -math.inf else case.floor
        one = name == "bias" and case.forms.get(name, (case.layout,))[0] == "expanded"
        return formed(name, tensor if one else tensor.masked_fill(floor, lowest), dtype)

    if case.entry.startswith("linear"):
        spread = case.scale / case.features**0.5
        leaves["hidden"] = formed("hidden", normal(count, case.features), case.dtype)
        weight = normal(case.vocab, case.features, scale=spread)
        leaves["weight"] = formed("weight", weight, case.dtype)
        if case.bias:
            leaves["bias"] = floored("bias", normal(case.vocab), case.dtype)
        if case.softcap is not None:
            fixed["softcap"] = case.softcap
    elif case.scores:
        logits = normal(count, case.vocab, scale=case.scale)
        leaves["logits"] = floored("logits", logits, case.dtype)
    else:
        leaves["logprobs"] = formed("logprobs", -normal(count).abs() - 0.02, case.dtype)
        if case.entropy:
            leaves["entropy"] = formed("entropy", normal(count).abs(), case.dtype)
    if not case.is_loss:
        return Call(leaves, fixed, tuple(normal(count) for _ in range(2)))

    # From here on the inputs of the loss.
    if case.scores:
        wide = Call(leaves, fixed, ()).in_dtype(torch.float64)
        score = getattr(reference, case.entry.replace("grpo_loss", "token_logprobs"))
        current = score(**wide.leaves, **wide.fixed).logprobs
    else:
        current = leaves["logprobs"].double()
    owner = torch.repeat_interleave(torch.tensor(case.lengths, dtype=torch.int64)).to(DEVICE)
    weights = 2 * rand(count) + 0.5
    zero = rand(count) < (0.3 if case.weights == "zeros" else 1.0)
    if case.weights != "none":
        fixed["weights"] = formed("weights", weights.masked_fill(zero, 0.0))
    mask = fixed["weights"] != 0 if "weights" in fixed else torch.ones_like(zero)

    def gaps(shared: bool, summed: bool = False) -> Tensor:
        """One for each token; `shared`: nearly the same for a completion, or a `summed` one."""
        size = n_completions if shared else count
        index = randint(len(GAPS) - summed, size)
        gap = torch.tensor(GAPS, dtype=torch.float64, device=DEVICE)[index]
        gap = (gap[owner] if shared else gap) + JITTER * (2 * rand(count) - 1)
        if summed:
            parts = rand(n_completions).mul(0).index_add(0, owner, mask.double())
            gap = gap / parts.clamp(min=1)[owner]
        return gap

    log_ratio = gaps(shared=case.loss.ratio != "token")
    log_ratio[::3] += case.gap
    old = formed("old_logprobs", current - log_ratio)
    by_sequence = (case.loss.correction or "").startswith("sequence")
    base = old.double() if case.old else current
    others = {"old_logprobs": old if case.old else None}
    if case.ref:
        others["ref_logprobs"] = formed("ref_logprobs", current + gaps(shared=False))
    if case.rollout:
        gap = gaps(shared=by_sequence, summed=by_sequence)
        others["rollout_logprobs"] = formed("rollout_logprobs", base - gap)
    for name, tensor in others.items():
        if tensor is not None:
            # The padding of real batches holds anything.
            if tensor.numel() and min(tensor.stride()) > 0:
                tensor[~mask] = math.nan
            fixed[name] = tensor
    per_token = case.advantages == "token"
    if case.advantages == "grouped":
        first = n_completions // 2
        sizes = torch.tensor([first, n_completions - first], device=DEVICE)
        rewards = formed("rewards", randint(5, n_completions) / 4)
        sizes = sizes.to(INTEGERS[case.seed % 2]) if case.seed % 3 else sizes.tolist()
        fixed["advantages"] = GroupedRewards(rewards, sizes, eps=1e-4)
    else:
        values = normal(count if per_token else n_completions, scale=1.5)
        fixed["advantages"] = formed("advantages", values)
    bounds = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()])
    bounds = formed("cu_seqlens", bounds.to(DEVICE), torch.int32)
    # With completions whose lengths the host knows, sequence-level losses go block by block.
    fixed["cu_seqlens"] = bounds.cpu() if case.seed % 2 else bounds
    fixed["loss"] = case.loss
    number = count + 1.5
    match case.normalizer:
        case "float":
            fixed["normalizer"] = number
        case "tensor":
            number = torch.tensor(number, device="cpu" if case.seed % 5 else DEVICE)
            fixed["normalizer"] = formed("normalizer", number)
        case "huge":
            fixed["normalizer"] = 1e5 * number
    return Call(leaves, fixed, (torch.tensor(case.upstream, dtype=torch.float64),))


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, in between others that nobody may look at; `expanded`: those of the first row
    alone."""
    if layout == "contiguous" or not tensor.ndim:
        return tensor
    if layout == "expanded":
        return tensor[:1].clone().expand(tensor.shape) if len(tensor) else tensor
    if tensor.ndim == 2 and layout == "columns":
        return tensor.t().contiguous().t()
    step = (2,) * tensor.ndim if layout == "strided" else (1,) * (tensor.ndim - 1) + (2,)
    if tensor.ndim == 2 and layout == "rows":
        step = (3, 1)
    size = [n * k + 1 for n, k in zip(tensor.shape, step, strict=True)]
    foreign = math.nan if tensor.is_floating_point() else 1
    around = torch.full(size, foreign, dtype=tensor.dtype, device=tensor.device)
    view = around[tuple(slice(1, None, k) for k in step)]
    view = view[tuple(slice(0, n) for n in tensor.shape)]
    return view.copy_(tensor)


class Scale:
    """atol: what rounding alone does to the quantities of a case, whoever computes them.

    Scores are exact to eps * score, where score is the largest magnitude that goes into one; so
    are the log-probs. A coefficient g = dL/dlogprob is then exact to eps * score * (|g| + |g'|),
    with its slope g' from the truth at log-probs a little off; the gradients of logits, hidden
    states and head are sums of g times what is bounded. Every bound is multiplied by `UNITS` units
    in the last place of the dtype of computation. Gradients in half precision get one unit of that
    dtype on top: they are rounded when stored, per tile and at the end, and where a tensor has few
    elements the reference may be exact by luck, which leaves nothing to multiply by k.
    """

    def __init__(self, case: Case, call: Call, truth: dict[str, Tensor], plain: dict[str, Tensor]):
        self.case, self.call = case, call
        self.eps = torch.finfo(case.compute).eps
        # The log-sum-exp of V scores lies up to log V above them.
        self.score = 1.0 + self._largest_score(call) + math.log(max(case.vocab, 1))
        lost = 0.0
        if "logprobs" in truth and case.scores:
            lost = _largest(plain["logprobs"].double() - truth["logprobs"])
        self.shift = 4 * lost + 64 * self.eps * self.score
        self.by_logprob, self.by_entropy, self.slope = self._coefficients(truth)

    def _largest_score(self, call: Call) -> float:
        wide = call.in_dtype(torch.float64).leaves
        if "hidden" in wide:
            scores = wide["hidden"].abs() @ wide["weight"].abs().t()
            scores = scores + _largest(wide.get("bias"), above=-1e4)
        else:
            scores = wide.get("logits", wide.get("logprobs"))
        return _largest(scores, above=-1e4) / min(1.0, self._coldest())

    def _coldest(self) -> float:
        temperature = self.call.fixed.get("temperature", 1.0)
        if isinstance(temperature, Tensor):
            return float(temperature.min()) if temperature.numel() else 1.0
        return temperature

    def _coefficients(self, truth: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        if not self.case.is_loss:
            return (*self.call.upstream, 0.0)
        fixed = self.call.in_dtype(torch.float64).fixed
        for name in ("targets", "temperature", "softcap"):
            fixed.pop(name, None)
        entropy = truth["entropy"]
        at: list[dict[str, Tensor]] = []
        for step in (0.0, -self.shift, self.shift):
            leaves = {"logprobs": truth["logprobs"] + step}
            if not entropy.isnan().any():
                leaves["entropy"] = entropy
            at.append(Call(leaves, fixed, self.call.upstream).run(reference.policy_loss))
        # The flags only grow, or only shrink, with all log-probs: equal shares at both ends mean
        # that no token has crossed a bound in between.
        for name in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"):
            if at[1][f"metric {name}"] != at[2][f"metric {name}"]:
                raise NearThreshold(name)
        exact, *others = (found["grad logprobs"] for found in at)
        slope = max(_largest(other - exact) for other in others) / self.shift
        return exact, at[0].get("grad entropy", torch.zeros_like(exact)), slope

    def of(self, name: str, truth: Tensor) -> float:
        """What `name` may be off by."""
        kind, _, what = name.rpartition(" ")
        score, slope = self.score, self.slope * self.score
        # By row: |g| + |h| * score, where h = dL/dentropy has a factor log p.
        row = self.by_logprob.abs() + self.by_entropy.abs() * score
        if kind == "metric":
            length = max(self.case.lengths, default=1)
            return UNITS * self.eps * score * max(length, 1) * (1 + _largest(truth))
        if kind == "":
            if what == "loss":
                total = float(row.sum()) * score / abs(self.case.upstream)
                return UNITS * self.eps * (1 + _largest(truth) + total)
            return UNITS * self.eps * score * (score if what == "entropy" else 1)
        by = 1.0
        if what in ("hidden", "weight"):
            other = self.call.leaves["weight" if what == "hidden" else "hidden"]
            by = 2 * _largest(other)
        largest = float(row.sum()) if what in ("weight", "bias") else _largest(row)
        if what in ("weight", "bias"):
            slope *= len(row)
        if self.case.scores:
            by /= min(1.0, self._coldest())
        exact = self.eps * (largest * score + slope)
        # The gradient of logits is rounded to their dtype, that of an argument to its own.
        half = [x for x in (self.case.dtype, self.call.leaves[what].dtype) if x in HALF]
        for narrow in map(torch.finfo, half):
            tiny = narrow.smallest_normal * narrow.eps * len(row)
            exact += (narrow.eps * largest + tiny) / UNITS
        return by * UNITS * exact


def _largest(tensor: Tensor | None, above: float = -math.inf) -> float:
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.masked_fill(tensor < above, 0.0).abs().max())


def check(case: Case) -> None:
    """The case on its backend against the truth.

    Raises:
        NearThreshold: rounding decides on which side of a threshold a token is.
    """
    call = build(case)
    plain_function = getattr(reference, case.entry)
    truth = call.in_dtype(torch.float64).run(plain_function, frozen=case.frozen)
    plain = call.plain(case.compute).run(plain_function, frozen=case.frozen)
    _check_clear_of_jumps(case, call, truth)
    scale = Scale(case, call, truth, plain)
    before = call.in_dtype(None)
    options = (*case.options, ("backend", case.backend))
    given = {x.untyped_storage().data_ptr() for x in call.tensors() if x.numel()}

    def function(**arguments: Any) -> Any:
        output = getattr(perl_kernels, case.entry)(**arguments)
        for result in (*output, *getattr(output, "metrics", {}).values()):
            if isinstance(result, Tensor):
                assert result.untyped_storage().data_ptr() not in given, "an argument came out"
        return output

    ours = call.run(function, frozen=case.frozen, options=options)
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        got, other = ours[name], plain[name]
        assert got.shape == exact.shape, name
        if not name.startswith("grad"):
            assert got.dtype == case.compute, name
        if not exact.numel():
            continue
        assert torch.equal(got.isnan(), exact.isnan()), name
        if exact.isnan().any() or not other.isfinite().all():
            continue
        k = 3 if name.startswith("grad") else 2
        allowed = k * _largest(other.double() - exact) + scale.of(name, exact)
        error = _largest(got.double() - exact)
        assert error <= allowed, f"{name}: off by {error:.3e}, {allowed:.3e} allowed"
    if not dict(case.options).get("inplace"):
        for name, kept in {**before.leaves, **before.fixed}.items():
            given = {**call.leaves, **call.fixed}[name]
            if isinstance(kept, Tensor):
                assert torch.equal(kept.nan_to_num(), given.detach().nan_to_num()), name


def _check_clear_of_jumps(case: Case, call: Call, truth: dict[str, Tensor]) -> None:
    """`Scale` looks at the bounds that set a flag; these set none: the mask of a correction, and
    `delta`."""
    if not case.is_loss or not sum(case.lengths):
        return
    fixed, loss, margin = call.fixed, case.loss, 0.02
    weights = fixed.get("weights")
    current = truth["logprobs"]
    mask = torch.ones_like(current, dtype=torch.bool) if weights is None else weights != 0
    old = fixed["old_logprobs"].double() if case.old else current
    if case.old and loss.delta is not None:
        distance = (current - old - math.log(loss.delta))[mask].abs()
        if (distance < margin).any():
            raise NearThreshold("delta")
    if (loss.correction or "").endswith("mask"):
        gap = torch.where(mask, old - fixed["rollout_logprobs"].double(), 0.0)
        if loss.correction == "sequence_mask":
            owner = torch.repeat_interleave(torch.tensor(case.lengths)).to(gap.device)
            gap = gap.new_zeros(len(case.lengths)).index_add(0, owner, gap)
        for bound in (loss.correction_low, loss.correction_high):
            if 0 < bound < math.inf and ((gap - math.log(bound)).abs() < margin).any():
                raise NearThreshold("correction")


def pick(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def losses(draw: Any) -> PolicyLoss:
    # Twice as often those that have a choice of ratios, so that each rare path is met in a run.
    surrogate = draw(pick(*get_args(Surrogate), "clip", "cispo", "sapo"))
    low, high = CLIP.get(surrogate, ((0.2,), (0.2,)))
    fields: dict[str, Any] = {
        "surrogate": surrogate,
        "clip_low": draw(pick(*low)),
        "clip_high": draw(pick(*high)),
        "aggregation": draw(pick(*get_args(Aggregation))),
        "max_completion_length": draw(pick(7, 16)),
        "entropy_coef": draw(pick(0.0, 0.03, -0.1)),
        "kl": draw(pick(None, *get_args(KL))),
        "correction": draw(pick(*4 * (None,), *get_args(Correction))),
    }
    if surrogate in ("clip", "cispo", "sapo"):
        fields["ratio"] = draw(pick(*get_args(Ratio)))
    if surrogate == "clip":
        bound = draw(pick(None, "dual_clip", "delta"))
        if bound is not None:
            fields[bound] = draw(pick(1.5, 3.0)) + (3.0 if fields["clip_high"] == 3.0 else 0.0)
    elif surrogate == "sapo":
        fields.update(sapo_tau_pos=draw(pick(1.0, 0.7)), sapo_tau_neg=draw(pick(1.05, 1.6)))
    elif surrogate == "vespo":
        fields.update(vespo_k_pos=draw(pick(2.0, 1.5)), vespo_lambda_neg=draw(pick(2.0, 2.5)))
    elif surrogate.startswith("dppo"):
        fields["dppo_ratio_cap"] = draw(pick(20.0, 1.2))
    if fields["kl"] is not None:
        fields["kl_coef"] = draw(pick(0.0, 0.2, 0.2))
        fields["kl_bias_correction"] = draw(st.booleans())
    if fields["correction"] is not None:
        low, high = draw(pick(*CORRECTION_BOUNDS))
        fields.update(correction_low=low, correction_high=high)
    return PolicyLoss(**fields)


ENTRIES = {
    "linear_grpo_loss": 4,
    "policy_loss": 3,
    "grpo_loss": 3,
    "token_logprobs": 1,
    "linear_token_logprobs": 1,
}
DTYPES = {
    "torch": (*FLOATS,),
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, *HALF),
}
FORMS = {
    **dict.fromkeys(("logits", "logprobs", "hidden", "weight"), (None,)),
    **dict.fromkeys(("bias", "entropy", "temperature"), FLOATS),
    **dict.fromkeys(("old_logprobs", "ref_logprobs", "rollout_logprobs"), FLOATS),
    **dict.fromkeys(("advantages", "rewards", "weights", "normalizer"), NUMBERS),
    **dict.fromkeys(("targets", "cu_seqlens"), INTEGERS),
}
"""The dtypes that an argument comes in."""

LAYOUTS = ("contiguous", "contiguous", "strided", "columns", "rows", "expanded")


@st.composite
def forms(draw: Any) -> dict[str, tuple[str, torch.dtype | None]]:
    found = {
        name: (draw(pick(*LAYOUTS)), draw(pick(None, *dtypes))) for name, dtypes in FORMS.items()
    }
    # A flag is a normalizer of 1.
    if found["normalizer"][1] == torch.bool:
        found["normalizer"] = "contiguous", torch.int64
    return found


@st.composite
def cases(draw: Any, backend: str) -> Case:
    entry = draw(pick(*(name for name, share in ENTRIES.items() for _ in range(share))))
    dtype = draw(pick(*DTYPES[backend]))
    # Interpreted, a kernel takes some milliseconds a row.
    longest, most = (9, 6) if backend != "triton" or DEVICE == "cuda" else (5, 4)
    length = pick(0, 1, *range(2, longest + 1))
    n_completions = draw(pick(*range(1, most + 1), 0))
    linear, scores = entry.startswith("linear"), entry != "policy_loss"
    fields: dict[str, Any] = {
        "lengths": tuple(draw(length) for _ in range(n_completions)),
        "seed": draw(st.integers(0, 2**31)),
        "forms": draw(forms()),
        "upstream": draw(pick(1.0, 1.0, -3.0)),
    }
    options: dict[str, Any] = {}
    if scores:
        fields.update(
            vocab=draw(pick(1, 2, 7, 13, 32, 61, 127, 257)),
            temperature=draw(pick(1.0, 0.7, 1.8, "rows")),
            scale=draw(pick(0.5, 2.0)),
            floor=draw(pick(0.0, 0.0, -math.inf, -torch.finfo(torch.float32).max)),
        )
    if linear:
        fields.update(
            features=draw(pick(1, 2, 5, 16, 17)),
            softcap=draw(pick(None, None, 1.5, 30.0)),
            bias=draw(st.booleans()),
            frozen=draw(pick("", "", "hidden", "weight")),
        )
        block = draw(pick(None, "chunk_size", "memory_budget"))
        if block is not None:
            options[block] = draw(pick(1, 2, 5, 100) if block == "chunk_size" else pick(1, 700))
        options["logits_dtype"] = draw(pick(None, torch.float32))
    if entry.endswith("_loss"):
        loss = draw(losses())
        fields.update(
            loss=loss,
            old=draw(st.booleans()),
            ref=loss.has_kl or draw(st.booleans()),
            rollout=loss.correction is not None or draw(st.booleans()),
            entropy=loss.entropy_coef != 0 or draw(st.booleans()),
            advantages=draw(pick("completion", "token", "grouped")),
            weights=draw(pick(*2 * ("none", "zeros", "zeros"), "nothing")),
            normalizer=draw(pick("none", "none", "float", "tensor", "huge")),
        )
        if fields["normalizer"] == "huge":
            fields["upstream"] = 2.0**16  # as a scaler of fp16 gradients gives it
        # At 9, a ratio of 8103, the gradient is still one of fp16.
        gaps = (9.0,) if dtype == torch.float16 else (25.0, -25.0, 9.0)
        if scores or dtype in (torch.float32, torch.float64):
            fields["gap"] = draw(pick(0.0, 0.0, 0.0, *gaps))
        if entry == "linear_grpo_loss":
            options["skip_idle"] = draw(st.booleans())
        # Elements of an expanded tensor share their memory: none of them can be written over.
        if entry == "grpo_loss" and fields["forms"]["logits"][0] != "expanded":
            options["inplace"] = draw(st.booleans())
    chosen = tuple((name, value) for name, value in options.items() if value not in (None, False))
    return Case(backend=backend, entry=entry, dtype=dtype, options=chosen, **fields)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A call of `group_advantages`."""

    backend: str
    rewards: tuple[tuple[float, ...], ...]  # one row per rollout
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    flat: bool = False  # [B] instead of [B, 1]
    layout: str = "contiguous"
    sizes_dtype: torch.dtype | None = torch.int64  # None: a list
    reward_weights: tuple[float, ...] | None = None
    weights_dtype: torch.dtype | None = None  # None: a list
    weights_layout: str = "strided"
    scale: str = "group"
    baseline: str = "mean"
    unbiased: bool = True
    eps: float = 1e-6
    combine: str = "sum_then_normalize"

    def run(self, function: Callable[..., Any], rewards: Tensor, **options: Any) -> list[Tensor]:
        """Advantages, mean, std, active."""
        sizes: Any = list(self.sizes)
        if self.sizes_dtype is not None:
            sizes = _laid_out(torch.tensor(sizes, dtype=self.sizes_dtype), "strided")
        weights: Any = self.reward_weights
        if weights is not None and self.weights_dtype is not None:
            weights = torch.tensor(weights, dtype=self.weights_dtype, device=DEVICE)
            weights = _laid_out(weights, self.weights_layout)
        how = {name: getattr(self, name) for name in ("scale", "baseline", "unbiased", "combine")}
        output = function(rewards, sizes, reward_weights=weights, eps=self.eps, **how, **options)
        return [values.cpu() for values in output]

    def tensor(self) -> Tensor:
        rewards = torch.tensor(self.rewards, dtype=torch.float64, device=DEVICE)
        rewards = rewards if self.dtype.is_floating_point else rewards.nan_to_num(1.0)
        return (rewards[:, 0] if self.flat else rewards).to(self.dtype)


def check_groups(groups: Groups) -> None:
    given = _laid_out(groups.tensor(), groups.layout)
    ours = groups.run(group_advantages, given, backend=groups.backend)
    truth = groups.run(naive_advantages, given.double())
    wide = groups.dtype == torch.float64
    # Computed in fp64 and rounded once; 1e-9 is what sums in another order leave of equal rewards
    # after the division by eps.
    rtol = 1e-9 if wide else torch.finfo(torch.float32).eps
    for got, exact in zip(ours[:3], truth[:3], strict=True):
        assert got.dtype == (torch.float64 if wide else torch.float32)
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-9)
    assert torch.equal(ours[3], truth[3])


@st.composite
def grouped(draw: Any, backend: str) -> Groups:
    count = draw(pick(1, 1, 2, 3))
    # Their weighted sums are exact, so that the order of a sum does not decide whether two rollouts
    # have the same reward.
    reward = pick(0.0, 1.0, 0.25, -0.5, 3.0, math.nan)
    row = st.tuples(*[reward] * count)
    sizes = draw(st.lists(pick(0, 1, 2, 3, 5), min_size=1, max_size=4))
    rollouts = sum(sizes)
    weights = draw(pick(None, torch.float64, torch.float32, torch.bfloat16))
    return Groups(
        backend=backend,
        rewards=tuple(draw(st.lists(row, min_size=max(rollouts, 1), max_size=max(rollouts, 1)))),
        sizes=tuple(sizes) if rollouts else (1,),
        dtype=draw(pick(*(x for x in NUMBERS if x != torch.float64 or backend != "triton"))),
        flat=count == 1 and draw(st.booleans()),
        layout=draw(pick(*LAYOUTS)),
        sizes_dtype=draw(pick(None, *INTEGERS)),
        reward_weights=draw(st.sampled_from([None, (1.0, 0.5, 2.0)[:count]])),
        weights_dtype=weights,
        weights_layout=draw(pick("contiguous", "strided", "expanded")),
        scale=draw(pick(*get_args(RewardScale))),
        baseline=draw(pick(*get_args(Baseline))),
        unbiased=draw(st.booleans()),
        eps=draw(pick(1e-6, 1e-4, 0.5)),
        combine=draw(pick(*get_args(Combine))),
    )


def run(strategy: Any, function: Callable[[Any], None], count: int, seed: int) -> None:
    def decided(case: Any) -> None:
        try:
            function(case)
        except NearThreshold:
            hypothesis.reject()

    wrapped = hypothesis.given(strategy)(decided)
    wrapped = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )(wrapped)
    hypothesis.seed(seed)(wrapped)()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize(
    ("strategy", "function", "share"),
    [(cases, check, 0.9), (grouped, check_groups, 0.1)],
    ids=["calls", "groups"],
)
def test_random_cases(
    pytestconfig: pytest.Config,
    backend: str,
    strategy: Callable[[str], Any],
    function: Callable[[Any], None],
    share: float,
) -> None:
    there = dispatch.available_backends()
    if not there[backend][0]:
        pytest.skip(there[backend][1])
    total = pytestconfig.getoption("--fuzz", None)
    count = CASES[backend] if total is None else total / sum(there[name][0] for name in CASES)
    seed = pytestconfig.getoption("--fuzz-seed", None)
    if seed is None:
        seed = 0 if "CI" in os.environ else random.SystemRandom().randrange(2**31)
    print(f"to repeat: --fuzz {total} --fuzz-seed {seed}" if total else f"--fuzz-seed {seed}")
    run(strategy(backend), function, math.ceil(count * share), seed)
