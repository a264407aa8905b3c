"""Whether a change made something slower: HEAD's time over BASE's, both measured in turn.

    python -m benchmarks.compare BASE [--head REVISION] [--only WORDS] [--quick] ...

BASE is a revision: its tree is checked out into a temporary folder for as long as the program runs. HEAD is the working tree
as it is, changes that are not committed too, or another revision. Two processes, one with `perl` and `perl_kernels` of BASE
and one with HEAD's, run the benchmarks of the working tree: every implementation of this repository in every case of
`benchmarks/bench_*.py`. Both prove their result, as all benchmarks do; then one times a round while the other waits, in
the order ABBA, until the ratio is known well enough or the time for the case is over.

The ratio of a case is the median over neighbouring rounds, with the interval that holds it with 95 %. `slower` needs an
interval wholly above 1 and a median above the threshold; `faster` is the same the other way round; `unclear` is an
interval with room for no difference as well as for one beyond the threshold. What is slower or faster is measured once more
by two new processes, and is neither unless they agree: where code and data happen to lie in memory makes a process faster
or slower by a few percent. `more memory` is a peak that grew by more than 5 % and more than 1 MiB. A case that BASE has
not got, or gets wrong, is named and not timed.

On a CPU the processes keep the memory that they free (glibc's `MALLOC_MMAP_MAX_` and `MALLOC_TRIM_THRESHOLD_`), so the
times are without what the system takes to hand out pages; the table's memory shows a change that needs more of them.

`--check` compares BASE with itself, and so shows the noise: a threshold below what it finds means nothing on this machine.

Exit code: 1 if something is slower, takes more memory, is wrong or fails in HEAD; 0 if not; 2 for bad input; 130 after Ctrl-C.
Both processes hold the inputs of a case at the same time. Code that an installation compiles is not built for a revision.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from benchmarks import json_file
from benchmarks.comparing import report
from benchmarks.comparing.options import parse
from benchmarks.comparing.row import Row
from benchmarks.comparing.session import compare, sides
from perl.types import UserError


def main(arguments: list[str] | None = None) -> int:
    rows: list[Row] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        given = parse(arguments)
        with sides(given) as (base, head):
            compare(given, base, head, rows)
        print(report.table(rows))
        print()
        if given.check:
            print(report.noise(rows))
        print(report.summary(rows, base.name, head.name))
        json_file.write(given.json, report.asdict(given, base, head, rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rows:
            print(report.table(rows))
        print("interrupted", file=sys.stderr)
        return 130
    return int(any(row.failure for row in rows))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
