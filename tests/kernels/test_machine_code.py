"""What Triton's compiler makes of the kernels that the public functions launch, without a GPU: few
instructions, no spills, 128-bit loads and stores, and nothing compiled twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import machine_code
from benchmarks.machine_code import ARCHITECTURES, CASES, COLUMNS, Code, Loop
from tests.messages import refused

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "kernels.md"
ROW_KERNELS = {"row_stats_kernel": 1, "row_gradient_kernel": 1, "row_loss_kernel": 2}


def output(module: str, *arguments: str) -> Any:
    """What a module prints where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def codes() -> list[Code]:
    rows = output("benchmarks.machine_code", "--json")
    for row in rows:
        row["loops"] = [Loop(**loop) for loop in row["loops"]]
    return [Code(**row) for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_kernel_spills(codes: list[Code]) -> None:
    found = {
        (code.kernel, code.case, code.architecture, code.stack, code.spills)
        for code in codes
        if code.stack or code.spills or not code.blocks
    }
    assert not found
    assert {code.architecture for code in codes} == {*ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_row_costs_few_instructions(codes: list[Code]) -> None:
    """10 an element for the statistics and 8 for the gradient; 20 and 22 with everything."""
    rows = [code for code in codes if code.kernel in ROW_KERNELS]
    for code in rows:
        statistics, gradient = (20, 22) if "everything" in code.case else (10, 8)
        assert len(code.loops) == ROW_KERNELS[code.kernel], code
        for loop in code.loops:
            assert loop.instructions <= (gradient if loop.stores else statistics), code
            assert {*loop.loads, *loop.stores} == {"128"}, code
    for kernel in ROW_KERNELS:
        assert {code.columns for code in rows if code.kernel == kernel} == {*COLUMNS}
    assert {code.case for code in rows} == {case.name for case in CASES if case.columns != (0,)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_document_lists_the_kernels(codes: list[Code]) -> None:
    """Not their registers and instructions, which change with the version of Triton."""
    text = DOCUMENT.read_text(encoding="utf-8")
    _, _, after = text.partition(machine_code.HEADING)

    def lines(table: str) -> list[tuple[str, ...]]:
        return re.findall(r"^\| `(\w+)` \| (.*?) \| ([\d, ]*?) ?\|", table, re.MULTILINE)

    listed = lines(after)
    assert listed == lines(machine_code.markdown(codes)), (
        "python -m benchmarks.machine_code --write"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_kind_of_call_compiles_once() -> None:
    found = output("tests.kernels.every_variant")
    assert not found["failed"] and not found["drops NaN"]
    assert not {name: kernels for name, kernels in found["again"].items() if kernels}
    assert len(found["again"]) >= 10 and min(found["variants"].values()) >= 1
    assert found["variants"].keys() >= ROW_KERNELS.keys()
    # Before threads read or write what others have written; the interpreter needs none.
    assert found["barriers"] == {
        "row_gradient_kernel": [2],
        "row_loss_kernel": [0, 2],
        "loss_kernel": [0, 1],
        "group_kernel": [0, 1],
    }


SASS = """
        /*0000*/                   LDG.E.128 R8, desc[UR4][R2.64] ;            /* 0x0 */
        /*0010*/                   MUFU.EX2 R1, R2 ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/              @!P0 LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0040*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0050*/               @P0 BRA 0x0 ;
        /*0060*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA.U !UP0, 0x60 ;
        /*0080*/               @P1 BRA 0x0 ;
        /*0090*/                   EXIT ;
"""


def test_what_is_read_of_the_machine_code() -> None:
    """The inner loop with an exponential, not the one around it nor the one without."""
    assert machine_code.loops(SASS, 4) == [Loop(1.5, {"16": 1, "128": 1}, {"64": 1})]
    # 65536 registers: 168 * 256 of a block of 8 warps fit once, 64 * 256 four times.
    assert machine_code.blocks(90, 8, 168, 1024) == 1
    assert machine_code.blocks(90, 8, 64, 0) == 4
    assert machine_code.blocks(80, 8, 32, 100 * 1024) == 1


def test_what_is_written_of_it(tmp_path: Path) -> None:
    common = {"code": "a", "warps": 8, "shared": 0, "stack": 0, "spills": 0, "blocks": 4}
    loops = [Loop(9.25, {"128": 4}, {}), Loop(6.5, {"128": 4}, {"64": 4})]
    table = [
        Code("row", "call", columns, number, registers=64 - number // 90, loops=loops, **common)
        for columns in (5, 7)
        for number in (80, 90, 100)
    ]
    line = "| `row` | call | 5, 7 | 9.2 + 6.5 | 128 + 128, 64 | 64 / 63 / 63 | 0 | 0 | 50% |"
    written = machine_code.markdown(table)
    assert written.splitlines()[2:] == [line]
    document = f"a\n\n{machine_code.HEADING}\n\n| old |\n\nb\n"
    assert machine_code.replace_table(document, "| new |") == document.replace("old", "new")
    with pytest.raises(ValueError, match=machine_code.HEADING):
        machine_code.replace_table("# Kernels\n", "| new |")


def test_kernels_of_the_interpreter_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code.knobs.runtime, "interpret", True)
    with refused("TRITON_INTERPRET", error=RuntimeError):
        machine_code.measure_all()
