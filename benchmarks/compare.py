"""Whether a change made something slower: the working tree's time over that of BASE, both measured in turn.

    python -m benchmarks.compare BASE [--only WORDS] [--quick] ...

Two processes, one with the packages of the revision BASE and one with those of the working tree, run the benchmarks of the
working tree: every implementation of this repository in every case. Both prove their result; then one times a round while the
other waits, in the order ABBA, so that whatever drifts slowly (clock, heat, other programs) meets both alike. The ratio is the
median over neighbouring rounds, its interval that of the sign test, which asks nothing of how times are distributed.

`slower` needs a 95 % interval wholly above 1 and a median above the threshold, and is confirmed by two new processes: where
code and data happen to lie in memory makes a process faster or slower by a few percent. `faster` is the same the other way
round. `unclear` has room for no difference and for one beyond the threshold. `more memory` is 5 % and 1 MiB more.

Exit code: 1 if something is slower, takes more memory, is wrong or fails; 0 if not; 2 for bad input; 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

import perl
from benchmarks.cases import NAMES, contests_of
from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.device import free_memory
from benchmarks.harness.options import Parser, device_of, environment, exit_code, positive
from benchmarks.harness.race import failures, median_seconds, prove, try_out
from benchmarks.harness.results import Row
from perl.types import UserError

ROOT = Path(__file__).resolve().parents[1]
_ROUND = 0.02  # Seconds at least: short calls are repeated within a round.
_FEWEST_ROUNDS = 6  # Of each side: fewer cannot enclose the median with 95 %.
Case = tuple[str, ...]  # Module, operation, size and implementation.
_FAILURES = {"slower", "more memory", "wrong", "failed"}
# PathFinder first: the finder of an editable install would answer with its own folder.
_WORKER = (
    "import sys; from importlib.machinery import PathFinder; sys.meta_path.insert(0, PathFinder); "
    "from benchmarks.compare import work; work()"
)


def main(arguments: list[str] | None = None) -> int:
    try:
        return exit_code(lambda: compare(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def compare(arguments: list[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.compare")
    add = parser.add_argument
    add("base", metavar="BASE", help="a branch, a tag, a hash or HEAD~1")
    add("--only", default="", metavar="WORDS", help="cases whose names hold all these words")
    add("--quick", action="store_true", help="fewer and smaller cases")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--seconds-per-case", type=positive, default=4.0, metavar="S", help="default: 4")
    add("--threshold", type=float, default=1.05, metavar="RATIO", help="default: 1.05")
    given = parser.parse_args(arguments)
    if not 1 < given.threshold < math.inf:
        parser.error(f"--threshold {given.threshold:g}: give a finite ratio above 1")
    given.device = device_of(given.device)
    with tempfile.TemporaryDirectory(prefix="perl-compare-") as folder:
        base = f"{given.base} ({unpack(given.base, Path(folder))})", Path(folder)
        found = measured(given, base, [])
        doubtful = [case for case, verdict in found.items() if verdict in ("slower", "faster")]
        if doubtful:
            print("once more, by two new processes:")
            for case, verdict in measured(given, base, doubtful).items():
                contrary = verdict in ("slower", "faster") and verdict != found[case]
                found[case] = "unclear" if contrary else verdict
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(found.values()).items())
    print(f"working tree against {base[0]}: {counts}")
    return int(not _FAILURES.isdisjoint(found.values()))


def measured(given: Namespace, base: tuple[str, Path], cases: list[Case]) -> dict[Case, str]:
    """Verdicts on these cases, or on those that `--only` chooses, each printed as it comes."""
    verdicts = {}
    words = [word for word in given.only.lower().split() if word != "and"]
    with closing(Side(*base, given)) as before, closing(Side("here", ROOT, given)) as here:
        before.ask("list")
        for case in cases or [tuple(names) for names in here.ask("list")]:
            if all(word in ", ".join(case).lower() for word in words):
                verdicts[case], line = measure(case, before, here, given)
                print(f"{verdicts[case]}: {', '.join(case[1:] or case)}: {line}", flush=True)
    if not verdicts:
        raise UserError(f"--only {given.only}: no case has all these words in its name")
    return verdicts


def unpack(revision: str, folder: Path) -> str:
    """`perl` and `kernels` of a revision; gives its short hash. Nothing of it stays in the repository."""
    # Within a hook, git's variables name the repository and the index that the hook is about.
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, env=own, capture_output=True).stdout

    commit = git("rev-parse", "--verify", "--short", f"{revision}^{{commit}}").decode().strip()
    archive = git("archive", "--format=tar", commit, "perl", "kernels") if commit else b""
    if not archive:
        raise UserError(f"BASE {revision}: no such revision in {ROOT}; give a branch or a hash")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return commit


class Side:
    """A process with the packages of `tree`, which is asked and answers in lines of JSON."""

    def __init__(self, name: str, tree: Path, given: Namespace) -> None:
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join(map(str, (tree, tree / "kernels", ROOT)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, json.dumps([str(tree), given.device, given.quick])],
            cwd=tree,
            env=environment() | {"PYTHONHASHSEED": "0", "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the program, which then ends its workers.
        )

    def ask(self, *request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        said = (self.log.read().strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{self.name}: the process ended: {said}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(case: Case, base: Side, here: Side, given: Namespace) -> tuple[str, str]:
    """The verdict, with times and ratio or a reason: the case is proven on both sides, then timed in turn."""
    ours, theirs = here.ask("enter", *case), base.ask("enter", *case)
    if ours["reason"]:
        verdict = {"refused": "wrong", "missing": "missing"}.get(ours["status"], "failed")
        both = verdict == "failed" and ours == theirs
        return "fails in both" if both else verdict, ours["reason"]
    if theirs["reason"]:
        wrong = theirs["status"] == "refused"
        return "wrong in BASE" if wrong else "not in BASE", theirs["reason"]
    calls = max(1, min(1000, round(_ROUND / ours["call_seconds"])))
    rounds: dict[Side, list[float]] = {base: [], here: []}
    end = time.monotonic() + given.seconds_per_case
    while len(rounds[base]) < _FEWEST_ROUNDS or time.monotonic() < end:
        for side in (base, here, here, base):
            rounds[side].append(side.ask("time", calls))
    verdict, figures = judged(rounds[base], rounds[here], given.threshold)
    held, holds = (side["peak_extra_bytes"] or 0 for side in (theirs, ours))
    if verdict != "slower" and holds > max(1.05 * held, held + 2**20):
        return "more memory", f"{figures}, {holds - held:+,} bytes"
    return verdict, figures


def judged(base: list[float], here: list[float], threshold: float) -> tuple[str, str]:
    """The verdict on seconds of neighbouring rounds, and the figures that it is about."""
    from scipy.stats import quantile_test  # Slow to import, and bad input needs none.

    logs = [math.log(b / a) for a, b in zip(base, here, strict=True)]
    ratio = math.exp(statistics.median(logs))
    low, high = map(math.exp, quantile_test(logs, q=0, p=0.5).confidence_interval(0.95))
    before, after = (f"{1e3 * statistics.median(seconds):.4g} ms" for seconds in (base, here))
    verdict = "same"
    if low > 1 and ratio > threshold:
        verdict = "slower"
    elif high < 1 and ratio < 1 / threshold:
        verdict = "faster"
    elif low <= 1 <= high and (high > threshold or low < 1 / threshold):
        verdict = "unclear"
    return verdict, f"{before}, {after}, ratio {ratio:.3f} [{low:.3f}, {high:.3f}]"


class Worker:
    """What the process of a side does; one case is prepared at a time."""

    def __init__(self, tree: str, device: str, quick: bool) -> None:
        if not Path(str(perl.__file__)).resolve().is_relative_to(Path(tree).resolve()):
            raise ImportError(f"there is no perl in {tree} (found: {perl.__file__})")
        self.device = torch.device(device)
        self.cases: dict[Case, tuple[Contest, Provider] | str] = {}  # Or why a module is not.
        cuda = device == "cuda"
        for name in NAMES:
            try:
                contests = contests_of(name, cuda, quick)
            except Exception as error:
                self.cases[name,] = str(error)
                continue
            for c in contests:
                ours = (provider for provider in c.providers if provider.ours)
                self.cases |= {(name, c.op, c.case, p.name): (c, p) for p in ours}

    def list(self) -> list[Case]:
        return list(self.cases)

    def enter(self, *case: str) -> dict[str, Any]:
        found = self.cases.get(case) or self.cases.get(case[:1], "the case is not there")
        if isinstance(found, str):
            return {"status": "failed", "reason": found}
        self.row = Row(*found)
        with failures(self.row):
            problem = self.row.contest.problem(self.device)
            problem.find_truth()
            prove(self.row, problem, self.device)
            try_out(self.row, self.device)
        kept = ("status", "reason", "call_seconds", "peak_extra_bytes")
        return {name: getattr(self.row, name) for name in kept}

    def time(self, calls: int) -> float:
        return median_seconds(self.row, self.device, calls)


def work() -> None:
    """The process of a side: it answers requests until it is killed."""
    # What libraries print must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(*json.loads(sys.argv[1]))
    for line in sys.stdin:
        do, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, do)(*arguments)), file=answers, flush=True)
        free_memory()  # Of a GPU, for the other side.


if __name__ == "__main__":
    sys.exit(main())
