"""The benchmarks run, none of them times a wrong result, and one command writes what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")


from benchmarks.harness.contest import Contest, Inputs, Provider, Refused, Run
from benchmarks.harness.device import Peaks
from benchmarks.harness.head_problem import Head, HeadProblem, logprobs_by_blocks, make_problem
from benchmarks.harness.race import Race
from benchmarks.harness.results import Findings
from benchmarks.providers import LINEAR_LOSS

ROOT = Path(__file__).parents[2]

# Each mistake is small or of a kind that looks fast: it must be the proof that finds it. The last is a peer's.
PLANTED = """
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    import perl.model.packed.sdpa, perl.model.packed.plan, perl.permutation, perl.model.vision, perl_kernels
    import torch
    from perl.model.packed.layout import PackedLayout

    loss, plan = perl_kernels.linear_grpo_loss, perl.model.packed.plan.plan
    attention, permute = perl.model.packed.sdpa.sdpa, perl.permutation.permute
    advantages, chunked = perl_kernels.group_advantages, torch.nn.functional.linear_cross_entropy

    def scaled_loss(*args, **kwargs):
        output = loss(*args, **kwargs)
        return output._replace(loss=output.loss * 1.001)

    def across_pieces(query, key, value, layout, how):
        whole = PackedLayout.from_cu_seqlens(torch.tensor([0, layout.tokens]))
        return attention(query, key, value, whole, how)

    def population(*args, **kwargs):
        return advantages(*args, unbiased=False, **kwargs)

    perl_kernels.linear_grpo_loss = scaled_loss
    perl_kernels.group_advantages = population
    perl.model.packed.sdpa.sdpa = across_pieces
    perl.model.packed.plan.plan = lambda lengths, budget: plan(lengths, budget)[:-1]
    perl.permutation.permute = lambda example, order: permute(example, range(len(order)))
    torch.nn.functional.linear_cross_entropy = lambda *args, **kwargs: (
        1.001 * chunked(*args, **kwargs)
    )
"""
REFUSED = {
    ("Linear GRPO loss, forward and backward", "PeRL, PyTorch"): "loss: off by",
    ("Linear GRPO loss, forward and backward", "PyTorch, F.linear_cross_entropy"): "off by",
    ("Packed attention, forward and backward", "PeRL, sdpa"): "out: off by",
    ("Advantages of groups", "PeRL, PyTorch"): "advantages: off by",
    ("Plan of packed rows", "PeRL"): "a completion is lost",
    ("An example in another order", "PeRL"): "images do not stand in the order",
}
PLANTED_CASES = (
    "(linear_loss and 256 and not frozen and not sequence or attention and equal"
    " or advantages and groups-of-4-P or Plan and 64 or another-order-4) and not compile"
)

# What a user's machine has; beside other tests pytest-benchmark would not measure.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--device=cpu", "--threads=1", "--quick", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments],
        env=ENVIRONMENT | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(0)  # However long others keep the machine busy.
@pytest.mark.parametrize(
    ("chosen", "ops"),
    [
        ("linear_loss", 1),
        ("logits_loss or logprobs", 3),
        ("attention or advantages", 2),
        ("packing or permutation or preprocessing", 5),
        # Of a series of sizes the ends that are small.
        ("growth and (N-64 or N-256 or V-2048 or H-32 or H-512)", 1),
        ("Training-step and (step-2-images or step-4-images-2-orders-1-rollouts)", 1),
    ],
)
def test_every_benchmark_proves_its_result(chosen: str, ops: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("--benchmark-disable", "-k", f"({chosen}) and not compile", f"--results={file}")
    assert done.returncode == 0, done.stdout
    rows = json.loads(file.read_text())["rows"]
    ours = [row for row in rows if row["ours"]]
    assert len({row["op"] for row in rows}) == ops
    assert not [row for row in rows if row["status"] in ("refused", "failed", "left out")]
    # What is of this repository takes part everywhere, but for what needs a GPU.
    assert {row["case"] for row in ours if row["status"] == "proven"} == {r["case"] for r in rows}


def test_a_wrong_implementation_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    file = tmp_path / "rows.json"
    options = ("-pplanted", "--budget=0.001", f"--results={file}")
    done = bench(*options, "-k", PLANTED_CASES, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout
    rows = json.loads(file.read_text())["rows"]
    refused = {(r["op"], r["provider"]): r["reason"] for r in rows if r["status"] == "refused"}
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[key] in reason for key, reason in refused.items())
    assert not any("median" in r or "turns" in r for r in rows if r["status"] == "refused")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    # A peer that is wrong is a row; what is wrong here fails.
    assert len(failed) == len(REFUSED) - 1
    timed = {(r["op"], r["provider"]) for r in rows if r["status"] == "timed"}
    assert ("Linear GRPO loss, forward and backward", "PyTorch, eager") in timed


def test_one_command_writes_figures_and_a_table(tmp_path: Path) -> None:
    done = run(
        *("--quick", "--device=cpu", "--threads=1", "--passes=3"),
        *("--only=advantages and groups-of-8-P", f"--output={tmp_path}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*/*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    assert results["schema"] == 1 and results["mode"] == "quick"
    assert results["peaks"]["flops_per_s"] > 1e8 and results["machine"]["kind"] == "cpu"
    # Providers take turns.
    rows = [row for row in results["rows"] if row["status"] == "timed"]
    providers = ["PeRL, PyTorch", "PyTorch, loop over groups", "PyTorch, rows of a table"]
    assert [row["provider"] for row in rows] == providers
    for row in rows:
        assert len(row["turns"]) == 3 and all(row["turns"])
        assert row["median"] > 0 and row["error"] < 1e-6
        assert 0 < row["fraction"] < 1
    table = file.with_suffix(".md").read_text()
    assert providers[-1] in table and "its kernels need a GPU" in table


@pytest.mark.parametrize("factor", [1.01, 0.98])
def test_a_factor_is_refused_in_sixteen_bits(factor: float) -> None:
    """Where single elements are rounded by more than that."""
    problem = in_bfloat16()
    right = plain(problem)
    assert problem.prove(right) > 0.01
    for name in right:
        with pytest.raises(Refused, match=f"{name}: off"):
            problem.prove({**right, name: right[name] * factor})


def test_a_missing_term_is_refused_in_sixteen_bits() -> None:
    problem = in_bfloat16()
    present, _ = logprobs_by_blocks(problem.hidden, problem.weight, problem.targets)
    results = plain(replace(problem, ref=present))
    with pytest.raises(Refused):
        problem.prove(results)
    sparse = plain(problem)
    small = sparse["grad weight"].abs() < 0.1 * sparse["grad weight"].abs().max()
    with pytest.raises(Refused):
        problem.prove({**sparse, "grad weight": sparse["grad weight"].masked_fill(small, 0.0)})


def in_bfloat16() -> HeadProblem:
    problem = make_problem(
        HeadProblem, Head("none", N=512, H=256, V=4096, itemsize=2), torch.device("cpu")
    )
    hidden, weight = (
        x.detach().bfloat16().requires_grad_() for x in (problem.hidden, problem.weight)
    )
    return replace(problem, hidden=hidden, weight=weight)


def plain(problem: HeadProblem) -> dict[str, torch.Tensor]:
    """What eager PyTorch gives."""
    (eager,) = (p for p in LINEAR_LOSS if p.name == "PyTorch, eager")
    return eager.prepare(problem).call()


class Dead(RuntimeError):
    """As of a GPU after a bad access."""


class Stopwatch:
    """What a race asks of pytest-benchmark's fixture."""

    enabled, group = True, ""

    def pedantic(self, run: Callable[[], Any], **_: Any) -> None:
        run()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0]))


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
    findings = Findings(torch.device("cuda"), peaks=Peaks(1.0, 1.0, "float32"))
    race = Race(findings, 0.001, None, lambda line: None)
    providers = [
        Provider("ours", lambda p: Run(lambda: None)),
        Provider("theirs", lambda p: Run(peer), "torch"),
        Provider("after", lambda p: Run(lambda: None)),
    ]
    contests = [
        Contest("op", case, {}, lambda device: Inputs(None, lambda _: None), providers, host=True)
        for case in "ab"
    ]
    for contest in (contests[0], contests[0], contests[1]):
        for provider in providers:
            with suppress(pytest.skip.Exception):
                race.run(contest, provider, Stopwatch())
    said = {(r.contest.case, r.provider.name): (r.status, r.reason) for r in findings.rows}
    assert said["a", "ours"][0] == "timed"
    assert said["a", "theirs"][0] == "failed"
    for key in (("a", "after"), ("b", "ours"), ("b", "theirs")):
        assert said[key] == ("left out", "the GPU cannot be used since theirs failed")


def test_what_was_found_before_an_interruption_is_written(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--only=permutation or Plan", f"--output={tmp_path}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    while "another order" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said and "interrupted" in said
    (file,) = tmp_path.glob("*/*.json")
    assert json.loads(file.read_text())["interrupted"] is True


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("--minutes=1e-9", "-k", "Plan and 64", f"--results={file}")
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(file.read_text())["rows"]
    assert row["status"] == "left out" and "--minutes" in row["reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=nothing-of-that-name"], "no microbenchmark has that in its name"),
        (["--device=tpu"], "invalid choice"),
        (["--minutes=0"], "not a positive number"),
        (["--passes=none"], "not a positive whole number"),
        (["--wheels=nowhere"], "there is no .whl file"),
        (["--only=a b"], "pytest's -k cannot read that"),
        (["--output=pyproject.toml/there"], "nothing can be written there"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run(f"--output={tmp_path}", *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    assert not list(tmp_path.iterdir())
