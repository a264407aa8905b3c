"""The benchmarks run, none of them times a wrong result, and one command writes what they found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import perl.model.packed.sdpa
import perl.permutation
import perl_kernels
from benchmarks import run as program
from benchmarks.cases import NAMES, contests_of
from benchmarks.cases.packing import plan
from benchmarks.harness import head_problem
from benchmarks.harness.contest import Contest
from benchmarks.harness.device import Peaks
from benchmarks.harness.race import Race
from benchmarks.harness.results import Findings, Row
from perl.model.packed.attention import IMPLEMENTATIONS
from perl.model.packed.layout import PackedLayout
from tests.messages import tells

ROOT = Path(__file__).parents[2]

OPS = {
    # What each file of cases is about.
    "linear_loss": ["Linear GRPO loss, forward and backward"],
    "logits_loss": ["GRPO loss of logits, forward and backward"],
    "logprobs": ["Log-probs of hidden states, forward", "Log-probs of logits, forward"],
    "attention": ["Packed attention, forward and backward"],
    "growth": ["Linear GRPO loss, forward and backward"],
    "step": ["Training step"],
    "advantages": ["Advantages of groups"],
    "packing": ["Plan of packed rows", "A packed row of segments"],
    "permutation": ["8 orders of an example", "An example in another order"],
    "preprocessing": ["Preprocessing of a question in 4 orders"],
}


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an eighth of the width, and of the vocabulary."""
    models = {name: (h // 8, v // 8) for name, (h, v) in head_problem._MODELS.items()}
    monkeypatch.setattr(head_problem, "_MODELS", models)


def proven(contests: list[Contest]) -> list[Row]:
    """What becomes of each provider that compiles nothing; nothing is timed."""
    findings = Findings(torch.device("cpu"), peaks=Peaks(1.0, 1.0, "float32"))
    race = Race(findings, 0.1, None, lambda line: None)
    untimed: Any = SimpleNamespace(enabled=False, group="", pedantic=lambda run: run())
    for contest in contests:
        for provider in contest.providers:
            if "compile" not in provider.name:
                with suppress(pytest.skip.Exception, pytest.fail.Exception):
                    race.run(contest, provider, untimed)
    race.leave()
    return findings.rows


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_proves_its_result(name: str, small_heads: None) -> None:
    """At the smallest size of each operation; of heads at both levels, frozen or not."""
    by_op: dict[str, list[Contest]] = {}
    for contest in contests_of(name, cuda=False, quick=True):
        by_op.setdefault(contest.op, []).append(contest)
    assert list(by_op) == OPS[name]
    whole = name in ("linear_loss", "logits_loss", "logprobs", "attention")
    chosen = [c for contests in by_op.values() for c in (contests if whole else contests[:1])]
    rows = proven(chosen)
    assert {row.status for row in rows} <= {"proven", "missing"}
    # What is of this repository takes part everywhere, but for what needs a GPU.
    ours = {row.contest.case for row in rows if row.provider.ours and row.status == "proven"}
    assert ours == {contest.case for contest in chosen}


def scaled_loss(*arguments: Any, **options: Any) -> Any:
    output = perl_kernels.linear_grpo_loss(*arguments, **options)
    return output._replace(loss=output.loss * 1.001)


def across_pieces(query: Any, key: Any, value: Any, layout: Any, how: Any) -> Any:
    whole = PackedLayout.from_cu_seqlens(torch.tensor([0, layout.tokens]))
    return perl.model.packed.sdpa.sdpa(query, key, value, whole, how)


def population(*arguments: Any, **options: Any) -> Any:
    return perl_kernels.group_advantages(*arguments, unbiased=False, **options)


def off(*arguments: Any, **options: Any) -> Any:
    return 1.001 * CHUNKED(*arguments, **options)


def unmoved(example: Any, order: Any) -> Any:
    return PERMUTE(example, range(len(order)))


CHUNKED, PERMUTE = torch.nn.functional.linear_cross_entropy, perl.permutation.permute


@pytest.mark.parametrize(
    ("name", "case", "provider", "place", "planted", "said"),
    [
        ("linear_loss", 0, "PeRL, PyTorch", "benchmarks.providers.ours.linear_grpo_loss", scaled_loss, "loss"),
        ("linear_loss", 0, "PyTorch, F.linear_cross_entropy", "torch.nn.functional.linear_cross_entropy", off, "loss"),
        ("attention", 0, "PeRL, sdpa", IMPLEMENTATIONS, across_pieces, "out"),
        ("advantages", 0, "PeRL, PyTorch", "benchmarks.cases.advantages.group_advantages", population, "advantages"),
        ("packing", 0, "PeRL", "benchmarks.cases.packing.plan", lambda *given: plan(*given)[:-1], "lost"),
        ("permutation", -5, "PeRL", "benchmarks.cases.permutation.permute", unmoved, "order"),
    ],
    ids=["loss", "of a peer", "attention", "advantages", "packing", "permutation"],
)  # fmt: skip
def test_a_wrong_implementation_is_refused(
    name: str, case: int, provider: str, place: Any, planted: Any, said: str, small_heads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each mistake is small or of a kind that looks fast: it must be the proof that finds it."""
    if isinstance(place, str):
        monkeypatch.setattr(place, planted)
    else:
        monkeypatch.setitem(place, "sdpa", planted)
    rows = proven([contests_of(name, cuda=False, quick=True)[case]])
    (row,) = (row for row in rows if row.provider.name == provider)
    assert row.status == "refused"
    tells(row.reason, said)
    right = [row for row in rows if row.status == "proven"]
    assert right or len(rows) == 1


class Processes:
    """What run.py starts, without starting it: pytest writes rows, scripts their reports."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, *rows: dict[str, Any]) -> None:
        machine = {"kind": "cpu", "device": "Some CPU @ 2", "threads": 3}
        self.found = {"machine": machine, "peaks": None, "rows": list(rows)}
        self.ends: dict[str, int | type[BaseException]] = {}
        """How a part ends, if not well: pytest or a script."""
        self.asked: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def run(self, command: list[str], **options: Any) -> Any:
        if command[0] == "git":
            said = "abc123456\n" if "rev-parse" in command else " M perl/x.py\n"
            return SimpleNamespace(returncode=0, stdout=said)
        name = "pytest" if "pytest" in command else Path(command[1]).stem
        self.asked[name] = command, options
        end = self.ends.get(name, 0)
        if name == "pytest" and end in (0, 1, KeyboardInterrupt):
            self.write(command, "--results=", self.found)
        elif end == 0:
            self.write(command, "--json=", {"failed": f"as {name} says"})
        if isinstance(end, type):
            raise end(command, 1) if end is subprocess.TimeoutExpired else end
        return SimpleNamespace(returncode=end)

    @staticmethod
    def write(command: list[str], option: str, content: Any) -> None:
        (file,) = (word.removeprefix(option) for word in command if word.startswith(option))
        Path(file).write_text(json.dumps(content))


def row(provider: str, status: str = "timed", **fields: Any) -> dict[str, Any]:
    values = {
        "op": "Op",
        "case": "case",
        "shape": {},
        "provider": provider,
        "ours": provider == "PeRL",
    }
    return {**values, "status": status, "median": 1.0, "reason": "", **fields}  # fmt: skip


Run = Callable[..., tuple[int, Processes, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program with these processes; gives its exit code, what it started, and the file it wrote."""

    def main(*options: str, processes: Processes) -> tuple[int, Processes, dict[str, Any]]:
        monkeypatch.setattr(program, "subprocess", processes)
        monkeypatch.setattr(program.os, "getloadavg", lambda: (0.5, 0, 0))
        code = program.main(["--device=cpu", f"--output={tmp_path}", *options])
        files = list(tmp_path.glob("*/*.json"))
        return code, processes, json.loads(files[0].read_text()) if files else {}

    return main


def test_all_that_was_found_is_in_one_file(run: Run, tmp_path: Path) -> None:
    rows = [row("PeRL"), row("peer", "refused", median=None), row("out", "failed", median=None)]
    code, processes, found = run("--quick", "--threads=3", processes=Processes(*rows))
    assert code == 0  # What is wrong is a peer's.
    (file,) = tmp_path.glob("*/*.json")
    today = date.today().isoformat()
    assert file.relative_to(tmp_path) == Path(f"some-cpu-2-3-threads/{today}-abc123456-changed-quick.json")  # fmt: skip
    assert found["rows"] == rows and found["load"] == [0.5, 0.5]
    assert (found["commit"], found["mode"], found["date"]) == ("abc123456+", "quick", today)
    assert found["steps"] == {
        "train_step": {"failed": "as bench_train_step says"},
        "trainer": {"failed": "as bench_trainer says"},
    }
    assert "only" not in found and "interrupted" not in found
    command, options = processes.asked["pytest"]
    # Four and a half minutes, of which whole training steps have one.
    given = {"--passes=2", "--minutes=3.5", "--device=cpu", "--quick", "--threads=3"}
    assert given <= set(command) and options["timeout"] == 3.5 * 60 + 120
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""
    for name, least in (("bench_train_step", 130), ("bench_trainer", 260)):
        command, options = processes.asked[name]
        assert {"--device=cpu", "--quick"} <= set(command)
        assert least < options["timeout"] <= 270  # What is left, halved for the first of two.
    tells(file.with_suffix(".md").read_text(), "Some CPU @ 2")


def test_a_part_does_not_take_the_place_of_all(run: Run, tmp_path: Path) -> None:
    _, processes, found = run("--only=x and y", "--passes=4", "--minutes=2", processes=Processes())
    command, _ = processes.asked["pytest"]
    assert command[-2:] == ["-k", "x and y"] and {"--passes=4", "--minutes=2.0"} <= set(command)
    assert processes.asked.keys() == {"pytest"} and found["only"] == "x and y"
    assert [file.name.partition("changed")[2] for file in tmp_path.glob("*/*.json")] == ["-part.json"]  # fmt: skip


@pytest.mark.parametrize("status", ["refused", "failed"])
def test_what_is_wrong_here_fails(status: str, run: Run, capsys) -> None:
    processes = Processes(row("PeRL", status, median=None, reason="off by 3"))
    processes.ends["pytest"] = 1
    assert run(processes=processes)[0] == 1
    tells(capsys.readouterr().err, status, "Op", "case", "PeRL", "off by 3")


def test_what_was_found_before_an_interruption_is_written(run: Run, capsys) -> None:
    processes = Processes(row("PeRL"))
    processes.ends["pytest"] = KeyboardInterrupt
    code, processes, found = run(processes=processes)
    assert code == 130 and found["interrupted"] is True and found["rows"] == [row("PeRL")]
    assert processes.asked.keys() == {"pytest"}
    tells(capsys.readouterr().err, "interrupted")


def test_a_step_that_is_not_measured_says_why(run: Run) -> None:
    processes = Processes(row("PeRL"))
    processes.ends |= {"bench_train_step": 3, "bench_trainer": subprocess.TimeoutExpired}
    code, _, found = run(processes=processes)
    assert code == 0
    tells(found["steps"]["train_step"]["failed"], "bench_train_step.py", 3)
    tells(found["steps"]["trainer"]["failed"], "--minutes")


@pytest.mark.parametrize(
    ("arguments", "end", "names"),
    [
        (["--only=nothing"], pytest.ExitCode.NO_TESTS_COLLECTED, ["--only", "nothing"]),
        (["--only=a b"], pytest.ExitCode.USAGE_ERROR, ["--only", "a b", "-k"]),
        ([], pytest.ExitCode.INTERNAL_ERROR, ["case"]),
        (["--device=tpu"], 0, ["--device", "tpu", "cuda"]),
        (["--minutes=0"], 0, ["--minutes", "0"]),
        (["--passes=none"], 0, ["--passes", "none"]),
        (["--wheels=nowhere"], 0, ["--wheels", "nowhere", "bench-wheels"]),
        (["--output=pyproject.toml/there"], 0, ["--output", "pyproject.toml/there"]),
    ],
)
def test_bad_input_is_one_line(arguments, end, names, run: Run, tmp_path, capsys) -> None:
    processes = Processes()
    processes.ends |= dict.fromkeys(("pytest", "bench_train_step", "bench_trainer"), end)
    assert run(*arguments, processes=processes)[0] == 2
    (error,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    tells(error, *names)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_command_writes_figures_and_a_table(tmp_path: Path) -> None:
    """As a user runs it; beside other tests pytest-benchmark would not measure."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--device=cpu"),
            *("--threads=1", "--passes=3", "--only=advantages and groups-of-8-P"),
            f"--output={tmp_path}",
        ],
        env=environment | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
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
    for found in rows:
        assert len(found["turns"]) == 3 and all(found["turns"])
        assert found["median"] > 0 and found["error"] < 1e-6
        assert found["fraction"] == found["bound"] / found["median"]
        # 512 rewards in and out in fp32, 64 sizes.
        assert found["bound"] == (8 * 512 + 8 * 64) / results["peaks"]["bytes_per_s"]
    table = file.with_suffix(".md").read_text()
    assert all(name in table for name in providers)
    assert re.search(r"PeRL, Triton.* missing: ", table)
