"""The machine code of every kernel, compiled without a GPU: no spills, wide loads, wgmma."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from perl_kernels import resources
from perl_kernels.resources import Resources, replace_table
from tests.messages import refused

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "kernels.md"

# In the order of the table; the variants are only known to a process without TRITON_INTERPRET.
EXPECTATIONS = {
    "spills to local memory": lambda row: row.spills == 0,
    "has a stack frame": lambda row: row.stack == 0,
    "has no 128-bit or TMA load": lambda row: row.has_vector_loads or not row.wants_vector_loads,
    "has no HGMMA": lambda row: row.has_wgmma or not row.wants_wgmma,
    "does not fit on a multiprocessor": lambda row: row.blocks >= 1,
}


@pytest.fixture(scope="session")
def compiled() -> list[Resources]:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    result = subprocess.run(
        [sys.executable, "-m", "perl_kernels.resources", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    table = [Resources(**row) for row in json.loads(result.stdout)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{len(table)} variants in {time.monotonic() - start:.0f} s, {cpu:.0f} s of CPU")
    return table


@pytest.mark.slow
@pytest.mark.parametrize("fault", EXPECTATIONS)
def test_no_variant(fault: str, compiled: list[Resources]) -> None:
    holds = EXPECTATIONS[fault]
    found = [f"{x.kernel}, {x.variant}, sm_{x.architecture}" for x in compiled if not holds(x)]
    assert not found, f"{fault}: {'; '.join(found)}"


@pytest.mark.slow
def test_wgmma_is_looked_for(compiled: list[Resources]) -> None:
    assert any(row.wants_wgmma for row in compiled)
    assert any(row.wants_vector_loads for row in compiled)
    assert {row.architecture for row in compiled} >= {90, 100}


@pytest.mark.slow
def test_variants_are_told_apart(compiled: list[Resources]) -> None:
    keys = [(row.kernel, row.variant, row.architecture) for row in compiled]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_the_document_lists_the_variants(compiled: list[Resources]) -> None:
    """Not their registers, which change with the version of Triton."""
    document = DOCUMENT.read_text(encoding="utf-8")
    _, _, table = document.partition(resources.HEADING)
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \| sm_(\d+) \|", table, re.MULTILINE)
    assert listed == [(row.kernel, row.variant, str(row.architecture)) for row in compiled], (
        "run python -m perl_kernels.resources --write docs/kernels.md"
    )


@pytest.mark.slow
def test_the_document_says_what_each_kernel_does(compiled: list[Resources]) -> None:
    before, _, _ = DOCUMENT.read_text(encoding="utf-8").partition("## Resources")
    described = set(re.findall(r"^\| `(\w+)` \|", before, re.MULTILINE))
    assert described == {row.kernel for row in compiled}


def test_only_the_table_of_a_document_is_replaced() -> None:
    document = f"| kept |\n\n{resources.HEADING}\n\na\n\n| old |\n|---|\n\nb\n\n| kept |\n"
    once = replace_table(document, "| new |")
    assert once == f"| kept |\n\n{resources.HEADING}\n\na\n\n| new |\n\nb\n\n| kept |\n"
    assert replace_table(once, "| new |") == once
    with refused("'## Resources'", error=ValueError):
        replace_table("| elsewhere |\n", "| new |")


def test_occupancy_follows_the_scarcest_resource() -> None:
    blocks = resources._blocks
    assert blocks(90, 8, 255, 0, 0) == 1  # registers: 65536 / (255 -> 256) / 256 threads
    assert blocks(90, 4, 128, 0, 0) == 4  # registers
    assert blocks(90, 4, 32, 196640, 0) == 1  # shared memory
    assert blocks(80, 4, 32, 54 * 1024, 0) == 2  # shared memory, 1 KB of it reserved per block
    assert blocks(90, 8, 32, 0, 0) == 8  # 64 warps
    assert blocks(90, 1, 32, 0, 0) == 32  # 32 blocks
    assert blocks(100, 4, 32, 0, 256) == 2  # tensor memory: 512 columns


@pytest.mark.slow
def test_every_variant_compiles() -> None:
    """As far as Triton's intermediate form; the machine code is that of the launch cases."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    script = Path(__file__).with_name("every_variant.py")
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "FAILED" not in result.stdout, result.stdout
    assert int(result.stdout.split()[0]) > 300
