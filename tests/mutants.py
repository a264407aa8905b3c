"""Mutation testing: small wrong edits of the core, one at a time, and whether the tests of its package notice.

    make mutants                                               a sample of every package, and the listed edits
    make mutants ARGS="--only rollout --sample 20"             one package
    make mutants ARGS="--only perl/rollout/replay.py --all"    every edit of a file
    make mutants ARGS="--only lists"                           the edits of tests/edits/*.toml

Edits are cosmic-ray's (operators, numbers, conditions, empty loops), a statement or a keyword argument left out, and those
that `tests/edits/` lists; it also says of which generated edits nobody can see anything. Each is tried in a process forked
from one that has imported torch: it reads the edited file instead of the real one, which stays as it is, and runs the tests of
the edited package that are not marked slow, those of the file's name first, until one fails. Without an edit they have to
pass, or there is nothing to say. What lasts too long has been noticed, as an endless loop; these are counted apart.
"""

from __future__ import annotations

import os

# Read when these are imported, which is before the tests' conftest here.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "CI": "1"}  # Hypothesis tries the same examples each time.
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # No process that is forked can use a GPU of its parent's.
os.environ["PERL_BACKEND"] = (
    "torch"  # The native rows hold a translation of coefficient.py from before.
)

import argparse
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.util
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso import parse
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
EDITS = ROOT / "tests" / "edits"
PACKAGES = {
    "permutation": ("perl/permutation", "tests/permutation"),
    "rollout": ("perl/rollout", "tests/rollout"),
    "training": ("perl/training", "tests/training"),
    "model/packed": ("perl/model/packed", "tests/model"),
    "evaluation": ("perl/evaluation", "tests/evaluation"),
    "rewards": ("perl/rewards", "tests/rewards"),
    "perl_kernels": ("kernels/perl_kernels", "tests/kernels"),
}
"""What `make mutants` tries: sources, and the folder of their tests."""

PRELOADED = "torch transformers.models.qwen2_5_vl.modeling_qwen2_5_vl accelerate hypothesis openai"

# cosmic-ray has more replacements for each operator; one of each tells as much.
REPLACED = (
    *("BinaryOperator_Add_Sub", "BinaryOperator_Sub_Add", "BinaryOperator_Mul_Div"),
    *("BinaryOperator_Div_Mul", "BinaryOperator_FloorDiv_Mul", "BinaryOperator_Mod_Mul"),
    *("BinaryOperator_Pow_Mul", "BinaryOperator_BitAnd_BitOr", "BinaryOperator_BitOr_BitAnd"),
    *("ComparisonOperator_Eq_NotEq", "ComparisonOperator_NotEq_Eq", "ComparisonOperator_Lt_LtE"),
    *("ComparisonOperator_LtE_Lt", "ComparisonOperator_Gt_GtE", "ComparisonOperator_GtE_Gt"),
    *("ComparisonOperator_Is_IsNot", "ComparisonOperator_IsNot_Is", "UnaryOperator_Delete_USub"),
    *("UnaryOperator_Delete_Not", "TrueWithFalse", "FalseWithTrue", "AndWithOr", "OrWithAnd"),
    *("BreakWithContinue", "ContinueWithBreak"),
)


LATE = -999
"""For an exit code: the time limit passed, as where a loop does not end."""


class _Removal(Operator):
    """What a node becomes that is left out."""

    code = ""

    def mutate(self, node: Any, index: int) -> Any:
        return parse(node.get_first_leaf().prefix + self.code)

    examples = classmethod(lambda cls: ())


class RemoveStatement(_Removal):
    """A call that is made for its effect, or an addition to something."""

    code = "pass"

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        called = node.type == "atom_expr" and node.children[-1].get_first_leaf().value == "("
        added = node.type == "expr_stmt" and node.children[1].get_code().strip() in ("+=", "|=")
        if node.parent and node.parent.type == "simple_stmt" and (called or added):
            yield node.start_pos, node.end_pos


class RemoveArgument(_Removal):
    """A keyword argument."""

    code = "**{}"

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "argument" and node.children[1].get_code() == "=":
            yield node.start_pos, node.end_pos


@cache
def operators() -> dict[str, Operator]:
    names = [f"Replace{name}" for name in REPLACED]
    names += ["AddNot", "NumberReplacer", "ZeroIterationForLoop"]
    found: dict[str, Operator] = {name: get_operator(f"core/{name}")() for name in names}
    return found | {"RemoveStatement": RemoveStatement(), "RemoveArgument": RemoveArgument()}


@dataclass(frozen=True)
class Edit:
    file: str
    code: str
    """Of the whole file, edited."""
    line: int
    was: str
    becomes: str
    tests: tuple[str, ...]
    """Those that may notice it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.was}  ->  {self.becomes}"


def edit(file: str, source: str, code: str, tests: tuple[str, ...]) -> Edit:
    old, new = source.splitlines(), code.splitlines()
    spans = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    spans = [span for span in spans if span[0] != "equal"]
    was = " ".join(line.strip() for line in old[spans[0][1] : spans[-1][2]])
    becomes = " ".join(line.strip() for line in new[spans[0][3] : spans[-1][4]])
    return Edit(file, code, spans[0][1] + 1, was, becomes, tests)


@dataclass(frozen=True)
class Place:
    """Where an operator can change a file; the same line gives the same key wherever it moves."""

    file: str
    operator: str
    number: int
    """Of this among all places of the operator in the file."""
    text: str

    @property
    def key(self) -> str:
        return hashlib.sha1(f"{self.file} {self.operator} {self.text}".encode()).hexdigest()


class _Places(MutationVisitor):
    """Collects the nodes that an operator would change, and leaves them."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(-1, operator)
        self.nodes: list[Any] = []

    def visit(self, node: Any) -> Any:
        self.nodes += [node for _ in self.operator.mutation_positions(node)]
        return node


def places(file: str) -> Iterator[Place]:
    source = (ROOT / file).read_text(encoding="utf-8")
    lines, tree = source.splitlines(), get_ast(source)
    for name, operator in operators().items():
        visitor = _Places(operator)
        visitor.walk(tree)
        seen: Counter[str] = Counter()
        for number, node in enumerate(visitor.nodes):
            if not _is_type_or_message(node) and not _is_star(node):
                text = lines[node.start_pos[0] - 1].strip()
                seen[text] += 1
                yield Place(file, name, number, f"{text} {seen[text]}")


def _is_type_or_message(node: Any) -> bool:
    """Annotations do nothing, what a message says is not what these tests are about, and `strict` of `zip` asserts."""
    while (parent := node.parent) is not None:
        if node.type == "argument" and node.children[0].get_code().strip() == "strict":
            return True
        if node.type in ("tfpdef", "decorator", "raise_stmt", "assert_stmt", "fstring"):
            return True
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        if node.type == "simple_stmt" and node.get_code().strip().startswith("logger."):
            return True
        node = parent
    return False


def _is_star(node: Any) -> bool:
    """One that unpacks or ends the positional arguments, which any other operator makes an error of syntax."""
    stars = node.type == "operator" and node.value in ("*", "**")
    return stars and node.parent.type not in ("term", "power")


def generated(place: Place) -> Edit | None:
    """The edit of a place; None where it changes nothing."""
    source = (ROOT / place.file).read_text(encoding="utf-8")
    code = MutationVisitor.mutate_code(source, operators()[place.operator], place.number)
    return edit(place.file, source, code, tests_of(place.file)) if code != source else None


def tests_of(file: str) -> tuple[str, ...]:
    """The folder of a file's tests, behind those with the file's name."""
    homes = (tests for sources, tests in PACKAGES.values() if file.startswith(f"{sources}/"))
    home = next(homes, f"tests/{Path(file).parts[1]}")
    home = home if (ROOT / home).is_dir() else "tests"
    own = sorted((ROOT / home).glob(f"test_*{Path(file).stem}*.py"))
    rest = home if home != "tests" else "tests/test_config.py"
    return (*(str(path.relative_to(ROOT)) for path in own), rest)


def listed(path: Path) -> list[Edit]:
    """The edits of a file of tests/edits, each with the one test that must fail."""
    found = []
    for row in tomllib.loads(path.read_text(encoding="utf-8")).get("edit", ()):
        source = (ROOT / row["file"]).read_text(encoding="utf-8")
        if source.count(row["was"]) != 1:
            sys.exit(f"error: {path}: {row['was']!r} is not once in {row['file']}; mend the entry")
        code = source.replace(row["was"], row["becomes"])
        found.append(edit(row["file"], source, code, (row["caught_by"],)))
    return found


def unseen() -> set[tuple[str, str, str]]:
    rows = [r for p in EDITS.glob("*.toml") for r in tomllib.loads(p.read_text()).get("unseen", ())]
    return {(row["file"], row["was"], row["becomes"]) for row in rows}


class _Instead(importlib.abc.MetaPathFinder):
    """Reads one module from another file; its `__file__` is still the real one."""

    def __init__(self, file: str, path: Path) -> None:
        parts = Path(file).with_suffix("").parts
        self.name = ".".join(part for part in parts if part not in ("kernels", "__init__"))
        self.real, self.loader = ROOT / file, SourceFileLoader(self.name, str(path))
        self.inside = [str((ROOT / file).parent)] if file.endswith("__init__.py") else None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self.real, loader=self.loader, submodule_search_locations=self.inside
        )


def start(tried: Edit, folder: Path) -> int:
    """A process that runs an edit's tests until one fails, and says so by its exit code."""
    path = folder / Path(tried.file or "none").name
    path.write_text(tried.code, encoding="utf-8")
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    code = 1
    try:
        if tried.file:
            sys.meta_path.insert(0, _Instead(tried.file, path))
        own = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        own.append(f"--basetemp={folder / 'tmp'}")
        # One after the other: the first mostly notices, and to collect them all takes longer than to run it.
        for number, test in enumerate(tried.tests):
            before = [f"--ignore={other}" for other in tried.tests[:number]]
            # A listed edit names its test, slow or not.
            chosen = [] if "::" in test else ["-m", "not slow", *before]
            code = int(pytest.main([*own, *chosen, test]))
            if code not in (0, 5):
                break
    finally:
        sys.stdout.flush()
        os._exit(code)


@dataclass
class Outcome:
    edit: Edit
    code: int
    """pytest's exit code, or `LATE`."""
    output: str
    seconds: float

    @property
    def caught(self) -> bool:
        # What kills a process so is the system, for its memory.
        return self.code not in (0, 5, -signal.SIGKILL)


def attempt(edits: list[Edit], limit: float, jobs: int) -> Iterator[Outcome]:
    """Every edit's outcome, `jobs` at a time."""
    waiting, running = edits[::-1], {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = Path(temporary, str(len(waiting)))
                    folder.mkdir()
                    tried = waiting.pop()
                    pid = start(tried, folder)
                    running[pid] = (tried, folder, time.monotonic())
                for pid, (tried, folder, began) in list(running.items()):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    seconds = time.monotonic() - began
                    if not done and seconds <= limit:
                        continue
                    _kill(pid)
                    if not done:
                        os.waitpid(pid, 0)
                    del running[pid]
                    code = os.waitstatus_to_exitcode(status) if done else LATE
                    output = (folder / "out").read_text(errors="replace")
                    shutil.rmtree(folder, ignore_errors=True)
                    yield Outcome(tried, code, output, seconds)
                time.sleep(0.02)
        finally:
            for pid in running:
                _kill(pid)
                os.waitpid(pid, 0)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def chosen_files(only: str) -> dict[str, list[str]]:
    """Files by package; `only` is a package, a folder or a file."""
    folders = {name: sources for name, (sources, _) in PACKAGES.items()}
    if only and only not in folders:
        folders = {only: only}
    elif only:
        folders = {only: folders[only]}
    return {
        name: [folder]
        if folder.endswith(".py")
        else sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py"))
        for name, folder in folders.items()
    }


def chosen_edits(files: list[str], count: int | None) -> list[Edit]:
    """The same of a file's places as long as its lines stay the same."""
    found = sorted((place for file in files for place in places(file)), key=lambda p: p.key)
    known, edits = unseen(), []
    for place in found:
        made = generated(place)
        if made and (made.file, made.was, made.becomes) not in known:
            edits.append(made)
        if len(edits) == count:
            break
    return edits


def seconds_without(work: dict[str, list[Edit]], jobs: int) -> dict[str, float]:
    """How long the tests of each part take without an edit; ends the program unless they pass."""
    names = {}
    for name, edits in work.items():
        tests = tuple(dict.fromkeys(test for edit in edits for test in edit.tests))
        if tests:
            names[Edit("", "", 0, "", name, tests)] = name
    found = {}
    for outcome in attempt(list(names), math.inf, jobs):
        name = names[outcome.edit]
        if outcome.caught:
            sys.exit(
                f"{outcome.output}\nerror: {name}: these tests do not pass without an edit; mend them first"
            )
        found[name] = outcome.seconds
    return found


def _part(given: str) -> str:
    """What `--only` may be."""
    given = given.rstrip("/")
    sources = [sources for sources, _ in PACKAGES.values()]
    inside = any(f"{given}/".startswith(f"{s}/") for s in ("perl", *sources))
    if given in (*PACKAGES, "lists") or (inside and (ROOT / given).exists()):
        return given
    raise argparse.ArgumentTypeError(
        f"{given}: give {', '.join(PACKAGES)}, lists, or a folder or file of perl/ or kernels/perl_kernels/"
    )


def _count(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given}: give 1 or more")
    return int(given)


def main() -> None:
    parser = argparse.ArgumentParser("make mutants", description=__doc__.split("\n")[0])
    choices = f"one of {', '.join(PACKAGES)}; a folder or file of them; or lists: tests/edits"
    parser.add_argument("--only", default="", type=_part, help=choices)
    parser.add_argument("--sample", type=_count, default=60, help="edits of each package (60)")
    parser.add_argument("--all", action="store_true", help="every edit instead of a sample")
    limit = "time limit of an edit in seconds (240), and at least 3 times that of its tests"
    parser.add_argument("--limit", type=float, default=240, help=limit)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=_count, default=cores, help="edits at a time (the cores)")
    parser.add_argument("-v", action="store_true", help="say which test noticed an edit")
    options = parser.parse_args()
    os.chdir(ROOT)
    # So that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for module in PRELOADED.split():
        importlib.import_module(module)
    # tqdm's own lock is shared with forked processes, which may be killed while they hold it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    count = None if options.all else options.sample
    work: dict[str, list[Edit]] = {}
    if options.only != "lists":
        for name, files in chosen_files(options.only).items():
            work[name] = chosen_edits(files, count)
    if options.only in ("", "lists"):
        for path in sorted(EDITS.glob("*.toml")):
            work[f"edits/{path.stem}"] = listed(path)
    rows, seconds = [], seconds_without(work, options.jobs)
    for name, edits in work.items():
        began, caught, late = time.monotonic(), 0, 0
        outcomes = attempt(edits, max(options.limit, 3 * seconds.get(name, 0)), options.jobs)
        for outcome in tqdm(outcomes, name, len(edits), leave=False, disable=None):
            caught += outcome.caught
            late += outcome.code == LATE
            failed = [x for x in outcome.output.splitlines() if x.startswith(("FAILED", "ERROR"))]
            if not outcome.caught:
                tqdm.write(f"not noticed: {outcome.edit}")
            elif options.v:
                tqdm.write(f"{failed[:1] or outcome.code}: {outcome.edit}")
        share = f"{caught / len(edits):.0%}" if edits else "-"
        minutes = (time.monotonic() - began) / 60
        rows.append(f"| {name} | {len(edits)} | {caught} | {late} | {share} | {minutes:.1f} |")
    print("\n| package | edits | noticed | by the time limit | share | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
