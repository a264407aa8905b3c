"""What processes wait for each other is counted row by row, beside rows that each packs by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import balance
from benchmarks.balance import Case, measured, packed_alone
from perl.model.packed.plan import Load
from perl.training.parallel.balancing import ModelFlops
from perl.training.parallel.rows import GroupSize, plan_rows

TOKENS = ModelFlops(token=1.0, pair=0.0, scored=0.0, visual=0.0)


def test_equal_sums_wait_where_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have 16,000 tokens in two rows, one 9,000 and 7,000, the other 6,000 and 10,000."""
    monkeypatch.setattr(balance, "FLOPS", TOKENS)
    sizes = [
        GroupSize(owner, (Load(tokens, ()),))
        for owner, tokens in ((0, 9000), (0, 7000), (1, 6000), (1, 10_000))
    ]
    case = Case("", 2, lambda _: sizes, 10_000)
    alone = packed_alone(sizes, 2, case.budget)
    assert measured(sizes, alone, case) == (1 - 16 / 19, 19_000, 0, 2)
    together = plan_rows(sizes, 2, TOKENS, case.budget)
    assert measured(sizes, together, case) == (1 - 16 / 17, 17_000, 0, 2)
    # Of 37,000 and 16,000 two of 6,000 move; three of these and 10,000 are four rows.
    more = [*sizes, sizes[0], replace(sizes[2], owner=0), replace(sizes[2], owner=0)]
    assert measured(more, packed_alone(more, 2, case.budget), case)[2:] == (2, 4)
