"""Every row of a data set visited once, by several processes: which are faulty, and what the data look like.

The outcome is kept in the user's cache, so that a run over data that have not changed starts at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perl.config import DataConfig
from perl.data.dataset import Dataset, RowDataset
from perl.kept import kept_file, read_kept, write_kept
from perl.permutation import alike, check_moves, num_orders
from perl.report.progress import Display
from perl.rewards.scorer import Scorer
from perl.types import Example, UserError

log = logging.getLogger(__name__)

_AT_ONCE = 256
"""Rows that a process takes at a time. Fewer in all are visited by this one."""
_LATER = ("gold", "prompt", "id")
"""Kinds of fault that training does not look for when it starts."""


@dataclass(frozen=True)
class Checks:
    """What rows are held to beside what any row must be.

    `inspect` has a kind of fault and a function that raises UserError for an example whose images have been read by
    their headers; `tokens` gives the length of its prompt. `key` tells apart checks that may find different things.
    """

    inspect: tuple[tuple[str, Callable[[Example], None]], ...] = ()
    key: str = ""
    start_key: str | None = None
    """That of training's checks among these: where they find nothing, training will find nothing."""
    decode: bool = False
    """Read the images in full: a cut one is found only so."""
    tokens: Callable[[Example], int] | None = None
    most_tokens: int = 0
    """Prompts with more are counted."""
    ids: bool = False
    """Two rows with one id are a fault, of the later one. `perl-rl score` cannot tell them apart."""

    def look_at(self, example: Example, only: str = "") -> None:
        """Raise the UserError of what is faulty, with its kind."""
        for kind, function in self.inspect:
            try:
                if only in ("", kind):
                    function(example)
            except UserError as error:
                error.kind = error.kind or kind
                raise


def checks_of(
    text: Any,
    processor: Any = None,
    rewards: Iterable[tuple[str, ...]] = (),
    control_tokens: str = "error",
) -> Checks:
    """What training asks of its rows: labels that hold in every order, texts and pictures that the model can take, and an
    answer where a reward reads it.

    Args:
        text: `permutation.text`.
        processor: or else what a model asks, `perl.model.demands.Demands`.
        rewards: `reward.functions` of every stage.
        control_tokens: `data.control_tokens`.
    """
    inspect: list[tuple[str, Callable[[Example], None]]] = [
        ("label", lambda example: check_moves(example, text))
    ]
    readers = set[str]()
    for functions in sorted(rewards):
        scorer = Scorer(functions, (1.0,) * len(functions))
        if scorer.reader and scorer.reader not in readers:
            readers.add(scorer.reader)
            inspect.append(("answer", scorer.check_answer))
    if processor is not None:
        inspect.append(("image shape", processor.check_shapes))
        if control_tokens == "error":
            inspect.append(("text", processor.check_texts))
    demands = f"{control_tokens} {processor.demands}" if processor else ""
    return Checks(tuple(inspect), f"{text} {sorted(readers)} {demands}")


def acceptance(
    data: DataConfig, text: Any, processor: Any, rewards: Iterable[tuple[str, ...]] = ()
) -> Callable[[Example], None] | None:
    """What raises UserError for an example that `checks_of` finds faulty, where such are left out; None: they are errors."""
    if data.on_error == "error":
        return None
    checks = checks_of(text, processor, rewards, data.control_tokens)

    return checks.look_at


class Fault(NamedTuple):
    """Example `index` of the data set, what kind of fault it has, and the error it raises."""

    index: int
    kind: str
    message: str


class Seen(NamedTuple):
    """What one row is like."""

    fault: Fault | None
    id: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    label: str = ""
    question: int = 0
    moves: bool = False
    tokens: int | None = None
    folders: tuple[str, ...] = ()


@dataclass
class Checked:
    """What a visit of all rows has found; `statistics` are numbers by name."""

    rows: int
    faults: list[Fault]
    statistics: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    """When the folders of the images were changed last, in ns."""


def checked(dataset: RowDataset, checks: Checks, display: Display, stop: bool = False) -> Checked:
    """What a visit finds, or has found before if neither the data's files nor the images' folders have changed since.

    With `stop` the first faulty row ends it: its error is raised.
    """
    visit(dataset, 0, checks)  # It says what there is to say of rows of its kind.
    found = _known(dataset, checks)
    if found is None:
        found = _visit_all(dataset, checks, display, stop)
        write_kept(_file_of(dataset, checks), asdict(found))
        if checks.start_key is not None:
            start = Checks(key=checks.start_key)
            own = [fault for fault in found.faults if fault.kind not in _LATER]
            write_kept(_file_of(dataset, start), asdict(replace(found, faults=own)))
    if stop and found.faults:
        raise UserError(found.faults[0].message)
    return found


def visit(dataset: RowDataset, i: int, checks: Checks) -> Seen:
    """Check one row."""
    try:
        example, decoded, tokens = sound(dataset, i, checks)
    except UserError as error:
        return Seen(fault_of(error, dataset, i))
    files = [getattr(image, "filename", "") for image in example.images]
    change = "the answer follows" if example.should_change else "the answer stays"
    return Seen(
        None,
        example.id,
        tuple(image.size for image in example.images),
        f"{example.kind}, {change}" if example.kind != "none" else "none",
        sum(len(message.content) for message in example.messages),
        num_orders(decoded) > 1,
        tokens,
        tuple({os.path.dirname(file) for file in files if file}),
    )


def sound(dataset: Dataset, i: int, checks: Checks) -> tuple[Example, Example, int | None]:
    """Example i with its images' headers, with its images where `checks.decode` wants them, and its prompt's tokens.

    Raises:
        UserError: what is wrong with the row, its `kind` said.
    """
    decoded = None
    try:
        example = dataset.check(i)
        checks.look_at(example)
        read = dataset[i] if checks.decode else example
        if alike(read.images) != alike(example.images):
            checks.look_at(read, "label")
        decoded = read
        return example, decoded, checks.tokens(decoded) if checks.tokens else None
    except UserError as error:
        error.kind = error.kind or ("prompt" if decoded else "columns")
        raise


def fault_of(error: UserError, dataset: Dataset, i: int) -> Fault:
    """What is wrong with example i, in a line that names its place."""
    message, place = str(error), dataset.place(i)
    return Fault(i, error.kind, message if place in message else f"{place}: {message}")


def _visit_all(dataset: RowDataset, checks: Checks, display: Display, stop: bool) -> Checked:
    size = len(dataset)
    chunks = [range(k, min(k + _AT_ONCE, size)) for k in range(0, size, _AT_ONCE)]
    seen: list[Seen] = []
    ids: dict[str, int] = {}
    if len(chunks) > 1:
        display.stage("check", size, unit="row")
    for some in _visited(dataset, checks, chunks):
        faulty = next((each.fault for each in some if each.fault), None)
        if stop and faulty:
            raise UserError(faulty.message)
        seen += _told_apart(some, len(seen), ids, dataset) if checks.ids else some
        if len(chunks) > 1:
            display.advance(len(some))
    display.close()
    faults = [each.fault for each in seen if each.fault]
    folders = {folder for each in seen for folder in each.folders}
    times = {folder: _changed(folder) for folder in sorted(folders)}
    sound = [each for each in seen if not each.fault]
    return Checked(size, faults, _statistics(sound, checks.most_tokens), times)


def _told_apart(
    some: Sequence[Seen], start: int, ids: dict[str, int], dataset: RowDataset
) -> Iterator[Seen]:
    """Rows from number `start` on, those with an id that an earlier one has as faulty; `ids` keeps who had each first."""
    for i, each in enumerate(some, start):
        first = i if each.fault else ids.setdefault(each.id, i)
        if first != i:
            place = f"{dataset.place(i)}: it has the id '{each.id}' of {dataset.place(first)}"
            each = Seen(Fault(i, "id", f"{place}; give each row an id of its own"))
        yield each


def _visited(
    dataset: RowDataset, checks: Checks, chunks: Sequence[range]
) -> Iterator[Sequence[Seen]]:
    """What is seen, a chunk at a time and in their sequence."""
    workers = min(len(chunks), len(os.sched_getaffinity(0)), 16)
    if workers < 2:
        yield from ([visit(dataset, i, checks) for i in chunk] for chunk in chunks)
        return
    # Forked, so that data sets and checks need not be pickled.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (dataset, checks))
    try:
        yield from pool.map(_visit_chunk, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


_WORK: list[Any] = []


def _begin_worker(dataset: RowDataset, checks: Checks) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork.
    logging.disable(logging.WARNING)  # Of what is said once, not once by each.
    _WORK[:] = [dataset, checks]


def _visit_chunk(chunk: range) -> list[Seen]:
    dataset, checks = _WORK
    return [visit(dataset, i, checks) for i in chunk]


def _statistics(seen: Sequence[Seen], most_tokens: int) -> dict[str, Any]:
    sizes = [size for each in seen for size in each.sizes]
    tokens = [each.tokens for each in seen if each.tokens is not None]
    out: dict[str, Any] = {
        "images per row": _spread([len(each.sizes) for each in seen]),
        "image width": _spread([width for width, _ in sizes]),
        "image height": _spread([height for _, height in sizes]),
        "characters of the question": _spread([each.question for each in seen]),
        "prompt tokens": _spread(tokens),
        "labels": dict(Counter(each.label for each in seen).most_common()),
        "rows whose images can move": sum(each.moves for each in seen),
    }
    if tokens:
        out[f"prompts over {most_tokens} tokens"] = sum(t > most_tokens for t in tokens)
    return {name: value for name, value in out.items() if value is not None}


def _spread(values: Sequence[int]) -> list[float] | None:
    """Least, median and most."""
    return [float(f(values)) for f in (np.min, np.median, np.max)] if values else None


def _known(dataset: RowDataset, checks: Checks) -> Checked | None:
    """What has been found before, of these rows or of all, which then lacks statistics; None if it may not hold."""
    stored = read_kept(_file_of(dataset, checks))
    if stored is None and checks.start_key is None:
        stored = read_kept(_file_of(dataset, checks, whole=True))
        places = {row: i for i, row in enumerate(dataset.rows)}
        faults = [fault for fault in stored["faults"] if fault[0] in places] if stored else []
        faults = [(places[row], *rest) for row, *rest in faults]
        stored = stored and {**stored, "rows": len(dataset), "faults": faults, "statistics": {}}
    if stored is None or any(_changed(f) != then for f, then in stored["folders"].items()):
        return None
    found = Checked(**{**stored, "faults": [Fault(*fault) for fault in stored["faults"]]})
    # A picture that has been mended in its place changes no folder.
    full = replace(checks, decode=True)
    own = [fault for fault in found.faults if fault.kind != "id"]
    same = all(visit(dataset, fault.index, full).fault == fault for fault in own)
    return found if same else None


def _file_of(dataset: RowDataset, checks: Checks, whole: bool = False) -> Path | None:
    """Where the outcome is kept of the data set's rows, or of all that the source has."""
    how = [checks.key, checks.decode, checks.tokens is not None]
    return kept_file(["checked", dataset.about(whole), how], dataset.source.files)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
