"""The persistent forward against fp64 on small ragged shapes, interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from perl_kernels import linear_token_logprobs  # noqa: E402
from perl_kernels.triton_backend import head, persistent  # noqa: E402
from perl_kernels.triton_backend.persistent import (  # noqa: E402
    Tiling,
    persistent_logprobs,
    supported,
)
from tests.messages import refused  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

# Several tiles each way, several groups, and a ragged last one of each, at a tiny size.
SMALL = Tiling(rows=16, columns=32, depth=16, num_warps=4, num_stages=2, group=2)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("logprobs", "entropy", "lse")


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None

    def run(self, tiling: Tiling | None = SMALL) -> tuple[Tensor, Tensor, Tensor]:
        return persistent_logprobs(
            self.hidden,
            self.weight,
            self.targets,
            self.bias,
            self.temperature,
            self.softcap,
            _tiling=tiling,
        )

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """In plain PyTorch, the product in `dtype` and the rest in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        logits = (self.hidden.to(dtype) @ self.weight.to(dtype).T).to(wide)
        if self.bias is not None:
            logits = logits + self.bias.to(wide)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        tau = self.temperature
        scores = logits / (tau.to(wide)[:, None] if isinstance(tau, Tensor) else tau)
        log_probs = scores.log_softmax(1)
        chosen = log_probs.gather(1, self.targets.to(torch.int64)[:, None])[:, 0]
        return chosen, -(log_probs.exp() * log_probs).sum(1), scores.logsumexp(1)


def make(
    rows: int, vocab: int, features: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Case:
    return Case(
        hidden=(scale * torch.randn(rows, features)).to(DEVICE, dtype),
        weight=torch.randn(vocab, features).to(DEVICE, dtype),
        targets=torch.randint(0, vocab, (rows,), device=DEVICE),
    )


def check(case: Case, tiling: Tiling | None = SMALL) -> None:
    """At most twice the error of PyTorch in the same dtype, which rounds the logits."""
    truth = case.expected(torch.float64)
    theirs = case.expected(case.hidden.dtype)
    for name, got, plain, want in zip(NAMES, case.run(tiling), theirs, truth, strict=True):
        assert got.dtype == torch.float32, name
        assert got.shape == case.targets.shape, name
        allowed = 2 * (plain - want).abs().max() + 2e-6 * (1 + want.abs().max())
        error = (got - want).abs().max()
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "features"),
    [
        (16, 32, 16),  # one full tile
        (34, 75, 40),  # ragged each way, the last vocabulary tile in its first half
        (90, 123, 24),  # ragged each way, in its second half
        (5, 1, 8),  # one word
        (1, 33, 8),  # one word in the last tile
    ],
)
def test_shapes(rows: int, vocab: int, features: int, dtype: torch.dtype) -> None:
    check(make(rows, vocab, features, dtype))


@pytest.mark.parametrize("targets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_scores(
    bias: torch.dtype | None, softcap: float | None, per_row: bool, targets: torch.dtype
) -> None:
    case = make(21, 75, 24, torch.bfloat16)
    case.targets = case.targets.to(targets)
    if bias is not None:
        case.bias = torch.randn(75).to(DEVICE, bias)
    case.softcap = softcap
    case.temperature = torch.rand(21, device=DEVICE) + 0.5 if per_row else 0.7
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_rows(dtype: torch.dtype) -> None:
    case = make(37, 75, 16, dtype, scale=30.0)
    check(case)
    assert (case.run()[0] <= 0).all()


def test_all_logits_far_below_zero() -> None:
    case = make(9, 75, 16)
    case.bias = torch.full((75,), -1e4, device=DEVICE)
    check(case)


def test_targets_in_every_column() -> None:
    case = make(75, 75, 16)
    case.targets = torch.arange(75, device=DEVICE)
    check(case)


def test_no_rows() -> None:
    assert [tuple(x.shape) for x in make(0, 75, 16).run()] == [(0,)] * 3


def test_rows_of_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent, "_PARTS_BYTES", 1)
    case = make(37, 40, 16)
    case.temperature = torch.rand(37, device=DEVICE) + 0.5
    check(case)


def test_strided_rows() -> None:
    case = make(20, 75, 16, torch.bfloat16)
    case.hidden = torch.cat([case.hidden, case.hidden], 1)[:, :16]
    case.targets = torch.stack([case.targets, case.targets], 1)[:, 0]
    case.temperature = (torch.rand(40, device=DEVICE) + 0.5)[::2]
    check(case)


def test_targets_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    # What nothing was written to could hold plausible numbers.
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)
    case = make(20, 75, 16)
    want = case.run()
    bad = {2: -1, 3: 75, 17: -(2**40), 18: 2**32, 19: 95}
    for row, target in bad.items():
        case.targets[row] = target
    got = case.run()
    hit = torch.zeros(20, dtype=torch.bool, device=DEVICE)
    hit[list(bad)] = True
    torch.testing.assert_close(got[0], want[0].masked_fill(hit, torch.nan), equal_nan=True)
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2], want[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "bias", "last bias"])
def test_scores_that_are_not_finite(where: str, value: float) -> None:
    case = make(20, 75, 16)
    case.bias = torch.zeros(75, device=DEVICE)
    want = case.run()
    hit = torch.zeros(20, dtype=torch.bool, device=DEVICE)
    if where == "hidden":
        case.hidden[4, 3] = value
        hit[4] = True
    else:
        case.bias[74 if where == "last bias" else 7] = value
        hit[:] = True
    logprobs, entropy, _ = case.run()
    torch.testing.assert_close(logprobs, want[0].masked_fill(hit, torch.nan), equal_nan=True)
    torch.testing.assert_close(entropy, want[1].masked_fill(hit, torch.nan), equal_nan=True)


def test_every_score_of_a_tile_minus_infinity() -> None:
    case = make(20, 75, 16)
    case.bias = torch.zeros(75, device=DEVICE)
    case.bias[16:48] = -torch.inf
    logprobs, entropy, _ = case.run()
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_temperatures_that_are_not_usable(value: float) -> None:
    case = make(20, 75, 16)
    case.temperature = torch.ones(20, device=DEVICE)
    want = case.run()
    case.temperature[6] = value
    hit = torch.arange(20, device=DEVICE) == 6
    for got, expected in zip(case.run(), want, strict=True):
        torch.testing.assert_close(got, expected.masked_fill(hit, torch.nan), equal_nan=True)
    case.temperature = value
    assert all(x.isnan().all() for x in case.run())


def test_layouts_that_are_refused() -> None:
    case = make(4, 75, 16)
    assert supported(case.hidden, case.weight) is None
    shifted = torch.zeros(4 * 16 + 1, device=DEVICE)[1:].view(4, 16)
    for hidden, weight, *names in (
        (case.hidden.double(), case.weight.double(), "torch.float64"),
        (case.hidden.half(), case.weight, "hidden"),
        (case.hidden[:, :15], case.weight[:, :15].contiguous(), "weight", 16),
        (shifted, case.weight, "hidden", 16),
        (case.hidden.T.contiguous().T, case.weight, "hidden"),
        (case.hidden[:1].expand(4, 16), case.weight, "hidden"),
        (case.hidden, case.weight[:0], "weight"),
    ):
        with refused(*names, error=ValueError):
            persistent_logprobs(hidden, weight, case.targets, None, 1.0, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_full_size_tiles(extras: bool, dtype: torch.dtype) -> None:
    case = make(1337, 32003, 520, dtype, scale=0.2)
    if extras:
        case.bias = torch.randn(32003).to(DEVICE, dtype)
        case.temperature = torch.rand(1337, device=DEVICE) + 0.5
        case.softcap = 5.0
    check(case, tiling=None)


@pytest.mark.gpu
def test_other_sizes_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    make(100, 1000, 64, torch.bfloat16).run(None)
    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs)
    )
    for rows, vocab, features in [(1, 1, 8), (16, 16, 16), (129, 4096, 256), (640, 999, 72)]:
        case = make(rows, vocab, features, torch.bfloat16)
        case.temperature = 0.5 + vocab
        case.run(None)
    assert not compiled


def test_public_function_takes_it_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where no gradient is needed, and blocks of logits where the kernel cannot."""
    calls: list[int] = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(1)
        return persistent_logprobs(*arguments, _tiling=None if DEVICE == "cuda" else SMALL)

    monkeypatch.setattr(head, "persistent_logprobs", counted)
    hidden = torch.randn(9, 24, device=DEVICE)
    weight = torch.randn(50, 24, device=DEVICE)
    targets = torch.randint(0, 50, (9,), device=DEVICE)
    options = {"bias": torch.randn(50, device=DEVICE), "temperature": 0.8, "softcap": 4.0}
    wanted = linear_token_logprobs(hidden, weight, targets, backend="triton", **options)
    assert not calls
    monkeypatch.setenv("PERL_PERSISTENT", "1")
    found = linear_token_logprobs(hidden, weight, targets, backend="triton", **options)
    assert len(calls) == 1
    torch.testing.assert_close(tuple(found), tuple(wanted))
    linear_token_logprobs(hidden, weight, targets, backend="torch", **options)
    linear_token_logprobs(hidden.requires_grad_(), weight, targets, backend="triton", **options)
    assert len(calls) == 1
    # Rows of 23 numbers do not start at a multiple of 16 bytes.
    narrow = (hidden.detach()[:, :23].contiguous(), weight[:, :23].contiguous(), targets)
    found = linear_token_logprobs(*narrow, backend="triton", **options)
    wanted = linear_token_logprobs(*narrow, backend="torch", **options)
    assert len(calls) == 1
    torch.testing.assert_close(tuple(found), tuple(wanted))
