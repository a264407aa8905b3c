"""Rows side by side: who took how much longer than this repository at the same work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.results_file import Row

_PREFERRED = ("Triton", "PyTorch")
"""Backends that ratios refer to, the first that was timed: a GPU's, a CPU's."""


@dataclass(frozen=True)
class Case:
    """An operation at one size, by all its providers."""

    op: str
    name: str
    rows: Sequence[Row]

    @cached_property
    def reference(self) -> Row | None:
        """The row of ours that the others are compared with; None where none of ours was timed."""
        return min((r for r in self.rows if r.ours and r.timed), key=_preference, default=None)

    def ratio(self, row: Row) -> float | None:
        """Its time over ours: more than 1 is slower than ours."""
        if not (row.median and row.timed and self.reference and self.reference.median):
            return None
        return row.median / self.reference.median

    @property
    def ordered(self) -> list[Row]:
        """The fastest first; those without a time last, as they came."""
        return sorted(self.rows, key=lambda r: (not r.timed, r.median if r.timed else 0.0))


def _preference(row: Row) -> int:
    places = [i for i, name in enumerate(_PREFERRED) if name in row.provider]
    return places[0] if places else len(_PREFERRED)


def by_op(rows: Iterable[Row]) -> dict[str, list[Case]]:
    """Cases of every operation, in the order of the rows.

    A size that was measured by itself and as a part of a series is two cases: their rows took turns apart.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.axis), []).append(row)
    sizes = Counter((op, name) for op, name, _ in found)
    ops: dict[str, list[Case]] = {}
    for (op, name, axis), members in found.items():
        again = f" (series over {axis})" if axis and sizes[op, name] > 1 else ""
        ops.setdefault(op, []).append(Case(op, name + again, members))
    return ops


@dataclass
class Peer:
    """Somebody else's implementation over the cases of an operation."""

    provider: str
    ratios: list[float] = field(default_factory=list)
    """Where both it and ours were timed."""
    cases: int = 0
    """Where it was to take part."""


def peers(cases: Iterable[Case]) -> list[Peer]:
    found: dict[str, Peer] = {}
    for case in cases:
        for row in case.rows:
            if row.ours:
                continue
            peer = found.setdefault(row.provider, Peer(row.provider))
            peer.cases += 1
            if ratio := case.ratio(row):
                peer.ratios.append(ratio)
    return list(found.values())
