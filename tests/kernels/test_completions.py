"""What `completions_torch` and `completions_triton` find out, as backends call them: bounds that
nobody has looked at, tensors of any layout and dtype, long sums, some completions of several."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_kernels import PolicyLoss, dispatch
from perl_kernels.onepass import folded
from perl_kernels.values import Evaluated, LossInputs, Prepared, Rewards
from tests.kernels.call import BACKENDS, DEVICE

LENGTHS = (3, 0, 1300, 2, 1)
N = sum(LENGTHS)
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
LOSSES = {
    "token": PolicyLoss(kl="k3", kl_coef=0.1, dual_clip=2.0),
    "sequence": PolicyLoss.preset("gspo", clip_low=0.1, correction="sequence_truncate"),
    "vespo": PolicyLoss.preset("vespo", entropy_coef=0.1, correction="token_mask"),
    "gmpo": PolicyLoss.preset("gmpo", kl="k1", kl_coef=0.1),
}
ENGINES = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "native"])


def completions(backend: str) -> Any:
    return dispatch.engine(backend).completions


def tokens(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(N, generator=generator).to(DEVICE)


def inputs(at: list[int] = BOUNDS, **changes: Any) -> LossInputs:
    bounds = torch.tensor(at, device=DEVICE)
    given: dict[str, Any] = {
        "advantages": torch.linspace(-1, 2, len(bounds) - 1, device=DEVICE),
        "old": tokens(1),
        "ref": tokens(2),
        "rollout": tokens(1) + 0.001 * tokens(3),
        **changes,
    }
    return LossInputs(bounds, **given)


def run(backend: str, loss: PolicyLoss, given: LossInputs) -> tuple[Prepared, Evaluated]:
    engine = completions(backend)
    prepared = engine.prepare(loss, given, N, torch.float32)
    return prepared, engine.evaluate(loss, prepared, given, tokens(4), tokens(5))


@ENGINES
@pytest.mark.parametrize("kind", LOSSES)
def test_bounds_that_cannot_be_used(kind: str, backend: str) -> None:
    """Whatever they are, each token is written: NaN where it counts, 0 where it does not."""
    weights = torch.ones(N, device=DEVICE)
    weights[1] = 0
    unusable = ([0], [1, N], [0, N - 1], [0, N + 1], [0, -1, N], [N, 0], [0, 2**40, N])
    for bounds, aggregation in zip(
        unusable, itertools.cycle(("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"))
    ):
        loss = PolicyLoss(**{**vars(LOSSES[kind]), "aggregation": aggregation})
        for given in (inputs(bounds), inputs(bounds, weights=weights)):
            prepared, found = run(backend, loss, given)
            counts = torch.ones(N, device=DEVICE) if given.weights is None else given.weights
            assert not prepared.valid and found.value.isnan() and found.metrics[11] == N
            for written in (prepared.scale, found.coefficients.logprobs):
                assert torch.equal(written.isnan(), counts != 0)
                assert (written[counts == 0] == 0).all()
            for fold in ("correction", "shared", "shared_gmpo"):
                folded(fold, loss, prepared, given)


@ENGINES
def test_a_normalizer_that_cannot_be_used(backend: str) -> None:
    for number in (0.0, -1.0, float("inf"), float("nan")):
        for given in ({"count": number}, {"normalizer": torch.tensor(number, device=DEVICE)}):
            prepared, found = run(backend, LOSSES["token"], inputs(**given))
            assert not prepared.valid and prepared.scale.isnan().all()
            assert found.value.isnan() and found.metrics[11] == N
            bare = inputs(**given)._replace(
                rollout=None, old=torch.full((N,), float("inf"), device=DEVICE)
            )
            found = completions(backend).evaluate(LOSSES["token"], prepared, bare, tokens(4), None)
            assert found.metrics[1] == found.metrics[8] == 0  # Without entropy, without rollout.


@ENGINES
def test_an_infinite_weight_takes_no_other_token_out(backend: str) -> None:
    weights = torch.ones(N, device=DEVICE)
    weights[7] = float("inf")
    prepared, found = run(backend, LOSSES["token"], inputs(weights=weights))
    assert (prepared.scale != 0).all() and found.metrics[10] == N and found.value.isnan()


@ENGINES
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_that_cannot_be_used_is_a_row(weight: float, backend: str) -> None:
    weights = torch.ones(N, device=DEVICE)
    weights[7] = weight
    prepared, found = run(backend, LOSSES["token"], inputs(weights=weights, count=5.0))
    assert prepared.advantages.isnan().nonzero().tolist() == [[7]]
    assert found.metrics[11] == 1 and found.value.isnan()


@ENGINES
@pytest.mark.parametrize("kind", LOSSES)
def test_layouts_and_dtypes(kind: str, backend: str) -> None:
    """Strided, starting anywhere, and of another dtype with the same values: the same to the bit."""

    def spread(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.zeros(len(tensor), 3, dtype=dtype or tensor.dtype, device=DEVICE)
        wide[:, 1] = tensor
        return wide[:, 1]

    whole = (tokens(6) < -0.3).to(torch.float32)
    plain = inputs(weights=whole, normalizer=torch.tensor(7.0, device=DEVICE))
    odd = LossInputs(
        spread(plain.cu_seqlens, torch.int32),
        **{
            name: spread(getattr(plain, name), torch.float64)
            for name in ("advantages", "old", "ref", "rollout")
        },
        weights=spread(whole, torch.bool),
        normalizer=torch.tensor([0, 7], device=DEVICE)[1],
    )
    (_, wanted), (_, found) = (run(backend, LOSSES[kind], given) for given in (plain, odd))
    assert torch.equal(found.value, wanted.value) and torch.equal(found.metrics, wanted.metrics)
    assert torch.equal(found.coefficients.logprobs, wanted.coefficients.logprobs)


@ENGINES
@pytest.mark.parametrize("kind", LOSSES)
def test_some_completions_of_several(kind: str, backend: str) -> None:
    loss, given = LOSSES[kind], inputs(weights=tokens(6) < -0.3)
    prepared, whole = run(backend, loss, given)
    part = slice(LENGTHS[0], N - LENGTHS[-1])
    cut = given.rows(part)._replace(cu_seqlens=given.cu_seqlens[1:-1] - part.start)
    arguments = (prepared.rows(part), cut, tokens(4)[part], tokens(5)[part])
    found = completions(backend).evaluate(loss, *arguments).coefficients
    for got, wanted in zip(found, whole.coefficients, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted[part], rtol=2e-6, atol=0)


@ENGINES
def test_sums_over_a_long_completion(backend: str) -> None:
    """Relative error of at most 1e-6 at 100k tokens: sums in fp32, one after the other, lose three
    digits."""
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(count, generator=generator).to(DEVICE)
    old = logprobs - 0.02 * torch.randn(count, generator=generator).to(DEVICE)
    bounds, one = torch.tensor([0, count], device=DEVICE), torch.ones(1, device=DEVICE)
    weights = torch.rand(count, generator=generator).to(DEVICE) + 0.5
    engine = completions(backend)

    def evaluated(loss: PolicyLoss, **others: Tensor) -> Evaluated:
        given = LossInputs(bounds, one, **others)
        prepared = engine.prepare(loss, given, count, torch.float32)
        return engine.evaluate(loss, prepared, given, logprobs, None)

    gspo = PolicyLoss.preset("gspo", clip_low=1.0, clip_high=1.0)
    gradient = evaluated(gspo, old=old).coefficients.logprobs.double()
    exact = -(logprobs.double() - old.double()).mean().exp() / count
    assert ((gradient - exact).abs() <= 1e-6 * exact.abs()).all()
    mean = PolicyLoss.preset("grpo", surrogate="reinforce")
    exact = -(weights.double() @ logprobs.double()) / weights.double().sum()
    found = evaluated(mean, weights=weights).value.double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@ENGINES
def test_sizes_that_cannot_be_used(backend: str) -> None:
    for sizes, combine in itertools.product(
        ([2, 1], [5, -1], [4, 0, 1], [2**40, 4 - 2**40]),
        ("sum_then_normalize", "normalize_then_sum"),
    ):
        rewards = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
        given = Rewards(rewards, torch.tensor(sizes, device=DEVICE), None, combine=combine)
        found = completions(backend).group_advantages(given)
        assert all(values.isnan().all() for values in found[:3]) and not found.active.any()
        assert found.mean.shape == (len(sizes),)
