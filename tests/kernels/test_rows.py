"""Statistics and gradients of rows of logits on every backend, against numbers and fp64; in Triton
interpreted where there is no GPU. `test_machine_code.py` has what the compiler makes of them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_kernels import PolicyLoss, rows_native
from perl_kernels.values import Coefficients, LossInputs, Prepared, RowStats, Scoring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
LOWEST = torch.finfo(torch.float32).min
EPS = torch.finfo(torch.float32).eps
# Two blocks of columns and an end that is no multiple of anything.
LONG = 8192 + 333


@pytest.fixture(params=["torch", "native", "triton"])
def rows(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "native" and not (native := rows_native.available())[0]:
        pytest.skip(native[1])
    return importlib.import_module(f"perl_kernels.rows_{request.param}")


def scoring(targets: list[int] | Tensor, **fields: Any) -> Scoring:
    given = {"bias": None, "temperature": 1.0, "softcap": None, **fields}
    return Scoring(torch.as_tensor(targets, device=DEVICE), **given)


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def gradient(rows: Any, x: Tensor, how: Scoring, by: Any, by_entropy: Any = None) -> Tensor:
    by = tensor(by)
    coefficients = Coefficients(by, None if by_entropy is None else tensor(by_entropy))
    out = torch.full_like(x, 7.0)
    rows.row_gradient(x, how, rows.row_stats(x, how), coefficients, out)
    return out


def plain(x: Tensor, how: Scoring, by: Tensor, by_entropy: Tensor) -> list[Tensor]:
    """Log-prob, entropy and gradient, as PyTorch has them in the dtype of `x`."""
    logits = x.clone().requires_grad_()
    score = logits if how.bias is None else logits + how.bias.to(x.dtype)
    if how.softcap is not None:
        score = torch.tanh(score / how.softcap) * how.softcap
    tau = how.temperature
    logp = (score / (tau[:, None].to(x.dtype) if isinstance(tau, Tensor) else tau)).log_softmax(1)
    chosen = logp.gather(1, how.targets[:, None].long())[:, 0]
    entropy = -torch.where(logp == -INF, 0.0, logp.exp() * logp).sum(1)
    total = (by.to(x.dtype) * chosen).sum() + (by_entropy.to(x.dtype) * entropy).sum()
    return [chosen.detach(), entropy.detach(), torch.autograd.grad(total, logits)[0]]


def check(rows: Any, x: Tensor, how: Scoring) -> None:
    """As exact as PyTorch in fp32: twice its error, for gradients three times, and 8 units of what
    goes in."""
    by, by_entropy = torch.randn(2, len(x), device=DEVICE)
    out = torch.full_like(x, NAN, dtype=torch.float32)
    stats = rows.row_stats(x, how)
    rows.row_gradient(x, how, stats, Coefficients(by, by_entropy), out)
    wide = x.float() if how.bias is None else x.float() + how.bias.float()
    coldest = float(torch.as_tensor(how.temperature).min())
    score = 1 + float(wide[wide.isfinite()].abs().max()) / min(coldest, 1) + math.log(x.shape[1])
    truth = plain(x.double(), how, by, by_entropy)
    eager = plain(x.float(), how, by, by_entropy)
    size = float(by.abs().max() + by_entropy.abs().max() * score) / min(coldest, 1)
    ours = [stats.logprobs, stats.entropy, out]
    for k, unit, got, right, like in zip((2, 2, 3), (1, 1, size), ours, truth, eager, strict=True):
        allowed = k * (like - right).abs().max() + 8 * EPS * score * unit
        assert (got - right).abs().max() <= allowed


@pytest.mark.parametrize(
    ("row", "fields", "logprob", "entropy"),
    [
        ([0.0, 0.0, -INF], {}, -math.log(2), math.log(2)),
        ([-INF, -INF, 5.0], {}, -INF, 0.0),
        ([3.0], {}, 0.0, 0.0),
        ([0.0, LOWEST], {"temperature": 0.7}, 0.0, 0.0),
        ([LOWEST, LOWEST], {}, -math.log(2), math.log(2)),
        ([LOWEST, LOWEST], {"temperature": 0.7}, NAN, NAN),
        ([0.0, 1.0], {"bias": [0.0, -INF]}, 0.0, 0.0),
        ([0.0, -INF, INF], {"softcap": 2.0}, -2.1429317, 0.4410574),
        ([2.0, 1.0], {"softcap": 1e6, "temperature": [0.5]}, -0.126928, 0.3653345),
        (
            [math.log(3), 0.0],
            {"temperature": tensor([1.0], torch.float64)},
            math.log(0.75),
            0.5623351,
        ),
    ],
)
def test_numbers(
    rows: Any, row: list[float], fields: dict[str, Any], logprob: float, entropy: float
) -> None:
    fields = {k: tensor(v) if isinstance(v, list) else v for k, v in fields.items()}
    stats = rows.row_stats(tensor([row]), scoring([0], **fields))
    # tanh(2e-6) * 1e6 has an error of an ulp of the softcap.
    exact = 0.2 if fields.get("softcap") == 1e6 else 2e-7
    assert stats.logprobs.item() == pytest.approx(logprob, rel=exact, abs=2e-7, nan_ok=True)
    assert stats.entropy.item() == pytest.approx(entropy, rel=exact, abs=2e-7, nan_ok=True)


@pytest.mark.parametrize(
    ("row", "shift"), [([NAN, 0.0], None), ([INF, 0.0], None), ([-INF, -INF], -INF)]
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_broken_rows(rows: Any, row: list[float], shift: float | None, where: str) -> None:
    """The part of a vocabulary with nothing but -inf is told by its largest score."""
    x = torch.full((1, LONG), -INF if shift else 0.0, device=DEVICE)
    x[0, slice(0, 2) if where == "first" else slice(-2, None)] = tensor(row)
    stats = rows.row_stats(x, scoring([5]))
    assert stats.logprobs.isnan().all() and stats.entropy.isnan().all() and stats.log_sum.isnan()
    assert shift is None or stats.shift.item() == shift
    assert gradient(rows, x, scoring([5]), [1.0], [1.0]).isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, NAN])
def test_temperatures_that_are_none(rows: Any, temperature: float) -> None:
    tau = tensor([temperature, 1.0], torch.float64)
    stats = rows.row_stats(torch.zeros(2, 1024, device=DEVICE), scoring([0, 0], temperature=tau))
    assert stats.logprobs.isnan().tolist() == [True, False]
    assert stats.entropy.isnan().tolist() == [True, False]


def test_targets_that_are_no_column(rows: Any) -> None:
    x, how = torch.zeros(3, 2, device=DEVICE), scoring([2, -1, 2**40])
    stats = rows.row_stats(x, how)
    assert stats.logprobs.isnan().all()
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(2)))
    assert gradient(rows, x, how, [1.0, 2.0, 4.0]).tolist() == [[-0.5] * 2, [-1.0] * 2, [-2.0] * 2]


@pytest.mark.parametrize("by_entropy", [None, 0.5])
def test_gradient_where_a_score_is_infinite(rows: Any, by_entropy: float | None) -> None:
    x = tensor([[0.0, 0.0, -INF]])
    extra = None if by_entropy is None else [by_entropy]
    assert gradient(rows, x, scoring([0]), [1.0], extra).tolist() == [[0.5, -0.5, 0.0]]
    assert gradient(rows, x, scoring([2]), [1.0], extra).tolist() == [[-0.5, -0.5, 1.0]]


@pytest.mark.parametrize("place", [[0, 1], [LONG - 40, LONG - 1], [0, 9000 % LONG]])
def test_all_but_two_columns_masked(rows: Any, place: list[int]) -> None:
    """Blocks of nothing but -inf, before and after those with a score."""
    x = torch.full((1, LONG), -INF, device=DEVICE)
    x[0, place] = tensor([2.0, 2.0])
    how = scoring([place[1]])
    stats = rows.row_stats(x, how)
    assert stats.logprobs.item() == pytest.approx(-math.log(2), rel=1e-7)
    assert stats.entropy.item() == pytest.approx(math.log(2), rel=1e-7)
    got = gradient(rows, x, how, [1.0], [3.0])
    assert got[0, place].tolist() == pytest.approx([-0.5, 0.5], rel=1e-6)
    assert got.count_nonzero() == 2


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_idle_rows(rows: Any, in_place: bool, out_dtype: torch.dtype) -> None:
    x = torch.full((2, LONG), NAN, device=DEVICE, dtype=out_dtype if in_place else torch.float32)
    out = x if in_place else torch.full_like(x, NAN, dtype=out_dtype)
    stats = RowStats(*torch.full((4, 2), NAN, device=DEVICE))
    rows.row_gradient(x, scoring([1, 2]), stats, Coefficients(tensor([0.0, 0.0]), None), out)
    assert out.count_nonzero() == 0
    out.fill_(NAN)
    rows.row_gradient(
        x, scoring([1, 2]), stats, Coefficients(tensor([0.0] * 2), tensor([0.0, 1.0])), out
    )
    assert out[0].count_nonzero() == 0 and out[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "before", "after"), [(1, 0, 0), (13, 3, 2), (40, 1, 0)])
def test_rows_anywhere_in_memory(
    rows: Any, columns: int, before: int, after: int, dtype: torch.dtype
) -> None:
    """Whatever the address and the distance of the rows: the same numbers, nothing else written."""
    if rows is rows_native and dtype not in rows.DTYPES:
        pytest.skip("native rows are fp32 or bf16")
    memory = torch.full((5, before + columns + after), 7.0, dtype=dtype, device=DEVICE)
    x = memory[:, before : before + columns]
    x.copy_(torch.randn(5, columns))
    how = scoring(
        torch.arange(5, device=DEVICE) % columns, bias=torch.randn(columns, device=DEVICE)
    )
    by, extra = torch.randn(2, 5).tolist()
    whole = gradient(rows, x.clone(), how, by, extra)
    close: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    for narrow in (torch.float32, dtype):
        around = torch.full_like(memory, 7.0, dtype=narrow)
        out = around[:, before : before + columns]
        rows.row_gradient(
            x, how, rows.row_stats(x, how), Coefficients(tensor(by), tensor(extra)), out
        )
        torch.testing.assert_close(out.to(dtype), whole, **close)
        assert (around[:, :before] == 7).all() and (around[:, before + columns :] == 7).all()
    rows.row_gradient(x, how, rows.row_stats(x, how), Coefficients(tensor(by), tensor(extra)), x)
    torch.testing.assert_close(x, whole, **close)
    assert (memory[:, :before] == 7).all() and (memory[:, before + columns :] == 7).all()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)},
        {"softcap": 30.0},
        {"softcap": 1.5, "temperature": 0.7},
        {"bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "certain"])
def test_as_exact_as_pytorch(rows: Any, kind: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(3, LONG, device=DEVICE)
    if kind in ("rising", "falling"):
        # The largest score so far rises with every block, the hard case for running sums.
        x = x.sort(1, descending=kind == "falling").values
    if kind == "certain":
        x[:, 4321] = 45.0
    fields = dict(fields)
    if "bias" in fields:
        fields["bias"] = torch.randn(LONG, device=DEVICE)
    if isinstance(fields.get("temperature"), Tensor):
        fields["temperature"] = fields["temperature"].to(DEVICE)
    check(rows, x, scoring([4321, 0, LONG - 1], **fields))


def test_entropy_of_a_certain_row(rows: Any) -> None:
    """What a sum that cancels would lose."""
    x = torch.zeros(1, 4096, device=DEVICE)
    x[0, 7] = 25.0
    stats = rows.row_stats(x, scoring([7]))
    truth = rows.row_stats(x.double(), scoring([7])) if rows.__name__.endswith("torch") else None
    mass = 4095 * math.exp(-25.0)
    entropy = math.log1p(mass) + 25.0 * mass / (1 + mass)
    assert stats.entropy.item() == pytest.approx(entropy, abs=1.2e-7)
    assert truth is None or truth.entropy.item() == pytest.approx(entropy, rel=1e-9)


OBJECTIVE = PolicyLoss(
    surrogate="dppo_kl",
    kl="k3",
    kl_coef=0.1,
    kl_bias_correction=True,
    entropy_coef=0.1,
    correction="token_mask",
)


def test_columns_apart(rows: Any) -> None:
    x = torch.randn(40, 3, device=DEVICE).t()
    how, by = scoring([0, 1, 39]), tensor([1.0, -2.0, 0.5])
    prepared = Prepared(-by, torch.ones_like(by), tensor(1).bool())
    found = []
    for tile in (x, x.contiguous()):
        outs = torch.full_like(tile, NAN), torch.full_like(tile, NAN)
        assert outs[0].stride() == tile.stride()
        rows.row_gradient(tile, how, rows.row_stats(tile, how), Coefficients(by, None), outs[0])
        bounds = tensor([0, 3])
        rows.row_loss(tile, how, PolicyLoss(), prepared, LossInputs(bounds), outs[1])
        found.append(outs)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [PolicyLoss(), OBJECTIVE, PolicyLoss(entropy_coef=0.1)])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, None])
def test_loss_is_statistics_coefficients_and_gradient(
    rows: Any, loss: PolicyLoss, given: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 77, device=DEVICE)
    how = scoring([0, 76, 3, 9, 11], temperature=0.8, softcap=5.0)
    stats = rows.row_stats(x, how)

    def near() -> Tensor | None:
        if given is None:
            return None
        # Every second of a longer tensor.
        wide = torch.full((10,), NAN, dtype=given, device=DEVICE)
        wide[::2] = stats.logprobs + 0.1 * torch.randn(5, device=DEVICE)
        return wide[::2]

    scale = tensor([0.5, 0.0, 0.25, 1.0, 0.125])
    prepared = Prepared(tensor([1.0, NAN, -2.0, 0.5, 0.0]), scale, tensor(1).bool())
    inputs = LossInputs(tensor([0, 5]), old=near(), ref=near(), rollout=near())
    if given is None and loss is OBJECTIVE:
        pytest.skip("needs reference and rollout")
    reference = importlib.import_module("perl_kernels.rows_torch")
    right = reference.row_coefficients(loss, stats.logprobs, prepared, inputs)
    want = torch.empty_like(x)
    rows.row_gradient(x, how, stats, right, want)
    out = torch.full_like(x, NAN)
    found, coefficients = rows.row_loss(x, how, loss, prepared, inputs, out)
    alone, again = rows.row_loss(x, how, loss, prepared, inputs, None)
    for got in (coefficients, again):
        torch.testing.assert_close(got.logprobs, right.logprobs, rtol=2e-6, atol=1e-8)
        assert (got.entropy is None) == (right.entropy is None)
        if right.entropy is not None:
            torch.testing.assert_close(got.entropy, right.entropy, rtol=1e-7, atol=0)
    for got in (found, alone):
        torch.testing.assert_close(tuple(got), tuple(stats), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(out, want, rtol=2e-6, atol=1e-7)
    assert out[1].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 1, 16])
@pytest.mark.parametrize("after", [0, 3, 32])
def test_what_the_compiler_is_promised(
    before: int, after: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address said to be a multiple of so many bytes is one: on a GPU another one would fault."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if DEVICE == "cuda":
        pytest.skip("seen by the interpreter only")
    rows = importlib.import_module("perl_kernels.rows_triton")
    promised: list[bool] = []

    def set_attr(self: Any, name: str, values: list[int]) -> None:
        if name == "tt.divisibility":
            promised.append(bool((self.data % values[0] == 0).all()))

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    x = torch.zeros(3, before + 48 + after, dtype=dtype)[:, before : before + 48]
    how = scoring([0, 1, 2], bias=torch.zeros(52)[4 * (before > 0) :][:48])
    stats = rows.row_stats(x, how)
    by = Coefficients(tensor([1.0, 0.0, 2.0]), None)
    for out in (
        x,
        torch.zeros(3, 48),
        torch.zeros(3, 64, dtype=dtype)[:, :48],
        torch.zeros(3, 49)[:, 1:],
    ):
        rows.row_gradient(x, how, stats, by, out)
    assert all(promised) and len(promised) >= 3 + 4 * 3


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5000), (3, 2, 5)])
def test_scaling_in_place(shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    rows = importlib.import_module("perl_kernels.rows_triton")
    for x in (torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)[..., 1:]):
        want = x * 2.5
        rows.scale_(x, tensor(1.0))
        rows.scale_(x, tensor(2.5))
        assert torch.equal(x, want)
    # Where 1.0004 would be 1.
    wide = torch.linspace(1, 2, 64, dtype=torch.float16, device=DEVICE)
    for x in (wide.clone(), wide[::2]):
        want = (x.float() * 1.0004).to(x.dtype)
        rows.scale_(x, tensor(1.0004))
        assert torch.equal(x, want)
