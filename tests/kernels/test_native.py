"""What the native rows have of their own: blocks, kept exponentials, instruction sets, threads, the
translated mathematics. `test_rows.py` holds them to the same numbers as the other backends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from perl_kernels import (
    PolicyLoss,
    coefficient,
    dispatch,
    linear_token_logprobs,
    rows_native,
    rows_torch,
    token_logprobs,
)
from perl_kernels.objective import KL, Correction, Surrogate
from perl_kernels.values import Coefficients, LossInputs, Prepared, Scoring
from tests.messages import refused

THERE, WHAT = rows_native.available()
if not THERE:
    pytest.skip(WHAT, allow_module_level=True)

INF, NAN = float("inf"), float("nan")
ROOT = Path(__file__).parents[2]


def prepared(n: int, dtype: torch.dtype = torch.float32) -> Prepared:
    advantages = (torch.arange(n, dtype=dtype) - 2.5) / 4
    return Prepared(advantages, torch.full((n,), 0.5, dtype=dtype), torch.tensor(True))


def dyadic(*shape: int) -> Tensor:
    """Normal numbers that fp32 adds without rounding."""
    return (256 * torch.randn(shape)).round() / 256


def scores(kind: str, columns: int) -> Tensor:
    """[6, columns], whose largest score comes first, last, or in steps from block to block."""
    x = dyadic(6, columns)
    if kind == "rising":
        x += torch.arange(columns) / 32
    elif kind == "falling":
        x -= torch.arange(columns) / 32
    elif kind == "masked":
        x[:, : columns // 2] = -INF
        x[::2, -(columns // 3) :] = -INF
        x[:, columns // 2] = 0.0
    elif kind == "far":  # a later block makes nothing of the ones before
        x[:, -1] = 300.0
    return x


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 2047, 2048, 2049, 4096, 5003])
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "masked", "far"])
@pytest.mark.parametrize(("entropy_coef", "softcap"), [(0.0, None), (0.3, None), (0.0, 4.0)])
def test_loss_of_rows_that_are_blocks(
    kind: str, columns: int, entropy_coef: float, softcap: float | None
) -> None:
    """Kept exponentials are in units of the largest score up to their block, and the last block is
    shorter: statistics and gradients are those of fp64, over the logits or elsewhere."""
    x = scores(kind, columns)
    targets = torch.tensor([0, columns - 1, columns // 2, columns // 3, 0, columns - 1])
    how = Scoring(targets, dyadic(columns), 0.7, softcap)
    loss = PolicyLoss(surrogate="reinforce", entropy_coef=entropy_coef)
    inputs = LossInputs(torch.tensor([0, 6]))
    right = torch.empty(x.shape, dtype=torch.float64)
    given = (loss, prepared(6, torch.float64), inputs)
    stats, slopes = rows_torch.row_loss(x.double(), how, *given, right)
    elsewhere, over = torch.full_like(x, NAN), x.clone()
    for out in (elsewhere, over):
        tile = over if out is over else x
        found, coefficients = rows_native.row_loss(tile, how, loss, prepared(6), inputs, out)
        # What the rounding of `shift` has lost is in `log_sum`.
        whole = ([*s[:3], s.shift.double() + s.log_sum.double()] for s in (found, stats))
        for got, want in zip(*whole, strict=True):
            torch.testing.assert_close(got, want.to(got.dtype), rtol=3e-7, atol=1e-6)
        want = slopes.logprobs.float()
        torch.testing.assert_close(coefficients.logprobs, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(elsewhere.nan_to_num(9.0), over.nan_to_num(9.0))
    torch.testing.assert_close(elsewhere, right.float(), rtol=2e-5, atol=2e-7, equal_nan=True)
    assert softcap or (elsewhere[right == 0] == 0).all()


@pytest.mark.parametrize("dtype", rows_native.DTYPES)
@pytest.mark.parametrize("out_dtype", rows_native.DTYPES)
def test_narrow_rows_are_rounded_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """To nearest, ties to even; a NaN stays one whatever its bits."""
    torch.manual_seed(0)
    x = torch.randn(6, 1500).to(dtype)
    x[5, 7] = NAN
    if dtype == torch.float32:
        x.view(torch.int32)[5, 7] = 0x7FFFFFFF
    how = Scoring(torch.arange(6), None, 1.0, None)
    exact, out = torch.empty(6, 1500), torch.empty(6, 1500, dtype=out_dtype)
    given = (PolicyLoss(entropy_coef=0.1), prepared(6), LossInputs(torch.tensor([0, 6])))
    rows_native.row_loss(x.float(), how, *given, exact)
    rows_native.row_loss(x, how, *given, out)
    assert out[5].isnan().all() and out[:5].isfinite().all()
    assert torch.equal(out[:5], exact[:5].to(out_dtype))


def test_ties_are_rounded_to_even() -> None:
    """-by / 2 lies halfway between two numbers of bf16."""
    by = Coefficients(torch.tensor([2 + 2**-7, 2 + 3 * 2**-7]), None)
    x, how = torch.zeros(2, 2), Scoring(torch.tensor([0, 0]), None, 1.0, None)
    out = torch.empty(2, 2, dtype=torch.bfloat16)
    rows_native.row_gradient(x, how, rows_native.row_stats(x, how), by, out)
    assert out.tolist() == [[1.0, -1.0], [1.015625, -1.015625]]


@pytest.mark.parametrize(
    ("row", "temperature", "softcap"),
    [
        ([NAN, 0.0], 1.0, 2.0),
        ([0.0, NAN], 1.0, 2.0),
        ([1e38, 0.0], 1e-3, None),
        ([-1e38, -2e38], 1e-3, None),
    ],
)
def test_broken_after_scaling(row: list[float], temperature: float, softcap: float | None) -> None:
    """A NaN under a softcap, a score that is infinite by the temperature, and nothing else."""
    for columns in (2, 2050):
        x = torch.full((1, columns), row[1])
        x[0, :2] = torch.tensor(row)
        stats = rows_native.row_stats(x, Scoring(torch.tensor([1]), None, temperature, softcap))
        assert stats.logprobs.isnan() and stats.entropy.isnan() and stats.log_sum.isnan()


def test_gradient_of_large_scores_is_not_that_of_rounded_ones() -> None:
    """fp32 has steps of 0.002 at 30,000; what `shift` has lost is made good."""
    x = (20_000 + torch.arange(64) / 64)[None]
    how, by = Scoring(torch.tensor([5]), None, 0.7, None), Coefficients(torch.ones(1), None)
    p = (x.double() / 0.7).softmax(1)
    right = torch.nn.functional.one_hot(how.targets, 64) - p
    out = torch.empty_like(x)
    rows_native.row_gradient(x, how, rows_native.row_stats(x, how), by, out)
    torch.testing.assert_close(out, (right / 0.7).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1e-8, 1e-12, 3.0])
def test_gradient_of_scores_without_fractions(temperature: float) -> None:
    """A step of fp32 is more than all of the distribution: the largest score is found again exactly."""
    torch.manual_seed(0)
    x = (5 * torch.randn(300, 50)) * (1e30 if temperature == 3.0 else 1.0)
    x[:, 7] = x[:, 9] = 2 * x.amax(1)
    how = Scoring(torch.full((300,), 7), None, temperature, None)
    out = torch.empty_like(x)
    by = Coefficients(torch.full((300,), temperature), None)
    stats = rows_native.row_stats(x, how)
    rows_native.row_gradient(x, how, stats, by, out)
    right = torch.zeros_like(x)
    right[:, 7], right[:, 9] = 0.5, -0.5
    torch.testing.assert_close(out, right, rtol=1e-6, atol=0)
    # Columns of another rank than the largest score's have a probability of 0.
    rows_native.row_gradient(
        x[:, 10:], how._replace(targets=how.targets - 10), stats, by, out[:, 10:]
    )
    assert (out[:, 10:] == 0).all()


def test_columns_that_are_not_adjacent() -> None:
    x = torch.randn(1500, 4).t()
    how = Scoring(torch.arange(4)[::1], None, torch.rand(8).double()[::2] + 0.5, None)
    by = Coefficients(torch.randn(8)[::2], torch.randn(4).double())
    want, out = torch.empty(4, 1500), torch.zeros(1500, 4).t()
    rows_native.row_gradient(x.contiguous(), how, rows_native.row_stats(x, how), by, want)
    rows_native.row_gradient(x, how, rows_native.row_stats(x, how), by, out)
    assert torch.equal(out, want)
    given = (PolicyLoss(), prepared(4), LossInputs(torch.tensor([0, 4])))
    rows_native.row_loss(x.contiguous(), how, *given, want)
    rows_native.row_loss(x, how, *given, x)
    assert torch.equal(x, want)


def test_results_are_fp32_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    how = Scoring(torch.tensor([0]), None, 1.0, None)
    torch.set_default_dtype(torch.float64)
    try:
        stats = rows_native.row_stats(torch.zeros(1, 4, dtype=torch.float32), how)
    finally:
        torch.set_default_dtype(torch.float32)
    assert stats.logprobs.dtype == torch.float32
    assert stats.logprobs.item() == pytest.approx(-1.3862944)


def test_entropy_is_at_least_as_exact_as_eager() -> None:
    torch.manual_seed(0)
    x = 2 * torch.randn(8, 151_936)
    ours = rows_native.row_stats(x, Scoring(torch.arange(8), None, 1.0, None)).entropy
    errors = []
    for logp in (x.double().log_softmax(1), x.log_softmax(1)):
        errors.append(-(logp.exp() * logp).sum(1))
    truth, eager = errors
    assert (ours - truth).abs().max() <= (eager - truth).abs().max()
    torch.testing.assert_close(ours.double(), truth, rtol=2e-7, atol=0)


# ---- threads


def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x, how = torch.randn(37, 3000), Scoring(torch.arange(37), None, 1.0, None)
    given = (PolicyLoss(), prepared(37), LossInputs(torch.tensor([0, 37])))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.full_like(x, NAN)
            stats, _ = rows_native.row_loss(x, how, *given, out)
            results.append(torch.cat([*stats, out.flatten()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


THREADS = """
import os, torch
from perl_kernels import rows_native
from perl_kernels.values import Scoring
x, how = torch.randn(64, 4000), Scoring(torch.zeros(64, dtype=torch.int64), None, 1.0, None)
for threads in (1, 4):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    rows_native.row_stats(x, how)
    print(len(os.listdir("/proc/self/task")) - before)
"""


def test_threads_are_pytorchs() -> None:
    """None of its own with one; with four, the three that PyTorch's pool is short of."""
    found = run("-c", THREADS, OMP_NUM_THREADS="1")
    assert found.stdout.split() == ["0", "3"], found.stderr


# ---- the mathematics, translated from coefficient.py


def objectives() -> list[PolicyLoss]:
    surrogates = [PolicyLoss(surrogate=name) for name in get_args(Surrogate)]
    kinds: list[dict[str, Any]] = [
        {"kl": kl, "kl_coef": 0.3, "kl_bias_correction": bias}
        for kl in get_args(KL)
        for bias in (False, True)
    ]
    corrections = [
        PolicyLoss(surrogate=surrogate, correction=mode, correction_low=0.5, correction_high=1.5)
        for mode in get_args(Correction)
        for surrogate in ("clip", "cispo", "vespo")
    ]
    bounded = [PolicyLoss(dual_clip=1.5), PolicyLoss(delta=1.6), PolicyLoss(clip_high=0.5)]
    metric = PolicyLoss(kl="k3")
    return [*surrogates, *(PolicyLoss(**kind) for kind in kinds), *corrections, *bounded, metric]


@pytest.mark.parametrize("loss", objectives(), ids=str)
def test_translated_mathematics(loss: PolicyLoss) -> None:
    """The derivative of the term of 4,000 tokens, on both sides of every bound, is what the same
    source gives in fp64."""
    torch.manual_seed(0)
    n = 4000
    x = torch.cat([4 * torch.randn(n, 1), torch.zeros(n, 1)], 1)
    how = Scoring(torch.zeros(n, dtype=torch.int64), None, 1.0, None)
    near = torch.where(torch.rand(3, n) < 0.1, 30 * torch.randn(3, n), 0.4 * torch.randn(3, n))
    lp = rows_native.row_stats(x, how).logprobs
    old, ref, rollout = lp + near
    old[:8] = torch.tensor([INF, -INF, NAN, 0, 0, 0, 0, 0]) + lp[:8]
    ref[4:7] = torch.tensor([INF, -INF, NAN])
    needs_ref = loss.kl is not None
    advantages = torch.randn(n)
    advantages[::50], scale = 0.0, torch.rand(n)
    scale[::60], scale[7] = 0.0, NAN
    inputs = LossInputs(
        torch.tensor([0, n]),
        old=old,
        ref=ref if needs_ref else None,
        rollout=rollout if loss.correction else None,
    )
    given = Prepared(advantages, scale, torch.tensor(True))
    _, got = rows_native.row_loss(x, how, loss, given, inputs, None)
    wide = inputs._replace(old=old.double(), ref=ref.double() if needs_ref else None)
    exact = Prepared(advantages.double(), scale.double(), given.valid)
    right = rows_torch.row_coefficients(loss, lp.double(), exact, wide).logprobs
    torch.testing.assert_close(got.logprobs, right.float(), rtol=1e-6, atol=0, equal_nan=True)
    assert (got.logprobs[::60][1:] == 0).all() and got.logprobs.count_nonzero() > n / 4


def test_what_has_no_translation_ends_the_build() -> None:
    path = ROOT / "kernels/csrc/translate.py"
    spec = importlib.util.spec_from_file_location("translate", path)
    assert spec is not None and spec.loader is not None
    translate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(translate)
    for line in ("x = a ** 2", "while a: b", "x = a if a else b", "x += a", "x = 0 < a < b"):
        with pytest.raises(SyntaxError, match="line 2"):
            translate.Translator().module(f"def f(a, b):\n    {line}")


# ---- instruction sets, and whether there is a library


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(name: str) -> None:
    """All tests of rows again, in a process of its own: the choice is made once. Those of other processes choose themselves."""
    if WHAT.endswith(name):
        pytest.skip("the one that the other tests have run")
    tests = [f"tests/kernels/test_{file}.py" for file in ("native", "rows")]
    processes = "other_instruction_sets or what_is_told or threads_are_pytorchs"
    only = f"native and not triton and not ({processes})"
    found = run("-m", "pytest", "-q", "-rs", "-k", only, *tests, PERL_NATIVE_ISA=name)
    if "does not have" in found.stdout:
        pytest.skip(f"this processor has no {name}")
    assert found.returncode == 0, found.stdout


LOADED = "from perl_kernels.dispatch import available_backends as a; print(*a()['native'])"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PERL_NATIVE_ISA": "avx3"}, ("avx3", "PERL_NATIVE_ISA")),
        ({"PERL_NATIVE_LIBRARY": __file__}, (__file__,)),
        ({"PERL_NATIVE_ISA": "portable"}, ("True", "portable")),
    ],
)
def test_what_is_told_of_the_library(environment: dict[str, str], told: tuple[str, ...]) -> None:
    found = run("-c", LOADED, **environment)
    assert all(text in found.stdout for text in told), (found.stdout, found.stderr)
    assert found.stdout.startswith("True" if "True" in told else "False")


def test_no_library_of_other_mathematics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "coefficient.py"
    changed.write_bytes(Path(coefficient.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(coefficient, "__file__", str(changed))
    there, why = rows_native.available()
    assert not there and "coefficient.py" in why


def test_chosen_for_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERL_BACKEND", raising=False)
    x, targets = torch.randn(2, 5), torch.tensor([0, 1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        served = dtype in rows_native.DTYPES
        assert dispatch.select_backend("auto", x, dtype) == ("native" if served else "torch")
        if not served:
            with refused("'native'", str(dtype), "fp32", "bf16", error=ValueError):
                token_logprobs(x.to(dtype), targets, backend="native")
        # Nothing of it is there without logits.
        assert dispatch.select_backend("native", x.to(dtype)) == "native"
    with (
        torch.autocast("cpu", torch.float16),
        refused("'native'", "torch.float16", error=ValueError),
    ):
        linear_token_logprobs(x, torch.randn(7, 5), targets, backend="native")
    with refused("'native'", "meta", error=ValueError):
        token_logprobs(x.to("meta"), targets.to("meta"), backend="native")
    monkeypatch.setattr(dispatch, "_NATIVE", (False, "no compiler"))
    assert dispatch.select_backend("auto", x, x.dtype) == "torch"
    with refused("'native'", "no compiler", error=ValueError):
        token_logprobs(x, targets, backend="native")
