"""From a call to a published number: what is proven, what is timed, and which median, bound and fraction become of it."""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases.attention import Heads, Piece
from benchmarks.cases.attention import _contest as attention
from benchmarks.harness import device, options
from benchmarks.harness.contest import (  # fmt: skip
    Contest,
    Inputs,
    Problem,
    Provider,
    Refused,
    Run,
    Unavailable,
    Work,
)
from benchmarks.harness.device import Peaks, measure_peaks, peak_memory
from benchmarks.harness.head_problem import (
    Head,
    HeadProblem,
    LogitsLogprobsProblem,
    LogitsProblem,
    LogprobsProblem,
    head,
    logprobs_by_blocks,
    make_problem,
)
from benchmarks.harness.models import counting
from benchmarks.harness.proof import Difference, GradientProof, Proven, allowance, difference
from benchmarks.harness.race import Race, median_seconds, prove
from benchmarks.harness.results import Findings, Row
from benchmarks.providers import LINEAR_LOSS
from benchmarks.report.results_file import Results
from perl.types import UserError
from tests.messages import refused, tells

CPU = torch.device("cpu")


def nothing() -> Run:
    return Run(lambda: None)


def contest(*providers: Provider, **fields: Any) -> Contest:
    values = {"op": "op", "case": "case", "shape": {"N": 4}, "host": True}
    problem = fields.pop("problem", Inputs(None, lambda _: None))
    return Contest(**{**values, "problem": lambda _: problem, "providers": providers, **fields})


# Numbers of a row.


def test_a_row_has_the_median_of_all_rounds_and_its_share_of_the_bound(tmp_path: Path) -> None:
    work = Work(flops=12e9, bytes=3e9)
    peer = Provider("theirs", lambda p: nothing(), "torch", "a note")
    of = contest(peer, work=work, axis="N")
    row = Row(of, peer, "timed", error=0.5, turns=[[1.0, 1.0], [2.0, 10.0, 4.0]])
    row.peak_extra_bytes = 77
    out = Row(of, Provider("ours", lambda p: nothing()), "missing", "no GPU")
    # 3 seconds of bytes are longer than 2 of operations, and the median is 2.
    findings = Findings(CPU, [row, out], Peaks(1e9, 6e9, "float32"))
    findings.write(tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    found, missing = written["rows"]
    assert found == {
        "op": "op", "case": "case", "shape": {"N": 4}, "axis": "N", "provider": "theirs",
        "package": f"torch {version('torch')}", "ours": False, "note": "a note", "status": "timed",
        "reason": "", "flops": 12e9, "bytes": 3e9, "median": 2.0, "error": 0.5, "bound": 3.0,
        "turns": [[1.0, 1.0], [2.0, 10.0, 4.0]], "peak_extra_bytes": 77, "fraction": 1.5,
    }  # fmt: skip
    assert missing.keys().isdisjoint({"median", "turns", "bound", "fraction"})
    assert (missing["ours"], missing["package"], missing["reason"]) == (True, "", "no GPU")
    assert written["peaks"] == {"bytes_per_s": 1e9, "flops_per_s": 6e9, "dtype": "float32"}
    extra = {"schema": 1, "date": "", "commit": "", "mode": "", "minutes": 1}
    assert Results.model_validate(written | extra).rows[0].fraction == 1.5
    row.out("failed", "later")  # What was timed stays.
    assert (row.status, row.median, row.run) == ("timed", 2.0, None)


@pytest.mark.parametrize(
    ("work", "seconds"), [(Work(12, 2), 2.0), (Work(6, 3), 3.0), (Work(), 0.0)]
)  # fmt: skip
def test_the_bound_is_the_longer_of_operations_and_bytes(work: Work, seconds: float) -> None:
    assert Peaks(bytes_per_s=1, flops_per_s=6, dtype="").seconds(work) == seconds


def test_peaks_are_rates_of_a_copy_and_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(device, "_median", lambda run: next(seconds))
    found = measure_peaks(CPU)
    # 256 MiB read and written in half a second; 2 n^3 operations in a quarter.
    assert found == Peaks(2**29 / 0.5, 2 * 2048**3 / 0.25, "float32")


def test_peak_memory_is_the_most_at_one_time() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(2**18)
        second = torch.zeros(2**18)
        del first
        return torch.cat([second, torch.zeros(2**18)])

    held = torch.zeros(2**20)  # Before the run, so no part of it.
    # Of pieces of 1 MiB: the second, one more, and both together.
    assert peak_memory(run, CPU)[1] == 4 * 2**20 and len(held)


@pytest.mark.parametrize(
    ("kind", "frozen", "work"),
    [
        (HeadProblem, False, Work(180, 84)),  # 6 NHV; twice 6 + 15 elements of 2 bytes.
        (HeadProblem, True, Work(120, 54)),  # 4 NHV; no gradient of the weight.
        (LogprobsProblem, False, Work(60, 58)),  # 2 NHV; 6 + 15 elements, two floats a row.
        (LogitsProblem, False, Work(0, 40)),  # 10 logits in and out.
        (LogitsLogprobsProblem, False, Work(0, 36)),
    ],
)
def test_the_least_work_of_a_head(kind: type[HeadProblem], frozen: bool, work: Work) -> None:
    assert kind.work(Head("", N=2, H=3, V=5, itemsize=2), frozen) == work


def test_the_least_work_of_attention() -> None:
    found = attention("", [Piece(3), Piece(2, 0, 2)], Heads(4, 2, 8))
    # 6 + (3 + 2 * 2) pairs, 6 products of 2 operations, 4 heads of 8.
    assert found.work == Work(13 * 12 * 32)


def test_heads_of_models() -> None:
    assert head("Qwen2.5-VL-3B", 7, 2) == Head("Qwen2.5-VL-3B", 7, 2048, 151_936, 2)
    assert head("Qwen2.5-VL-3B", 7, 4, fraction=8) == Head("Qwen2.5-VL-3B / 8", 7, 256, 18_992, 4)


# What is compared with what.


def test_the_loss_that_all_compute() -> None:
    """Two completions of two tokens, with ratios 1.5, 0.5, 1 and 1.1 and a reference twice as sure."""
    ratios = torch.tensor([1.5, 0.5, 1.0, 1.1], dtype=torch.float64)
    new = torch.full((4,), -1.0, dtype=torch.float64)
    small = make_problem(HeadProblem, Head("", N=4, H=2, V=3, itemsize=4), CPU)
    given = {"old": new - ratios.log(), "ref": new + math.log(2)}
    problem = replace(small, **given, advantages=torch.tensor([1.0, -2.0], dtype=torch.float64))
    # -(1.2 + 0.5 - 2 - 2.2) / 4, and half of 2 - log 2 - 1.
    token = 0.625 + 0.5 * (1 - math.log(2))
    assert float(problem.loss(new)) == pytest.approx(token, rel=1e-12)
    # Geometric means of the ratios, and no KL term.
    sequence = -(0.75**0.5 - 2 * 1.1**0.5) / 2
    assert float(replace(problem, level="sequence").loss(new)) == pytest.approx(sequence, rel=1e-12)


def test_the_truth_is_the_losss_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of three rows, against autograd on all logits."""
    monkeypatch.setattr("benchmarks.harness.head_problem._BLOCK_BYTES", 3 * 8 * 11)
    for kind in (HeadProblem, LogitsProblem):
        p = make_problem(kind, Head("", N=8, H=4, V=11, itemsize=4), CPU)
        hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
        logits = p.logits.double() if kind is LogitsProblem else hidden @ weight.T
        logits = logits.requires_grad_()
        log_p = logits.log_softmax(1)
        loss = p.loss(log_p.gather(1, p.targets[:, None])[:, 0])
        inputs = {"grad hidden": hidden, "grad weight": weight}
        inputs = {"grad logits": logits} if kind is LogitsProblem else inputs
        wanted = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
        wanted |= {"loss": loss.detach(), "entropy": -(log_p.exp() * log_p).sum(1).detach()}
        found = p.expected(torch.float64)
        assert found.keys() == wanted.keys()
        for name, exact in wanted.items():
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-9)


def test_a_difference_is_of_maximum_norm_and_scale() -> None:
    exact = torch.tensor([1.0, 2.0, 3.0])
    found = difference(torch.tensor([1.0, 2.0, 4.0]), exact)
    assert found == pytest.approx((1 / 3, 1 / math.sqrt(14), 3 / 14))
    # Of what is all below the noise: as if each element were the noise.
    assert difference(exact + 1, exact, noise=10.0) == pytest.approx(
        (1 / 10, math.sqrt(3 / 300), 6 / 300)
    )
    assert difference(exact * 0, exact * 0) == (0, 0, 0)
    assert difference(exact, exact * 0) == (math.inf,) * 3
    with refused("(2,)", "(3,)", error=Refused):
        difference(exact[:2], exact)


def test_what_may_be_off_grows_with_what_pytorch_loses() -> None:
    lost = Difference(0.1, 0.2, 0.3)
    found = allowance(lost, elements=4, eps=0.01, k=2, k_scale=3, floor=0.5)
    # 2 lost + 16 eps; 2 lost + floor; 3 (lost + norm / sqrt 4) + floor.
    assert found == pytest.approx((0.36, 0.9, 1.7))
    assert allowance(lost, 1, 0.01, 2, 3, 0.5).most == math.inf
    for part in range(3):
        more = [*found]
        more[part] *= 1.01
        assert Difference(*found).excess(found) == "" != Difference(*more).excess(found)
    assert Difference(0, math.nan, 0).excess(found)


class Ones(Proven):
    """`out` and `grad x` are ones, of which plain PyTorch loses every second one by 1e-4, up and down."""

    dtype = torch.float32

    def expected(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        off = 0.0 if dtype == torch.float64 else 1e-4
        return {"out": self.turned(off, dtype), "grad x": self.turned(off, dtype)}

    def turned(self, off: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([1 + off, 1 - off, 1 + off, 1 - off], dtype=dtype)


@pytest.mark.parametrize(
    ("name", "slack", "turned", "scaled"),
    [("out", 1, 2e-4, 5e-5), ("grad x", 1, 3e-4, 5e-5), ("out", 4, 7.9e-4, 2e-4)],
)
def test_values_may_lose_twice_and_gradients_thrice_what_pytorch_loses(
    name: str, slack: float, turned: float, scaled: float
) -> None:
    """And a peer four times that; a factor no more than half of what is lost of the norm."""
    ones = Ones()
    right = ones.expected(torch.float64)
    factor = right["out"] * (1 + scaled)
    for off, more, said in ((ones.turned(turned), 1.02, "maximum"), (factor, 1.2, "scale")):
        worst = ones.prove({**right, name: off}, slack=slack)
        assert worst == pytest.approx(float((off - 1).abs().max()))
        beyond = 1 + more * (off - 1)
        with refused(name, said, error=Refused):
            ones.prove({**right, name: beyond}, slack=slack)


def test_all_results_are_proven_but_those_left_out_openly() -> None:
    ones = Ones()
    right = ones.expected(torch.float64)
    part = {"out": right["out"]}
    assert ones.prove(part, omits=frozenset({"grad x"})) == 0
    for results in (part, {**right, "more": right["out"]}):
        with refused("grad x", error=Refused):
            ones.prove(results)
    with refused("out", error=Refused):
        ones.prove({**right, "out": right["out"] * math.nan})
    ones.turned = lambda off, dtype: torch.ones(4, dtype=dtype) + 9 * off  # type: ignore[method-assign]
    del ones.truth
    with refused("out", error=Unavailable):
        ones.find_truth()


def test_gradients_of_a_step_may_differ_by_a_thousandth_or_thrice_bfloat16s_loss() -> None:
    exact = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
    proof = GradientProof(exact)
    turned = torch.tensor([1.0, -1.0, 1.0, -1.0])
    near = {**exact, "b": exact["b"] + 0.0019 * turned}
    assert proof.check(near, "our", "theirs")["b"].most == pytest.approx(0.95e-3, rel=1e-2)
    with refused("our", "b", "theirs", error=AssertionError):
        proof.check({**exact, "b": exact["b"] + 0.0021 * turned}, "our", "theirs")
    with refused("b", error=AssertionError):
        proof.check({"a": exact["a"]}, "our", "theirs")
    # In bfloat16 the reference is itself off by 2 %, up and down: 6 % of the norm, and a little.
    half = GradientProof({**exact, "a": exact["a"] + 0.02 * turned}, exact)
    assert half.allowed["a"].norm == pytest.approx(0.064)
    half.check({**exact, "a": exact["a"] + 0.08 * turned}, "our", "theirs")
    with refused("a", error=AssertionError):
        half.check({**exact, "a": exact["a"] + 0.09 * turned}, "our", "theirs")


@pytest.mark.parametrize("factor", [1.01, 0.98])
def test_a_factor_is_refused_in_sixteen_bits(factor: float) -> None:
    """Where single elements are rounded by more than that."""
    problem = in_bfloat16()
    right = plain(problem)
    assert problem.prove(right) > 0.01
    for name in right:
        with refused(name, error=Refused):
            problem.prove({**right, name: right[name] * factor})


def test_a_missing_term_is_refused_in_sixteen_bits() -> None:
    problem = in_bfloat16()
    present, _ = logprobs_by_blocks(problem.hidden, problem.weight, problem.targets)
    with refused("loss", error=Refused):
        problem.prove({**plain(problem), "loss": plain(replace(problem, ref=present))["loss"]})
    sparse = plain(problem)
    small = sparse["grad weight"].abs() < 0.1 * sparse["grad weight"].abs().max()
    with refused("grad weight", error=Refused):
        problem.prove({**sparse, "grad weight": sparse["grad weight"].masked_fill(small, 0.0)})


def in_bfloat16() -> HeadProblem:
    problem = make_problem(HeadProblem, Head("none", N=256, H=128, V=2048, itemsize=2), CPU)
    hidden, weight = (
        x.detach().bfloat16().requires_grad_() for x in (problem.hidden, problem.weight)
    )
    return replace(problem, hidden=hidden, weight=weight)


def plain(problem: HeadProblem) -> dict[str, torch.Tensor]:
    """What eager PyTorch gives."""
    (eager,) = (p for p in LINEAR_LOSS if p.name == "PyTorch, eager")
    return eager.prepare(problem).call()


class Watched(Problem):
    def __init__(self, name: str = "") -> None:
        self.name, self.seen = name, []

    def prove(self, results: Any, omits: frozenset[str] = frozenset(), slack: float = 1.0) -> float:
        self.seen.append((results, omits, slack))
        return 0.25


@pytest.mark.parametrize(("package", "slack"), [("", 1.0), ("torch", 4.0)])
def test_what_is_proven_is_what_was_read_of_a_call(package: str, slack: float) -> None:
    """After a reset, of the problem that the provider was asked; a peer may round four times as much."""
    given, asked, steps = Watched(), Watched("asked"), []

    def prepare(problem: Watched) -> Run:
        steps.append(problem.name)
        return Run(lambda: steps.append("call"), lambda: steps.append("reset"), lambda _: "read")

    provider = Provider("p", prepare, package, omits=frozenset("x"), asked=lambda p: asked)
    row = Row(contest(provider), provider)
    prove(row, given, CPU)
    assert steps == ["asked", "reset", "call"] and not given.seen
    assert asked.seen == [("read", frozenset("x"), slack)] and row.error == 0.25


# Turns.


class Clock:
    """Seconds that pass only as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def wait() -> None:
            self.now += seconds

        return wait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = SimpleNamespace(perf_counter=clock, monotonic=clock)
    monkeypatch.setattr("benchmarks.harness.race.time", times)
    monkeypatch.setattr("benchmarks.harness.race.clock", lambda device: clock)
    return clock


class Fixture:
    """What a race asks of pytest-benchmark's: runs the rounds, and gives the seconds of each call."""

    enabled, group = True, ""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.clock = clock

    def pedantic(self, run: Callable[[], Any], **how: Any) -> None:
        self.how = how
        found = []
        for _ in range(how.get("rounds", 1)):
            if how.get("setup"):
                how["setup"]()
            start = self.clock()
            for _ in range(how.get("iterations", 1)):
                run()
            found.append((self.clock() - start) / how.get("iterations", 1))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=found))


def race(budget: float = 0.1, minutes: float | None = None, on: torch.device = CPU) -> Race:
    return Race(Findings(on, peaks=Peaks(1.0, 1.0, "float32")), budget, minutes, lambda line: None)


@pytest.mark.parametrize(
    ("seconds", "reset", "warm_up", "rounds", "calls"),
    [
        (0.05, False, 1, 2, 1),
        (0.0005, False, 1, 50, 4),  # A round takes 2 ms at least.
        (0.0005, True, 1, 50, 1),  # What a call has used up is restored before each.
        (0.3, False, 0, 1, 1),
    ],
)
def test_a_turn_has_as_many_rounds_as_its_seconds_hold(
    seconds: float, reset: bool, warm_up: int, rounds: int, calls: int, clock: Clock
) -> None:
    resets: list[float] = []
    run = Run(clock.takes(seconds), (lambda: resets.append(clock.now)) if reset else None)
    provider = Provider("p", lambda p: run)
    running, fixture = race(), Fixture(clock)
    running.run(contest(provider), provider, fixture)
    assert (fixture.how["warmup_rounds"], fixture.how["rounds"]) == (warm_up, rounds)
    assert fixture.how["iterations"] == calls
    (row,) = running.findings.rows
    assert row.turns == [pytest.approx([seconds] * rounds)] and row.status == "timed"
    assert len(resets) == (2 + rounds) * reset  # To prove, to try out, before each round.


def test_each_provider_is_proven_once_and_timed_at_each_turn(clock: Clock) -> None:
    proofs, running = [], race()

    def provider(name: str, *seconds: float) -> Provider:
        spans = iter(seconds)

        def prepare(_: Any) -> Run:
            proofs.append(name)
            return Run(lambda: clock.takes(next(spans))())

        return Provider(name, prepare)

    # A call to prove, one to try out, and one a turn.
    both = provider("a", 9, 1, 1, 2), provider("b", 9, 1, 10, 20)
    slow = provider("slow", 9, 3, 30, 40)
    of = contest(*both, slow)
    for _ in range(2):
        for one in of.providers:
            with suppress(pytest.skip.Exception):
                running.run(of, one, Fixture(clock))
    assert proofs == ["a", "b", "slow"]
    found = {row.provider.name: row.turns for row in running.findings.rows}
    # Calls of more than two seconds have one turn.
    assert found == {"a": [[1], [2]], "b": [[10], [20]], "slow": [[30]]}


def test_a_wrong_result_of_ours_fails_and_a_peers_is_a_row() -> None:
    def wrong(_: Any) -> None:
        raise AssertionError("lost")

    ours, peer = Provider("ours", lambda p: nothing()), Provider("peer", lambda p: nothing(), "x")
    of, running = contest(ours, peer, problem=Inputs(None, wrong)), race()
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as failed:
        running.run(of, ours, Fixture())
    assert failed.type is pytest.fail.Exception
    tells(failed.value, "op", "case", "ours", "lost")
    with pytest.raises(pytest.skip.Exception):
        running.run(of, peer, Fixture())
    found = [(row.status, row.reason, row.turns) for row in running.findings.rows]
    assert found == [("refused", "lost", [])] * 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unavailable, "missing"), (ImportError, "missing"), (torch.OutOfMemoryError, "out of memory"), (ValueError, "failed")],
)  # fmt: skip
def test_why_there_is_no_time(error: type[Exception], status: str) -> None:
    def prepare(_: Any) -> Run:
        raise error("this\nand more")

    provider, running = Provider("peer", prepare, "x"), race()
    with pytest.raises(pytest.skip.Exception):
        running.run(contest(provider), provider, Fixture())
    (row,) = running.findings.rows
    tells(row.reason, "this")
    assert row.status == status and "more" not in row.reason


def test_what_would_begin_too_late_is_left_out(clock: Clock) -> None:
    """A case that has begun goes on for 30 seconds, a second turn does not."""
    providers = [
        Provider(str(n), lambda p, n=n: Run(clock.takes(n)), package="x") for n in (9, 10, 11)
    ]
    running, of = race(minutes=0.5), contest(*providers)
    for one in (*providers, *providers):
        with suppress(pytest.skip.Exception):
            running.run(of, one, Fixture(clock))
    with suppress(pytest.skip.Exception):
        running.run(contest(providers[0], case="next"), providers[0], Fixture(clock))
    rows = running.findings.rows
    # Three calls each: over after 30 of 27 + 30 + 33 seconds, and for good after 60.
    assert [(row.status, len(row.turns)) for row in rows] == [
        ("timed", 1), ("timed", 1), ("timed", 1), ("left out", 0),
    ]  # fmt: skip
    tells(rows[-1].reason, "--minutes")


class Dead(RuntimeError):
    """As of a GPU after a bad access."""


def test_who_breaks_the_device_is_named_and_what_was_timed_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU does nothing more after a bad access; its errors are then everybody's."""
    broken = []

    def synchronize() -> None:
        if broken:
            raise Dead("an illegal memory access was encountered")

    def peer() -> None:
        broken.append(True)
        raise Dead("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    running = race(0.001, on=torch.device("cuda"))
    providers = [
        Provider("ours", lambda p: nothing()),
        Provider("theirs", lambda p: Run(peer), "torch"),
        Provider("after", lambda p: nothing()),
    ]
    contests = [contest(*providers, case=case) for case in "ab"]
    for of in (contests[0], contests[0], contests[1]):
        for provider in providers:
            with suppress(pytest.skip.Exception):
                running.run(of, provider, Fixture())
    found = {(r.contest.case, r.provider.name): r for r in running.findings.rows}
    assert found["a", "ours"].status == "timed"
    assert found["a", "theirs"].status == "failed"
    for key in (("a", "after"), ("b", "ours"), ("b", "theirs")):
        assert found[key].status == "left out"
        tells(found[key].reason, "theirs")


def test_a_median_of_calls_is_without_the_first_and_without_resets(clock: Clock) -> None:
    spans = iter([100.0, 1.0, 5.0, 2.0])
    run = Run(lambda: clock.takes(next(spans))(), clock.takes(1000.0))
    row = Row(contest(), Provider("p", lambda p: run), run=run)
    assert median_seconds(row, CPU, calls=3) == 2


# What enters a model, and options.


class Part(torch.nn.Module):
    def forward(self, *_: Any, **__: Any) -> None: ...


class Decoder(torch.nn.Module):
    """Its first layer's projection runs twice with gradients, as if it were checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].self_attn = torch.nn.Module()
        self.layers[0].self_attn.q_proj = Part()

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> None:
        hidden = input_ids[..., None] if inputs_embeds is None else inputs_embeds
        for _ in range(1 + torch.is_grad_enabled()):
            self.layers[0].self_attn.q_proj(hidden)


def test_tokens_and_images_are_counted_where_they_enter() -> None:
    core = torch.nn.Module()
    core.language_model, core.visual = Decoder(), Part()
    wanted = [True]
    with counting(core, lambda: wanted[0]) as counts:
        for rows, width in ((2, 5), (3, 7)):
            core.language_model(inputs_embeds=torch.zeros(rows, width, 4))
        core.visual(torch.zeros(1), torch.ones(3, 3))
        with torch.no_grad():
            core.language_model(input_ids=torch.zeros(4, 9), inputs_embeds=None)
            # A token of each of 6 completions, as PeRL decodes.
            core.language_model.layers[0].self_attn.q_proj(torch.zeros(6, 4))
            core.visual(torch.zeros(1), grid_thw=torch.ones(2, 3))
        wanted[0] = False
        core.language_model(inputs_embeds=torch.zeros(50, 50, 4))
        core.visual(torch.zeros(1), torch.ones(3, 3))
    core.language_model(inputs_embeds=torch.zeros(5, 5, 4))
    assert counts.lm_tokens == {"update": 10 + 21, "generation": 36 + 6}
    assert counts.images == {"update": 3, "generation": 2}
    assert counts.largest == 21


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_a_count_is_a_positive_whole_number(text: str) -> None:
    with refused(text, error=ArgumentTypeError) if text else pytest.raises(ArgumentTypeError):
        options.count(text)
    assert options.count("3") == 3


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "many"])
def test_a_positive_number_is_finite(text: str) -> None:
    with refused(text, error=ArgumentTypeError):
        options.positive(text)
    assert options.positive("0.5") == 0.5


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x"), 2), (OSError("x"), 2), (AssertionError("x"), 1)]
)
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert options.exit_code(fail) == code
    assert capsys.readouterr().err.startswith("error: x")
    assert options.exit_code(lambda: 7) == 7


@pytest.mark.parametrize("file", ["/nowhere/report.json", "/dev/null", 300 * "x"])
def test_a_report_needs_a_place(file: str) -> None:
    with refused("--json", file):
        options.check_writable(Path(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with refused("--device", "cuda"):
        options.device_of("cuda")
    assert options.device_of(None) == "cpu"
