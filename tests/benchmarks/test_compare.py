"""`python -m benchmarks.compare` in a small repository: planted changes are found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare as program
from benchmarks.compare import Side, Worker, judged
from tests.messages import refused, tells

ROOT = Path(__file__).parents[2]
KEPT = ("advantages", "packing", "permutation")

MORE_MEMORY = """
_advantages = group_advantages
def group_advantages(*arguments, **options):
    import torch
    room = torch.empty(2**21, dtype=torch.uint8)
    return _advantages(*arguments, **options)
"""
WRONG = """
_permute = permute
def permute(example, order):
    return _permute(example, range(len(order)))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: `older`, without `orders`, and what is there now."""
    root = tmp_path_factory.mktemp("compare") / "repository"

    for folder in ("benchmarks", "kernels", "perl"):
        shutil.copytree(ROOT / folder, root / folder, ignore=lambda *_: {"__pycache__"})
    cases = root / "benchmarks/cases"
    for name, setting in (("__init__", f"NAMES = {KEPT}"), ("advantages", "SIZES = (4,)")):
        file = cases / f"{name}.py"
        variable = setting.partition(" ")[0]
        text, changed = re.subn(rf"(?ms)^{variable} = \(.*?\)$", setting, file.read_text())
        assert changed == 1
        file.write_text(text)
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    permutation = root / "perl/permutation/permute.py"
    now = permutation.read_text()
    for name, text in (("older", f"{now}\ndel orders\n"), ("now", now)):
        permutation.write_text(text)
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", name)
        git(root, "tag", name)
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def compare(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run that leaves nothing behind: no temporary file, no change."""
    temporary = root.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--device=cpu", *arguments],
        cwd=root,
        env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert not list(temporary.glob("perl-compare-*"))
    return done


@pytest.mark.parametrize(
    ("ratios", "verdict", "figures"),
    [
        ([1.0] * 12, "same", "1.000 [1.000, 1.000]"),
        ([1.02] * 12, "same", "1.020 [1.020, 1.020]"),  # Certain, and below the threshold.
        # The median, and the third from either end: nearer ones enclose it with less than 95 %.
        ([0.97, 1.04] * 6, "same", "1.004 [0.970, 1.040]"),
        ([0.8, 1.3] * 6, "unclear", "1.020 [0.800, 1.300]"),
        ([1.06, 1.3] * 6, "slower", "1.174 [1.060, 1.300]"),
        ([0.7, 0.9] * 6, "faster", "0.794 [0.700, 0.900]"),
        # Whatever a busy machine does to single rounds.
        ([0.5, 9.0, *[1.0] * 14], "same", "1.000 [1.000, 1.000]"),
        ([1.01, 1.02, 1.03, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9], "slower", "1.349 [1.030, 1.700]"),
    ],
)  # fmt: skip
def test_what_rounds_say(ratios: list[float], verdict: str, figures: str) -> None:
    """Of the working tree over BASE, whose rounds take 10 ms."""
    found, said = judged([0.01] * len(ratios), [0.01 * r for r in ratios], 1.05)
    assert (found, said.partition("ratio ")[2]) == (verdict, figures)
    assert said.startswith("10 ms, ")


class Sides:
    """What the two processes answer: by side and case how it is entered, and the seconds of its rounds."""

    def __init__(self) -> None:
        self.entered: dict[str, dict[str, Any]] = {"before": {}, "here": {}}
        self.seconds: dict[str, dict[str, list[float]]] = {"before": {}, "here": {}}
        self.asked: list[tuple[str, Any]] = []
        self.started: list[str] = []

    def case(self, name: str, before: Any, here: Any) -> None:
        """Each side a list of seconds of a call, one for each time that it is entered, or how it ends."""
        for side, given in (("before", before), ("here", here)):
            fields = {
                "status": "proven",
                "reason": "",
                "call_seconds": 0.005,
                "peak_extra_bytes": 0,
            }
            if isinstance(given, dict):
                self.entered[side][name] = fields | given
                given = [0.01]
            else:
                self.entered[side][name] = fields
            self.seconds[side][name] = given

    def __call__(self, name: str, tree: Path, given: Namespace) -> Any:
        side = "here" if name == "here" else "before"
        self.started.append(name)
        current = []
        turn = self.started.count(name) - 1

        def ask(do: str, *words: Any) -> Any:
            if do == "list":
                return [["file", "Op", case, "PeRL"] for case in self.entered["here"]]
            if do == "enter":
                current[:] = [words[2]]
                return self.entered[side][words[2]]
            self.asked.append((side, *words))
            seconds = self.seconds[side][current[0]]
            return seconds[min(turn, len(seconds) - 1)]

        return type(side, (), {"ask": staticmethod(ask), "close": staticmethod(lambda: None)})()


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Sides:
    sides = Sides()
    monkeypatch.setattr(program, "Side", sides)
    monkeypatch.setattr(program, "unpack", lambda revision, folder: "abc1234")
    return sides


Verdicts = Callable[..., tuple[int, dict[str, tuple[str, str]], str]]


@pytest.fixture
def verdicts(sides: Sides, capsys: pytest.CaptureFixture[str]) -> Verdicts:
    """Exit code, the last line of each case, and the last of all."""

    def run(*options: str) -> tuple[int, dict[str, tuple[str, str]], str]:
        code = program.main(["main", "--device=cpu", "--seconds-per-case=1e-9", *options])
        *lines, summary = capsys.readouterr().out.splitlines()
        found = {}
        for line in lines:
            if line.count(": ") > 1:
                verdict, case, said = line.split(": ", 2)
                found[case.split(", ")[1]] = verdict, said
        return code, found, summary

    return run


def test_the_working_tree_is_compared_with_base(sides: Sides, verdicts: Verdicts) -> None:
    out = {"reason": "why", "status": "failed"}
    sides.case("equal", [0.01], [0.01])
    sides.case("slow", [0.01], [0.012])
    sides.case("fast", [0.01], [0.008])
    sides.case("larger", {"peak_extra_bytes": 2**20}, {"peak_extra_bytes": 3 * 2**20 + 1})
    sides.case("no larger", {"peak_extra_bytes": 2**20}, {"peak_extra_bytes": 2 * 2**20})
    sides.case("little", {"peak_extra_bytes": 10**9}, {"peak_extra_bytes": 1_049_000_000})
    sides.case("wrong", [0.01], out | {"status": "refused"})
    sides.case("missing", [0.01], out | {"status": "missing"})
    sides.case("broken", [0.01], out)
    sides.case("both", out, out)
    sides.case("new", out, [0.01])
    sides.case("mended", out | {"status": "refused"}, [0.01])
    code, found, summary = verdicts()
    same = "10 ms, 10 ms, ratio 1.000 [1.000, 1.000]"
    assert found == {
        "equal": ("same", same),
        "slow": ("slower", "10 ms, 12 ms, ratio 1.200 [1.200, 1.200]"),
        "fast": ("faster", "10 ms, 8 ms, ratio 0.800 [0.800, 0.800]"),
        "larger": ("more memory", f"{same}, +2,097,153 bytes"),
        "no larger": ("same", same),  # No more than 1 MiB.
        "little": ("same", same),  # Less than 5 %.
        "wrong": ("wrong", "why"),
        "missing": ("missing", "why"),
        "broken": ("failed", "why"),
        "both": ("fails in both", "why"),
        "new": ("not in BASE", "why"),
        "mended": ("wrong in BASE", "why"),
    }
    assert code == 1 and "main (abc1234)" in summary and "3 same, 1 slower, 1 faster" in summary
    # In the order ABBA, as many calls as fill 20 ms, six rounds of each side.
    turn = [(side, 4) for side in ("before", "here", "here", "before")]
    assert sides.asked[:12] == turn * 3 and sides.asked[12:16] == turn


@pytest.mark.parametrize(
    ("again", "verdict", "code"),
    [(0.012, "slower", 1), (0.01, "same", 0), (0.008, "unclear", 0)],
)
def test_what_differs_is_measured_once_more(
    again: float, verdict: str, code: int, sides: Sides, verdicts: Verdicts
) -> None:
    """By two new processes, and that counts; what is then the contrary is neither."""
    sides.case("case", [0.01], [0.012, again])
    sides.case("other", [0.01], [0.01])
    found, _, summary = verdicts()
    assert found == code and summary.endswith(f" main (abc1234): {summed(verdict)}")
    assert sides.started == ["main (abc1234)", "here"] * 2
    assert len(sides.asked) == 3 * 12  # The other case once.


def summed(verdict: str) -> str:
    return "2 same" if verdict == "same" else f"1 {verdict}, 1 same"


def test_only_some_cases_and_a_threshold(sides: Sides, verdicts: Verdicts) -> None:
    for name in ("8 images", "64 images", "64 rows"):
        sides.case(name, [0.01], [0.012])
    code, found, _ = verdicts("--only=IMAGES and 64", "--threshold=1.25")
    assert (code, found.keys()) == (0, {"64 images"}) and found["64 images"][0] == "same"


def test_a_worker_proves_and_times_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "NAMES", ("packing", "nothing"))
    worker = Worker(str(ROOT), "cpu", True)
    cases = worker.list()
    case = ("packing", "Plan of packed rows", "64 prompts of 6 completions", "PeRL")
    assert case in cases and ("nothing",) in cases
    found = worker.enter(*case)
    assert (found["status"], found["reason"]) == ("proven", "") and found["call_seconds"] > 0
    assert 0 < worker.time(2) < 10 * found["call_seconds"] + 1
    monkeypatch.setattr("benchmarks.cases.packing.plan", lambda loads, budget: [])
    assert worker.enter(*case)["status"] == "refused"
    assert worker.enter("packing", "other")["status"] == "failed"
    tells(worker.enter("nothing")["reason"], "benchmarks.cases.nothing")
    with refused("/nowhere", error=ImportError):
        Worker("/nowhere", "cpu", True)


def test_a_process_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_WORKER", "raise RuntimeError('not today')")
    side = Side("main (abc)", ROOT, Namespace(device="cpu", quick=True))
    with closing(side), refused("main (abc)", "not today"):
        side.ask("list")


@pytest.mark.slow
def test_planted_changes_are_found(repository: Path) -> None:
    planted = {
        "perl/permutation/permute.py": WRONG,
        "kernels/perl_kernels/__init__.py": MORE_MEMORY,
    }
    for name, addition in planted.items():
        with (repository / name).open("a") as file:
            file.write(addition)
    try:
        options = ("--only=64", "--quick", "--seconds-per-case=0.05", "--threshold=9")
        done = compare(repository, "older", *options)
    finally:
        git(repository, "checkout", "--quiet", "--", *planted)
    assert done.returncode == 1, done.stderr
    *lines, summary = done.stdout.splitlines()
    found = {
        case: (verdict, rest)
        for verdict, case, rest in (x.split(": ", 2) for x in lines if ": " in x)
    }

    def of(words: str) -> tuple[str, str]:
        return next(said for case, said in found.items() if words in case)

    verdict, figures = of("Plan")
    assert verdict in ("same", "unclear") and "ratio" in figures
    assert of("another order")[0] == "wrong"
    verdict, reason = of("8 orders")
    assert verdict.startswith("not in") and "orders" in reason
    verdict, figures = of("PeRL, PyTorch")
    assert verdict == "more memory"
    (more,) = re.findall(r"\+([\d,]+) bytes", figures)
    assert int(more.replace(",", "")) == pytest.approx(2**21, rel=0.1)
    assert of("PeRL, Triton")[0] == "missing"
    assert " older (" in summary


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nowhere"], ["BASE", "nowhere"]),
        (["--only", "plan"], ["BASE", "--help"]),
        ([""], ["BASE"]),
        (["now", "--threshold=1"], ["--threshold", "1"]),
        (["now", "--seconds-per-case=inf"], ["--seconds-per-case", "inf"]),
        (["now", "--check"], ["--check", "--help"]),
        pytest.param(
            ["now", "--device=cuda"],
            ["--device", "cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], names: list[str], fails) -> None:
    tells(fails(program.main, arguments), *names)


def test_words_that_no_case_has(sides: Sides, fails) -> None:
    sides.case("plan 64", [0.01], [0.01])
    tells(fails(program.main, ["now", "--only=plan 65"]), "--only", "plan 65")
