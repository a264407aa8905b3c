"""`python -m benchmarks.compare` in a small repository: planted changes are found, equal code is not called slower."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KEPT = {"bench_advantages.py", "bench_packing.py", "bench_permutation.py"}

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

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {"__pycache__"} | {n for n in names if n.startswith("bench_") and n not in KEPT}

    for folder in ("benchmarks", "kernels", "perl"):
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    advantages = root / "benchmarks/bench_advantages.py"
    advantages.write_text(re.sub(r"(?m)^SIZES = .*", "SIZES = (4,)", advantages.read_text()))
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
    """A run that leaves nothing behind: no worktree, no temporary file, no change."""
    temporary = root.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=root,
        env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if (root / ".git").exists():
        assert len(git(root, "worktree", "list").splitlines()) == 1
    assert not list(temporary.glob("perl-compare-*"))
    return done


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and not done.stdout, done
    (line,) = [line for line in done.stderr.splitlines() if line]
    return line


def test_a_slower_a_larger_and_a_wrong_change_are_found(repository: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    planted = {
        "perl/model/packed/plan.py": SLOWER,
        "perl/permutation/permute.py": WRONG,
        "kernels/perl_kernels/__init__.py": MORE_MEMORY,
    }
    for name, addition in planted.items():
        with (repository / name).open("a") as file:
            file.write(addition)
    try:
        options = ["--device=cpu", "--quick", "--seconds-per-case=0.1", f"--json={found}"]
        done = compare(repository, "older", "--only=64", *options)
    finally:
        git(repository, "checkout", "--quiet", "--", *planted)
    assert done.returncode == 1, done.stderr
    rows = {
        (row["op"], row["case"], row["provider"]): row
        for row in json.loads(found.read_text())["rows"]
    }

    plan = rows["Plan of packed rows", "64 prompts of 6 completions", "PeRL"]
    assert plan["verdict"] == "slower" and plan["interval"][0] > 2
    least, most = (min(plan[side]["seconds"]) for side in ("base", "head"))
    assert least < 0.003 <= most
    packed = rows["A packed row of segments", "64 prompts of 2 completions", "PeRL"]
    assert packed["verdict"] in ("same", "unclear")

    assert rows["An example in another order", "64 images", "PeRL"]["verdict"] == "wrong"
    missing = rows["8 orders of an example", "64 images", "PeRL"]
    assert missing["verdict"] == "not in BASE" and "orders" in missing["reason"]
    larger = rows["Advantages of groups", "64 groups of 4", "PeRL, PyTorch"]
    assert "more memory" in larger["verdict"]
    base, head = (larger[side]["peak_extra_bytes"] for side in ("base", "head"))
    assert head - base == pytest.approx(2**21, rel=0.1)
    assert "left out: 2 (its kernels need a GPU)" in done.stdout
    assert "-dirty) against older (" in done.stdout.splitlines()[-1]


def test_equal_code_is_not_slower(repository: Path) -> None:
    options = ["--only=orders and an example", "--device=cpu", "--seconds-per-case=0.1"]
    done = compare(repository, "now", "--check", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same code differs by up to" in done.stdout
    words = done.stdout.splitlines()[-1].partition(": ")[2]
    assert sum(int(part.split()[0]) for part in words.partition(";")[0].split(", ")) == 5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], "nowhere: no such revision"),
        (["--only", "plan"], "arguments are required: BASE"),
        ([""], "BASE is empty: give a branch"),
        (["now", "--head="], "--head is empty: give a branch"),
        (["now", "--threshold=1"], "--threshold 1: give a finite ratio above 1"),
        (["now", "--seconds-per-case=inf"], "--seconds-per-case inf: give finite seconds above 0"),
        (["now", "--seconds-per-case=nan"], "--seconds-per-case nan: give finite seconds above 0"),
        (["now", f"--json={300 * 'x'}"], r"it cannot be written \(File name too long\)"),
        (["now", "--check", "--head=older"], "leave out --head"),
        (["broken"], r"broken \(.*\): RuntimeError: not today"),
        (["now", "--only=plan 65"], 'error: --only "plan 65": no case has all these words'),
    ],
)
def test_bad_input_is_one_line(repository: Path, arguments: list[str], match: str) -> None:
    line = refusal(compare(repository, *arguments))
    assert line.startswith("error: ") and re.search(match, line), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly(repository: Path) -> None:
    line = refusal(compare(repository, "now", "--device=cuda"))
    assert re.fullmatch(r"error: now \(\w+\): --device cuda: there is no GPU [\w ]+", line), line


def test_without_git_there_is_nothing_to_compare_with(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "plain", ignore=shutil.ignore_patterns(".git", "tests"))
    assert "is not a git checkout" in refusal(compare(tmp_path / "plain", "now"))
