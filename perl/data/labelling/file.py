"""Labels for the rows of a data set, written to a file row by row, so that a labelling can go on where it stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perl.config import DataConfig
from perl.data.columns import labels_of
from perl.data.dataset import RowDataset
from perl.data.labelling.label import Label, checked, unsure
from perl.data.labelling.llm import label_by_llm
from perl.data.labelling.rephrase import Rephrased, is_open, rephrase
from perl.data.labelling.rules import label_by_rules
from perl.data.rows import RowWriter
from perl.data.sources import open_source
from perl.files import append_rows, keep_rows, read_rows
from perl.llm import Endpoint, EndpointError
from perl.permutation.permute import Consistency
from perl.types import Example, UserError

Labeller = Literal["rules", "llm", "rules+llm"]

_SOURCE_COLUMNS = ("task", "data_source", "source", "dataset")
_NO_LABEL = {"kind": "none", "should_change": False}


@dataclass(frozen=True)
class Labelling:
    """How a data set is labelled; `endpoint` is asked where a model is needed."""

    labeller: Labeller = "rules"
    text: Consistency = "slots"
    rephrase: bool = False
    relabel: bool = False
    endpoint: Endpoint | None = None

    @property
    def rows_at_a_time(self) -> int:
        return 1 if self.endpoint is None else 4 * self.endpoint.concurrency


@dataclass
class _Draft:
    """A row under work: what its columns become, its label once there is one, or why it has none yet."""

    number: int
    changes: dict[str, Any]
    example: Example
    label: Label | None = None
    failure: EndpointError | None = None


class LabelledFile:
    """A data set and the file that its labelled rows go to.

    Raises:
        UserError: data that cannot be read, or an output that holds something else than its beginning.
    """

    def __init__(self, data: str, output: Path, how: Labelling, limit: int | None = None) -> None:
        self.output, self.how = output, how
        self._source = open_source(data, "train")
        self._dataset = RowDataset(self._source, DataConfig())
        self._writer = RowWriter(output, self._dataset)
        self.total = min(len(self._source), limit or len(self._source))
        self.counts: Counter[tuple[str, bool, str]] = Counter()
        """Rows by kind, should_change and reason."""
        self.done = self._resume() if output.exists() else 0

    def run(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Label and write what is not done yet.

        Raises:
            UserError: a row that cannot be read, or an endpoint that is down; every row before is written.
        """
        try:
            for drafts in self._batches():
                self._label(drafts)
                for draft in drafts:
                    if draft.failure is not None:
                        raise UserError(
                            f"{draft.failure} ({self.done} of {self.total} rows are labelled in "
                            f"{self.output}; the same command goes on from there)"
                        )
                    append_rows(self.output, [self._written(draft)])
                    self.done += 1
                advance(len(drafts))
        finally:
            if self.done == 0:
                self.output.unlink(missing_ok=True)

    def _batches(self) -> Iterator[list[_Draft]]:
        size = self.how.rows_at_a_time
        for start in range(self.done, self.total, size):
            yield [self._draft(i) for i in range(start, min(start + size, self.total))]

    def _draft(self, i: int) -> _Draft:
        draft = _Draft(i, {}, self._load(i, _NO_LABEL))
        row = self._source.row(i)
        given = labels_of(row)
        if self.how.relabel or len(given) < 2:
            return draft
        reason = str(row.get("label_reason") or "as given")
        draft.label = self._held(draft.example, Label(**given, reason=reason))
        return draft

    def _held(self, example: Example, given: Label) -> Label:
        """A label that the data gives, in whole or in part, or `unsure` where it does not hold."""
        held = checked(example, replace(given, reason="as given"), self.how.text)
        if held.sure:
            return given
        return unsure(f"the given label does not hold: {held.reason.removeprefix('unsure: ')}")

    def _load(self, i: int, changes: Mapping[str, Any]) -> Example:
        return self._dataset.read({**self._source.row(i), **changes}, i, decode=False)

    def _label(self, drafts: Sequence[_Draft]) -> None:
        open_ones = [d for d in drafts if d.label is None]
        if self.how.rephrase:
            self._rephrase([d for d in open_ones if is_open(d.example)])
        if self.how.labeller != "llm":
            for draft in open_ones:
                source = " ".join(
                    str(self._source.row(draft.number).get(name, "")) for name in _SOURCE_COLUMNS
                )
                draft.label = label_by_rules(draft.example, self.how.text, source)
        asked = [
            d
            for d in open_ones
            if d.failure is None and (d.label is None or not d.label.sure)
            if self.how.labeller != "rules" and len(d.example.images) > 1
        ]
        assert not asked or self.how.endpoint is not None
        if asked and self.how.endpoint is not None:
            found = label_by_llm([d.example for d in asked], self.how.endpoint, self.how.text)
            for draft, label in zip(asked, found, strict=True):
                if isinstance(label, EndpointError):
                    draft.failure = label
                else:
                    draft.label = label
        for draft in open_ones:
            if draft.label is None and draft.failure is None:
                draft.label = label_by_rules(draft.example)  # A single image, or none.

    def _rephrase(self, drafts: Sequence[_Draft]) -> None:
        assert self.how.endpoint is not None
        found = rephrase([d.example for d in drafts], self.how.endpoint)
        for draft, new in zip(drafts, found, strict=True):
            if isinstance(new, EndpointError):
                draft.failure = new
            elif isinstance(new, str):
                draft.changes = {"rephrased": f"no: {new}"}
            else:
                changes = self._replaced(draft.number, new)
                try:
                    draft.example = self._load(draft.number, {**_NO_LABEL, **changes})
                    draft.changes = changes
                except UserError as error:
                    draft.changes = {"rephrased": f"no: {error}"}

    def _replaced(self, i: int, new: Rephrased) -> dict[str, Any]:
        """The columns that hold question and answer with the new ones, and the old ones aside."""
        row = self._source.row(i)
        convention = self._dataset.convention
        question = next(key for key in convention.question if row.get(key) is not None)
        answer = next(key for key in convention.answer if row.get(key) is not None)
        text: Any = new.question
        if not isinstance(row[question], str):
            text = [{"role": "user", "content": new.question}]
            text = [turn for turn in row[question] if turn.get("role") == "system"] + text
        gold: Any = new.answer
        if isinstance(row[answer], Mapping):
            gold = {**row[answer], "ground_truth": new.answer}
        changes: dict[str, Any] = {question: text, answer: gold}
        if row.get("demonstration") is not None:
            changes["demonstration"] = None  # It concludes with the old answer.
        original = {key: row[key] for key in changes}
        return {**changes, "rephrased": new.question_type, "original": original}

    def _written(self, draft: _Draft) -> dict[str, Any]:
        """The row with its label, which is `unsure` where the row does not load with it."""
        i, label = draft.number, draft.label
        assert label is not None
        row = self._source.row(i)
        if (
            not self.how.relabel
        ):  # What the data says itself stands, if a labeller fills in the rest.
            given = labels_of(row)
            if len(given) == 1 and label.sure and "original" not in draft.changes:
                label = self._held(draft.example, replace(label, **given))
        try:
            self._load(i, {**draft.changes, **_columns(label)})
        except UserError as error:
            label = unsure(str(error))
        self.counts[label.kind, label.should_change, label.reason] += 1
        return {
            **self._writer.row(i),
            **draft.changes,
            **_columns(label),
            "label_reason": label.reason,
            "label_text": self.how.text,
        }

    def _resume(self) -> int:
        """How many rows the output has already; one that was cut by a kill is taken back."""
        done = 0
        for written in read_rows(self.output):
            if done == self.total or not self._is_row(written, done):
                raise UserError(
                    f"--output {self.output} holds something else than the first rows of this data "
                    "with labels; replace it with --overwrite, or choose another --output"
                )
            done += 1
        keep_rows(self.output, done)
        return done

    def _is_row(self, written: Mapping[str, Any], i: int) -> bool:
        try:
            label = written["kind"], written["should_change"], written["label_reason"]
        except LookupError:
            return False
        if (mode := written.get("label_text")) != self.how.text:
            raise UserError(
                f"--output {self.output} holds labels for --text {mode}, not {self.how.text}; "
                "replace it with --overwrite, or choose another --output"
            )
        row = {**self._source.row(i)}
        replaced = {
            **_NO_LABEL,
            "label_reason": "",
            "label_text": "",
            "change_needed": "",
            "image": "",
            "images": "",
        }
        replaced |= written.get("original") or {}
        same = all(
            written.get(key) == value
            for key, value in row.items()
            if key not in replaced and isinstance(value, str | int | float | bool)
        )
        self.counts[label] += same
        return same


def _columns(label: Label) -> dict[str, Any]:
    return {"kind": label.kind, "should_change": label.should_change}
