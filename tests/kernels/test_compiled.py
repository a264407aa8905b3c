"""The machine code of every kernel, compiled without a GPU: no spills, wide loads, wgmma."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from perl_kernels import resources
from perl_kernels.resources import Resources, replace_table
from perl_kernels.triton_backend.compile_case import CompileCase
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


FLAGS = {"HAS_ENTROPY": "by_entropy_ptr", "HAS_REF": "ref_ptr", "HAS_NORMALIZER": "normalizer_ptr"}
CASES = [case for module in resources.MODULES for case in resources._cases(module)]


def test_the_document_lists_the_variants() -> None:
    """With their warps; not their registers, which change with the version of Triton."""
    before, _, table = DOCUMENT.read_text(encoding="utf-8").partition(resources.HEADING)
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \| sm_(\d+) \| (\d+) \|", table, re.MULTILINE)
    found = [
        (case.kernel.__name__, case.name, str(architecture), str(case.num_warps))
        for case in CASES
        for architecture in case.architectures
    ]
    assert listed == found, "run python -m perl_kernels.resources --write docs/kernels.md"
    assert len({variant[:3] for variant in found}) == len(found)
    described = set(re.findall(r"^\| `(\w+)` \|", before, re.MULTILINE))
    assert described == {case.kernel.__name__ for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel.__name__}, {case.name}")
def test_a_case_is_a_launch(case: CompileCase) -> None:
    """Each argument once: a constant where the kernel says so, or where it is left out."""
    given = [*case.signature, *case.constexprs]
    assert sorted(given) == sorted(case.kernel.arg_names)
    parameters = inspect.signature(case.kernel.fn).parameters
    constants = {name for name, x in parameters.items() if "constexpr" in str(x.annotation)}
    assert constants == {name for name, x in case.constexprs.items() if x is not None}
    for flag, pointer in FLAGS.items():
        if {flag, pointer} <= {*given}:
            assert case.constexprs[flag] == (pointer in case.signature), flag
    sizes = [x for x in case.constexprs.values() if type(x) is int]
    assert all(size & (size - 1) == 0 for size in sizes), "Triton's blocks are powers of two"
    assert {*case.divisible_by_16} <= {*case.signature}
    for name in case.divisible_by_16:
        # A vector load needs its address, and the stride from row to row, to be a multiple of 16.
        assert case.signature[name] == "i32" or case.signature[name].startswith("*"), name


def test_what_is_read_of_the_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    index, case = next((i, x) for i, x in enumerate(resources._cases("persistent")) if x.wgmma)
    asked = []

    def compiled(source: object, target: object, options: dict[str, object]) -> object:
        asked.append((target, options))
        metadata = SimpleNamespace(num_warps=8, shared=1024, tmem_size=None)
        return SimpleNamespace(asm={"cubin": b"code"}, metadata=metadata)

    def dumped(cubin: str, option: str) -> str:
        assert Path(cubin).read_bytes() == b"code"
        code = "LDL R1; STL.64 [R2]; LDLX; HGMMA.64x256x16.F32; LDG.E.128 R4"
        return {"-res-usage": " REG:168 STACK:16 SHARED:0", "-sass": code}[option]

    monkeypatch.setattr(resources, "_source", lambda case: case)
    monkeypatch.setattr(resources.triton, "compile", compiled)
    monkeypatch.setattr(resources, "_dump", dumped)
    found = resources._measure(("persistent", index, 90))
    kept = {"num_warps": 8, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    assert asked == [(GPUTarget("cuda", 90, 32), kept)]
    # 65536 / (168 * 256) registers: one block
    code = {"registers": 168, "shared": 1024, "stack": 16, "spills": 2, "blocks": 1}
    has = {"has_vector_loads": True, "has_wgmma": True, "wants_wgmma": True}
    name = {"kernel": "_tile_statistics", "variant": case.name, "architecture": 90, "warps": 8}
    assert found == Resources(**name, **code, **has, wants_vector_loads=True)
    assert not resources._measure(("persistent", index, 100)).wants_wgmma


def test_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usage = (8, 128, 2048, 0, 0, 2, True, False, True, False)
    table = [Resources("row_stats_kernel", "bf16", 90, *usage)]
    monkeypatch.setattr(resources, "measure_all", lambda: table)
    monkeypatch.setattr(resources.knobs.runtime, "interpret", False)
    row = "| `row_stats_kernel` | bf16 | sm_90 | 8 | 128 | 2048 | 0 | 0 | 2 | 25% |"
    assert resources._main([]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2:] == [row]
    assert resources._main(["--json"]) == 0
    assert [Resources(**x) for x in json.loads(capsys.readouterr().out)] == table
    document = tmp_path / "kernels.md"
    document.write_text(f"a\n\n{resources.HEADING}\n\n| old |\n\nb\n")
    assert resources._main(["--write", str(document)]) == 0
    assert document.read_text() == f"a\n\n{resources.HEADING}\n\n{printed}\nb\n"


def test_kernels_of_the_interpreter_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.knobs.runtime, "interpret", True)
    with refused("TRITON_INTERPRET", error=RuntimeError):
        resources.measure_all()
    # The command goes on in a process that is not told to interpret.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = []

    def run(command: list[str], env: dict[str, str]) -> object:
        ran.append((command[1:], "TRITON_INTERPRET" in env, "PATH" in env))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(resources.subprocess, "run", run)
    assert resources._main(["--json"]) == 3
    assert ran == [(["-m", "perl_kernels.resources", "--json"], False, True)]


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
    assert int(result.stdout.split()[0]) > 150
