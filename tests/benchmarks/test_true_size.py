"""Resident memory and seconds by stage."""

import sys

import pytest

from benchmarks.true_size import Resident

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
