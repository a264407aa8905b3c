"""Who may import whom, read off the source, and what an import costs."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"perl": ROOT, "perl_kernels": ROOT / "kernels"}
HEAVY = ("transformers", "datasets", "sklearn")


def module_name(file: Path, source_root: Path) -> str:
    parts = file.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(file, source_root): file
    for package, source_root in SOURCE_ROOTS.items()
    for file in sorted((source_root / package).rglob("*.py"))
}


@cache
def imported(module: str) -> set[str]:
    """Modules named by the import statements of `module`, those inside functions and TYPE_CHECKING too.

    Example: `from perl.types import Example` gives `perl.types`, `from perl import types` too.
    """
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            members = {f"{base}.{alias.name}" for alias in node.names}
            submodules = members & MODULES.keys()
            names |= submodules if submodules else {base}
    return names


def ours(module: str) -> set[str]:
    return {name for name in imported(module) if name.split(".")[0] in SOURCE_ROOTS}


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


ORDER = (
    (
        "types",
        "config",
        "recipe",
        "files",
        "kept",
        "lock",
        "paths",
        "failures",
        "llm",
        "missing",
        "distributed",
        "timing",
    ),
    ("permutation",),
    ("rewards",),
    ("report",),
    ("model",),
    ("data",),
    ("rollout",),
    ("evaluation",),
    ("training",),
    ("cli", "__main__"),
)
"""Each package of `perl` imports only what stands before it; the files of the first line each other, without circles."""
PLACE = {name: i for i, names in enumerate(ORDER) for name in names}


def package_of(module: str) -> str:
    """`perl.model.packed.plan` lies in the package `model`, `perl.types` in the file `types`."""
    return module.split(".")[1] if "." in module else module


def arrows() -> dict[str, dict[str, list[str]]]:
    """Package -> package that it imports -> the modules that do."""
    found: dict[str, dict[str, list[str]]] = {}
    for module in MODULES:
        if in_package(module, "perl") and module != "perl":
            own = found.setdefault(package_of(module), {})
            for name in ours(module):
                if in_package(name, "perl") and package_of(name) != package_of(module):
                    own.setdefault(package_of(name), []).append(module)
    return found


def test_the_packages_were_found() -> None:
    assert {"perl.types", "perl.training.train", "perl.cli", "perl_kernels.objective"} <= set(
        MODULES
    )
    assert set(arrows()) == set(PLACE)
    assert "types" in arrows()["permutation"] and "perl_kernels" in ours("perl.model.head")
    assert "perl_kernels.objective" in ours("perl_kernels")  # a relative import


def test_packages_import_only_what_stands_before_them() -> None:
    for package, imports in arrows().items():
        for other, modules in imports.items():
            before = PLACE[other] < PLACE[package] or PLACE[other] == PLACE[package] == 0
            assert before or (package, other) == ("__main__", "cli"), f"{modules} import {other}"


def test_no_file_imports_in_a_circle() -> None:
    """Not even within a package, nor in functions."""
    graph = {module: {name for name in ours(module) if name in MODULES} for module in MODULES}
    doors = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    while free := {m for m, names in graph.items() if not (names - doors) & graph.keys()}:
        graph = {m: names for m, names in graph.items() if m not in free}
    assert not graph, sorted(graph)


@pytest.mark.parametrize("package", ["permutation", "rewards", "report"])
def test_what_needs_no_model_needs_no_torch(package: str) -> None:
    for module in MODULES:
        if in_package(module, f"perl.{package}"):
            assert not {"torch", "transformers"} & {n.split(".")[0] for n in imported(module)}


def test_only_the_head_the_advantages_and_the_doctor_import_the_kernels() -> None:
    users = {
        module
        for module in MODULES
        if in_package(module, "perl")
        and any(in_package(name, "perl_kernels") for name in imported(module))
    }
    assert users == {"perl.model.head", "perl.rollout.advantages", "perl.training.doctor"}


def test_no_folder_is_crowded() -> None:
    folders = Counter(file.parent for name, file in MODULES.items() if in_package(name, "perl"))
    assert max(folders.values()) <= 16, folders.most_common(3)


def test_the_kernels_stand_alone() -> None:
    """torch, triton and the standard library; an adapter in integrations/ may import what it adapts to."""
    allowed = {"perl_kernels", "torch", "triton", *sys.stdlib_module_names}
    for module in MODULES:
        if in_package(module, "perl_kernels"):
            roots = {name.split(".")[0] for name in imported(module)}
            assert "perl" not in roots, module
            if not in_package(module, "perl_kernels.integrations"):
                assert roots <= allowed, module


def test_whatever_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    declared.add(
        "vllm"
    )  # Only where it is there: the plug-in runs in it, and it moves weights between GPUs.
    for module in MODULES:
        if not in_package(module, "perl_kernels.integrations"):
            for root in {name.split(".")[0] for name in imported(module)}:
                if root not in SOURCE_ROOTS and root not in sys.stdlib_module_names:
                    owners = {canonicalize_name(owner) for owner in distributions.get(root, [root])}
                    assert owners & declared, f"{module} imports {root}"


def test_kernels_is_a_folder_and_no_package() -> None:
    """With an __init__.py it would be imported in place of PyPI's `kernels`, which transformers uses."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run_python(*args: str) -> str:
    paths = [str(root) for root in SOURCE_ROOTS.values()]
    result = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def cpu_seconds(before: str, code: str) -> float:
    """Of this code, after the other, in a process of its own, which must not import what is heavy."""
    shown = f"print(time.process_time() - start, *(m for m in {HEAVY} if m in sys.modules))"
    lines = ("import sys, time", before, "start = time.process_time()", code, shown)
    seconds, *heavy = run_python("-c", "\n".join(lines)).splitlines()[-1].split()
    assert not heavy
    return float(seconds)


def test_importing_the_kernels_costs_at_most_a_second_beyond_torch() -> None:
    assert any(cpu_seconds("import torch", "import perl_kernels") <= 1.0 for _ in range(3))


def test_help_takes_at_most_a_fifth_of_a_second() -> None:
    code = "from perl.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert any(cpu_seconds("", code) <= 0.2 for _ in range(3))


def test_the_kernels_import_without_triton() -> None:
    """As where torch is a CPU build, which does not bring it."""
    run_python("-c", "import sys; sys.modules['triton'] = None; import perl_kernels")
