"""The part of the report about operations: who is how fast at which size, all of it in short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.report.cases import Case, peers
from benchmarks.report.results_file import Row
from benchmarks.report.tables import (
    NONE,
    counted,
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
        if len(cases) > _OPEN_CASES:
            # GitHub reads Markdown inside only behind an empty line.
            summary = f"<summary>{counted(len(cases), 'case')}</summary>"
            text = f"<details>\n{summary}\n\n{text}\n\n</details>"
        yield text


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
