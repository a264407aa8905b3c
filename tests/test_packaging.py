"""The files that say what PeRL is, needs and offers agree with each other."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import perl
import perl_kernels

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]

# flash-attn builds only where there is a CUDA toolkit, so make setup leaves it out.
INSTALLED_EXTRAS = EXTRAS.keys() - {"flash"}
REQUIREMENTS = {
    requirement.name: requirement
    for line in [
        *PROJECT["dependencies"],
        *(line for extra in INSTALLED_EXTRAS for line in EXTRAS[extra]),
    ]
    if (requirement := Requirement(line)).name != PROJECT["name"]
}
PINS = {
    canonicalize_name(name): pinned
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for name, pinned in [line.split("==")]
}


def test_versions_agree() -> None:
    assert version("perl-rl") == PROJECT["version"]
    assert perl.__version__ == PROJECT["version"]
    assert perl_kernels.__version__ == PROJECT["version"]


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_documents_name_the_version(document: str) -> None:
    assert PROJECT["version"] in (ROOT / document).read_text(encoding="utf-8")


def test_the_command_is_installed() -> None:
    points = distribution("perl-rl").entry_points
    scripts = {point.name: point.value for point in points.select(group="console_scripts")}
    assert scripts == {"perl-rl": "perl.cli:main"}


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_a_dependency_is_pinned_within_its_range(name: str) -> None:
    assert REQUIREMENTS[name].specifier.contains(PINS[canonicalize_name(name)])


def test_pins_carry_no_local_version() -> None:
    """torch==2.13.0+cpu could be installed only where that build lies; torch==2.13.0 takes any build."""
    assert [name for name, pinned in PINS.items() if "+" in pinned] == []


def test_dev_installs_every_other_extra_but_those_for_a_gpu_and_mutants() -> None:
    included = {"flash", "bench-cutedsl", "mutants", "dev"}
    pending = ["dev"]
    while pending:
        for requirement in map(Requirement, EXTRAS[pending.pop()]):
            if requirement.name == PROJECT["name"]:
                pending += requirement.extras - included
                included |= requirement.extras
    assert included == EXTRAS.keys()


def test_packages_are_typed_and_complete() -> None:
    folders = [ROOT / folder for folder in PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"]]
    assert [folder.name for folder in folders] == ["perl", "perl_kernels"]
    for folder in folders:
        assert (folder / "py.typed").exists()
    assert (ROOT / "perl" / "recipes" / "demo.toml").exists()
    assert any((ROOT / "perl" / "report" / "templates").iterdir())


def test_a_wheel_with_native_code_names_its_platform() -> None:
    sources = list((ROOT / "kernels" / "csrc").glob("*.cpp"))
    assert PYPROJECT["tool"]["scikit-build"]["wheel"].get("platlib", True) == bool(sources)


def test_make_lists_its_targets() -> None:
    listing = subprocess.run(
        ["make", "-C", ROOT], capture_output=True, text=True, check=True
    ).stdout
    targets = set(re.findall(r"^make (\w+) ", listing, re.MULTILINE))
    assert targets >= {"help", "setup", "demo", "test", "lint", "bench", "clean"}
