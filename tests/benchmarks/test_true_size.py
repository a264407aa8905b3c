"""Resident memory and seconds by stage."""

import sys

import pytest

from benchmarks.true_size import Resident, stages

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts the memory of a stage")
def test_memory_is_that_of_the_stage_and_of_what_lies_in_it() -> None:
    resident = Resident()
    resident.enter("large")
    resident.enter("inner")
    block = bytearray(256 * MIB)  # Which is written to.
    assert len(block) == 256 * MIB
    del block
    resident.leave("inner")
    resident.leave("large")
    for _ in range(2):
        resident.enter("small")
        resident.leave("small")
    rows = resident.rows
    assert list(rows) == ["load", "large", "small"]
    # To a few pages that Python itself takes and gives back.
    assert rows["large"]["peak"] - rows["small"]["peak"] == pytest.approx(256 * MIB, abs=16 * MIB)
    assert rows["large"]["end"] == pytest.approx(rows["small"]["end"], abs=16 * MIB)
    assert rows["small"]["mapped"] < rows["small"]["peak"]


def test_a_plan_stands_beside_the_stages_that_it_knows() -> None:
    """Without what it keeps back of a GPU."""
    row = {"seconds": 1.0, "cpu_seconds": 1.0, "peak": 9e9, "end": 8e9, "mapped": 7e9}
    plan = {"memory": {"update": {"parameters": 5e9, "activations": 1.5e9, "reserve": 2e9}}}
    *_, load, update = stages({"load": row, "update": row}, plan).splitlines()
    cells = [line.split("|")[-2].strip() for line in (load, update)]
    assert cells == ["-", "6.50"]
