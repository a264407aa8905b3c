"""`python -m benchmarks.compare` in a small repository: planted changes are found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compare import judged

ROOT = Path(__file__).parents[2]
KEPT = ("advantages", "packing", "permutation")

SLOWER = """
_plan = plan
def plan(*arguments):
    import time
    time.sleep(0.003)
    return _plan(*arguments)
"""
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
    """Three commits: `broken`, whose packages cannot be imported; `older`, without `orders`; and what is there now."""
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
    permutation, package = root / "perl/permutation/permute.py", root / "perl/__init__.py"
    for name, file, addition in (
        ("broken", package, "raise RuntimeError('not today')\n"),
        ("older", permutation, "del orders\n"),
        ("now", None, ""),
    ):
        before = file.read_text() if file else ""
        if file:
            file.write_text(f"{before}\n{addition}")
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", name)
        git(root, "tag", name)
        if file:
            file.write_text(before)
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
    ("ratios", "verdict"),
    [
        ([1.0] * 12, "same"),
        ([1.02] * 12, "same"),  # Certain, and below the threshold.
        ([0.97, 1.04] * 6, "same"),
        ([0.8, 1.3] * 6, "unclear"),
        ([1.06, 1.3] * 6, "slower"),
        ([0.7, 0.9] * 6, "faster"),
        ([0.5, 9.0, *[1.0] * 14], "same"),  # Whatever a busy machine does to single rounds.
    ],
)
def test_what_rounds_say(ratios: list[float], verdict: str) -> None:
    assert judged([0.01] * len(ratios), [0.01 * r for r in ratios], 1.05)[0] == verdict


def test_planted_changes_are_found(repository: Path) -> None:
    planted = {
        "perl/model/packed/plan.py": SLOWER,
        "perl/permutation/permute.py": WRONG,
        "kernels/perl_kernels/__init__.py": MORE_MEMORY,
    }
    for name, addition in planted.items():
        with (repository / name).open("a") as file:
            file.write(addition)
    try:
        done = compare(repository, "older", "--only=64", "--quick", "--seconds-per-case=0.1")
    finally:
        git(repository, "checkout", "--quiet", "--", *planted)
    assert done.returncode == 1, done.stderr
    *lines, summary = done.stdout.splitlines()
    # The last line of a case counts: what differs is measured once more.
    found = {
        case: (verdict, rest)
        for verdict, case, rest in (x.split(": ", 2) for x in lines if ": " in x)
    }
    verdict, figures = found["Plan of packed rows, 64 prompts of 6 completions, PeRL"]
    ratio, low = map(float, re.findall(r"ratio ([\d.]+) \[([\d.]+)", figures)[0])
    assert verdict == "slower" and ratio > low > 2
    assert "once more, by two new processes:" in lines
    assert "ratio" in found["A packed row of segments, 64 prompts of 2 completions, PeRL"][1]
    assert found["An example in another order, 64 images, PeRL"][0] == "wrong"
    verdict, reason = found["8 orders of an example, 64 images, PeRL"]
    assert verdict == "not in BASE" and "orders" in reason
    verdict, figures = found["Advantages of groups, 64 groups of 4, PeRL, PyTorch"]
    assert verdict == "more memory"
    (more,) = re.findall(r"\+([\d,]+) bytes", figures)
    assert int(more.replace(",", "")) == pytest.approx(2**21, rel=0.1)
    assert found["Advantages of groups, 64 groups of 4, PeRL, Triton"] == (
        "missing",
        "its kernels need a GPU",
    )
    assert summary.startswith("working tree against older (")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], "BASE nowhere: no such revision"),
        (["--only", "plan"], "required: BASE"),
        ([""], "BASE : no such revision"),
        (["now", "--threshold=1"], "--threshold 1: .* above 1"),
        (["now", "--seconds-per-case=inf"], "--seconds-per-case: inf is not a positive number"),
        (["broken"], r"broken \(\w+\): .*not today"),
        (["now", "--only=plan 65"], "--only plan 65: no case has all these words"),
        (["now", "--check"], "unrecognized arguments: --check"),
        pytest.param(
            ["now", "--device=cuda"],
            "--device cuda: there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line(repository: Path, arguments: list[str], match: str) -> None:
    done = compare(repository, *arguments)
    assert done.returncode == 2 and not done.stdout, done
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ") and re.search(match, line), line
