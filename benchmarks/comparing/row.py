"""One case of the comparison: measured on both sides, or why not."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks.comparing.ratio import Ratio
from benchmarks.comparing.rounds import contend
from benchmarks.comparing.side import Ended, Side

_FAILURES = {"slower", "more memory", "wrong", "failed"}


class Case(NamedTuple):
    """An implementation of this repository's in one contest."""

    module: str
    op: str
    case: str
    provider: str

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.op, self.case, self.provider) if part)


@dataclass
class Row:
    """Times are seconds of a call, one per round; peaks, BASE's and HEAD's, are bytes beyond the inputs, None where
    PyTorch's allocators do not see the work."""

    case: Case
    verdicts: list[str]
    """`slower`, `faster`, `same`, `unclear`, beside it `more memory`; or one of `wrong` (HEAD's result), `failed` (HEAD
    raises an error), `wrong in BASE`, `not in BASE`, `fails in both`, `unavailable` (not made for this machine)."""
    reason: str = ""
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    peaks: tuple[int, int] | None = None
    ratio: Ratio | None = None

    @property
    def differs(self) -> bool:
        return not {"slower", "faster"}.isdisjoint(self.verdicts)

    @property
    def failure(self) -> bool:
        return not _FAILURES.isdisjoint(self.verdicts)

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.base), statistics.median(self.head)

    @property
    def more_memory(self) -> bool:
        """Whether HEAD's peak is above BASE's by more than 5 % and more than 1 MiB."""
        base, head = self.peaks or (0, 0)
        return head > max(1.05 * base, base + 2**20)

    def asdict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            **self.case._asdict(),
            "verdict": ", ".join(self.verdicts),
            "reason": self.reason,
        }
        if self.ratio is None:
            return row
        return row | {
            "base": {"seconds": self.base, "peak_extra_bytes": self.peaks and self.peaks[0]},
            "head": {"seconds": self.head, "peak_extra_bytes": self.peaks and self.peaks[1]},
            "ratio": self.ratio.median,
            "interval": [self.ratio.low, self.ratio.high],
        }


def measure(case: Case, base: Side, head: Side, budget: float, threshold: float) -> Row:
    """Prove the case on both sides, then time it in turn; a side that crashes is started again."""
    after = _enter(head, case)
    if after["state"] == "unavailable":
        return Row(case, ["unavailable"], after["reason"])
    before = _enter(base, case)
    if row := without_times(case, before, after):
        return row
    call = max(1e-9, min(before["seconds"], after["seconds"]))
    cuda = head.machine["kind"] == "cuda"
    try:
        seconds, others, found = contend(base, head, call, cuda, budget, threshold)
    except Ended as error:
        blame = "failed" if head.gone else "not in BASE"
        for side in (base, head):
            if side.gone:
                side.restart()
        return Row(case, [blame], str(error))
    peaks = None if after["peak"] is None else (before["peak"], after["peak"])
    row = Row(case, [found.verdict(threshold)], "", seconds, others, peaks, found)
    if row.more_memory:
        row.verdicts.append("more memory")
    return row


def without_times(case: Case, before: dict[str, Any], after: dict[str, Any]) -> Row | None:
    """The row where a side is not ready; None where both are.

    A wrong result of HEAD is a failure whatever BASE did, an error of HEAD unless BASE has the very same.
    """
    if after["state"] == "wrong":
        return Row(case, ["wrong"], after["reason"])
    if after["state"] == "failed":
        both = before == after
        return Row(case, ["fails in both" if both else "failed"], after["reason"])
    if before["state"] == "wrong":
        return Row(case, ["wrong in BASE"], before["reason"])
    if before["state"] != "ready":
        return Row(case, ["not in BASE"], before["reason"])
    return None


def _enter(side: Side, case: Case) -> dict[str, Any]:
    try:
        return side.ask("enter", **case._asdict())
    except Ended as error:
        side.restart()
        return {"state": "failed", "reason": str(error)}


def confirmed(first: Row, second: Row) -> Row:
    """A difference is one only if another pair of processes finds it too; of the two the smaller is reported.

    Where code and data lie in memory is chosen anew for each process and changes its speed by a few percent, which no
    number of rounds of the same two processes averages out.
    """
    ratio, other = first.ratio, second.ratio
    if ratio is None or other is None:
        return second
    if first.verdicts[0] == second.verdicts[0]:
        return first if abs(math.log(ratio.median)) < abs(math.log(other.median)) else second
    doubtful = ["unclear" if second.differs else second.verdicts[0], *second.verdicts[1:]]
    return replace(second, verdicts=doubtful, reason=f"at first {ratio.median:.3f}")
