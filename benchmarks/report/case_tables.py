"""The part of the report about operations: who is how fast at which size, all of it in short, and shorter for the README."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.report.cases import Case, by_op, peers
from benchmarks.report.results_file import Results, Row
from benchmarks.report.tables import (
    NONE,
    counted,
    details,
    mebibytes,
    milliseconds,
    percent,
    plain,
    scientific,
    table,
    times,
)

GLOSSARY = (
    "N: rows, one for each scored token. H: hidden size. V: vocabulary. */ 8* behind a model: an eighth of its width and "
    "of its vocabulary, so that a CPU can do it. *token level*: a policy ratio for each token, as in GRPO; *sequence "
    "level*: one for each sequence, as in GSPO. *frozen head*: the head gets no gradient. *queries*, *keys*, *size*: heads "
    "of the queries, of keys and values, and their size."
)
_MOST_ROWS = 14
_MAIN_MODEL = "Qwen2.5-VL-3B"
"""Of the README's recipe."""
_ABSENT = ("missing", "left out")
"""Did not take part; whoever failed did."""
_BASELINES = ("PyTorch, eager", "PyTorch, torch.compile")
_LEGEND = (
    "Time over ours: above 1 the other is slower; ~: turns lie on both sides of 1, which is no difference. MiB: the most "
    "memory held at one time beyond the inputs."
)
_OPEN_CASES = 3
"""Tables of an operation with more cases are folded up."""


def summary_markdown(ops: Mapping[str, Sequence[Case]], steps: Sequence[str] = ()) -> Iterator[str]:
    """Blocks of text; none where there is nothing to compare and nothing that went wrong.

    Args:
        steps: lines about whole training steps.
    """
    lines = [line for op, cases in ops.items() for line in _summary(op, cases)]
    trouble = [line for op, cases in ops.items() for line in _trouble(op, cases)]
    if lines or steps or trouble:
        yield "## In short"
    if lines:
        yield (
            "The others over ours: above 1 they are slower, or hold more memory. The median over the cases in which both "
            "have a figure, and the range. *slower*, *same*, *faster*: in how many cases their time was so; the same where "
            "turns lie on both sides of 1, which is no difference."
        )
        header = ["operation", "", "time over ours", "memory over ours", "compared in"]
        yield table([*header, "slower", "same", "faster"], lines, words=(0, 1))
    if steps:
        yield "\n".join(["Whole training steps:", "", *(f"- {line}" for line in steps)])
    if trouble:
        yield "\n".join(["Without a time, though they can run here:", "", *trouble])


def _summary(op: str, cases: Sequence[Case]) -> Iterator[list[str]]:
    """A line for each peer; the first names the operation, and whose time of ours it is."""
    ours = " or ".join(dict.fromkeys(c.reference.provider for c in cases if c.reference))
    title = f"**{plain(op)}**" + (f", over {plain(ours)}" if ours else "")
    for provider, rows in peers(cases).items():
        compared = [(case, row) for case, row in rows if case.ratio(row)]
        verdicts = Counter(case.difference(row) for case, row in compared)
        number = counted(len(rows), "case")
        yield [
            title,
            plain(provider),
            _spread([case.ratio(row) for case, row in compared]),
            _spread([case.memory_ratio(row) for case, row in rows]),
            number if len(compared) == len(rows) else f"{len(compared)} of {number}",
            *(str(verdicts[sign]) if compared else NONE for sign in (1, 0, -1)),
        ]
        title = ""


def _trouble(op: str, cases: Sequence[Case]) -> Iterator[str]:
    """Who was refused, failed, ran out of memory or was left out, and how often."""
    found: Counter[tuple[str, str]] = Counter()
    turns: Counter[str] = Counter()
    for row in (row for case in cases for row in case.rows):
        name = _name(row.provider, row)
        turns[name] += 1
        if not row.timed and row.status != "missing":
            found[name, _status(row)] += 1
    for (name, status), count in found.items():
        yield f"- {plain(op)}, {name}: {status} in {count} of {counted(turns[name], 'case')}"


def _spread(found: Sequence[float | None]) -> str:
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        return NONE
    low, high = (times(end(ratios)).removesuffix("x") for end in (min, max))
    return times(median(ratios)) + (f" ({low} to {high})" if len(ratios) > 1 else "")


def cases_markdown(ops: Mapping[str, Sequence[Case]]) -> Iterator[str]:
    """Blocks of text: a table for each operation and case."""
    if not ops:
        yield "No benchmark has run."
        return
    yield "## Cases"
    yield (
        "*ms*: median over all rounds. *ratio*: time over that of the row of ours with 1.00, and its range over the "
        "turns; *~*: the range includes 1, so there is no difference. *bound*: the bound over the time, in percent. *MiB*: the most memory held at one time beyond the inputs. *error*: the largest relative error "
        "against fp64. Ours in bold."
    )
    yield GLOSSARY
    for op, cases in ops.items():
        yield f"### {plain(op)}"
        if all(len(case.rows) == 1 for case in cases):
            yield _alone(cases)
            continue
        text = "\n\n".join(_case(case) for case in cases)
        yield details(counted(len(cases), "case"), text) if len(cases) > _OPEN_CASES else text


def _case(case: Case) -> str:
    parts = [f"#### {plain(case.name)}", _shape(case.rows[0], case.name), _table(case)]
    return "\n\n".join(filter(None, parts))


def _shape(row: Row, name: str) -> str:
    """`N = 256 rows, H = 256, V = 18,992, float32 (4 bytes), token level`; empty for no shape.

    Args:
        name: of the case; a model that it names is not named again.
    """
    shape = dict(row.shape)
    texts = {"N": "N = {} rows", "H": "H = {}", "V": "V = {}"}
    found = [text.format(_number(shape.pop(key))) for key, text in texts.items() if key in shape]
    if row.dtype:
        found.append(f"{row.dtype} ({shape.pop('itemsize')} bytes)")
    if level := shape.pop("level", ""):
        found.append(f"{plain(level)} level")
    if shape.pop("frozen", False):
        found.append("frozen head")
    if (model := str(shape.pop("model", ""))) not in name:
        found.append(f"head of {plain(model)}")
    return ", ".join(found + [f"{plain(key)}: {_number(value)}" for key, value in shape.items()])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else plain(value)


def _table(case: Case) -> str:
    header = ["", "ms", "ratio", "bound", "MiB", "error", "note"]
    lines = []
    for row in case.ordered:
        ms, *rest = _figures(row)
        lines.append([_name(_with_package(row), row), ms, _ratio(case, row), *rest])
    return table(header, lines, words=(0, 6))


def _ratio(case: Case, row: Row) -> str:
    ratio, around = case.ratio(row), case.ratios(row)
    if ratio is None:
        return NONE
    mark = "~" if around and not case.difference(row) else ""
    turns = f" ({min(around):.2f} to {max(around):.2f})" if len(around) > 1 else ""
    return f"{mark}{ratio:.2f}{turns}"


def _alone(cases: Sequence[Case]) -> str:
    """Where there is one provider in each case, a table of the cases."""
    header = ["", "", "ms", "bound", "MiB", "error", "note"]
    rows = [(case, case.rows[0]) for case in cases]
    lines = [[plain(c.name), _name(_with_package(row), row), *_figures(row)] for c, row in rows]
    return table(header, lines, words=(0, 1, 6))


def _with_package(row: Row) -> str:
    return row.provider + (f" ({row.package})" if row.package else "")


def _name(name: str, row: Row) -> str:
    return f"**{plain(name)}**" if row.ours else plain(name)


def _status(row: Row) -> str:
    return plain("no rounds" if row.status == "timed" else row.status)


def _figures(row: Row) -> list[str]:
    """ms, bound, MiB, error and note; for a row without a time, why."""
    if not row.timed:
        why = f"{_status(row)}: {plain(row.reason)}" if row.reason else _status(row)
        return [*[NONE] * 4, why]
    return [
        milliseconds(row.median),
        percent(row.fraction),
        mebibytes(row.peak_extra_bytes),
        scientific(row.error),
        plain(row.note),
    ]


def readme_table(results: Results) -> str:
    """The operations that others do too, each at its main case: a row for ours beside each of the others.

    The main case is one of the main model if there is one; among these, the first of those in which most
    providers were timed. The others are PyTorch's eager and compiled code and the best of each package. Where all
    would be too many, the fastest of each operation come first, then the second fastest, and so on.
    """
    chosen: list[tuple[Case, list[Row]]] = []
    for cases in by_op(results.rows).values():
        case = max((c for c in cases if c.reference), key=_weight, default=None)
        if case and (others := _others(case)):
            chosen.append((case, others))
    ranks = itertools.zip_longest(*(others for _, others in chosen))
    found = [row for row in itertools.chain.from_iterable(ranks) if row]
    kept, dropped = found[:_MOST_ROWS], len(found) - _MOST_ROWS
    lines = [
        line
        for case, others in chosen
        for line in _lines(case, [row for row in others if any(row is k for k in kept)])
    ]
    header = ["operation", "ours, ms", "the other", "time over ours", "ours, MiB", "its MiB"]
    more = (
        f" Left out: {dropped} more, no faster than those shown beside them." if dropped > 0 else ""
    )
    return f"{table(header, lines, words=(0, 2))}\n\n{_LEGEND}{more}"


def _weight(case: Case) -> tuple[bool, int]:
    """max takes the first of equals."""
    of_main_model = str(case.rows[0].shape.get("model", "")).startswith(_MAIN_MODEL)
    return of_main_model, sum(row.timed for row in case.rows)


def _others(case: Case) -> list[Row]:
    """The fastest first; of a package only its best, but for PyTorch's two baselines."""
    best: dict[str, Row] = {}
    for row in case.ordered:
        if not row.ours and row.status not in _ABSENT:
            name = row.provider if row.provider in _BASELINES else row.package_name
            best.setdefault(name or row.provider, row)
    return list(best.values())


def _lines(case: Case, others: list[Row]) -> Iterator[list[str]]:
    """The first names the operation and ours."""
    ours = case.reference
    if ours is None:
        return
    head = [f"**{plain(case.op)}**<br>{plain(case.name)}", milliseconds(ours.median)]
    memory = mebibytes(ours.peak_extra_bytes)
    for row in others:
        yield [
            *head,
            plain(row.provider),
            _short_ratio(case, row),
            memory,
            mebibytes(row.peak_extra_bytes),
        ]
        head, memory = ["", ""], ""


def _short_ratio(case: Case, row: Row) -> str:
    if not row.timed:
        return plain(row.status)
    mark = "~" if case.ratios(row) and not case.difference(row) else ""
    return mark + times(case.ratio(row))
