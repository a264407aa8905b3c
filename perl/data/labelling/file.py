"""Labels for the rows of a data set, written to a file row by row, so that a labelling can go on where it stopped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from perl.config import DataConfig
from perl.data.columns import IMAGES, labels_of, tell_once
from perl.data.dataset import RowDataset
from perl.data.labelling.label import Label, checked, unsure
from perl.data.labelling.llm import Rephrased, is_open, label_by_llm, rephrase
from perl.data.labelling.rules import label_by_rules
from perl.data.questions.options import read_options
from perl.data.rows import RowWriter
from perl.data.sources import open_source
from perl.files import append_rows, keep_rows, read_rows
from perl.llm import Endpoint, EndpointError
from perl.permutation import Consistency, from_json, to_json
from perl.types import Example, UserError

_NO_LABEL = {"kind": "none", "should_change": False}
_WRITTEN_ANEW = frozenset(
    ("kind", "should_change", "change_needed", "label_reason", "label_text", "plan", *IMAGES)
)


@dataclass(frozen=True)
class Labelling:
    """How a data set is labelled; `endpoint` is asked where a model is needed."""

    labeller: Literal["rules", "llm", "rules+llm"]
    text: Consistency
    rephrase: bool
    relabel: bool
    endpoint: Endpoint | None


@dataclass
class _Draft:
    """A row under work as it is written: what its columns become, and its label once there is one, or why there is none."""

    number: int
    example: Example
    row: Mapping[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    label: Label | EndpointError | None = None


class LabelledFile:
    """A data set and the file that its labelled rows go to; of `config` how the data are read counts, and `on_error`.

    Raises:
        UserError: data that cannot be read, or an output that holds something else than its beginning.
    """

    def __init__(
        self,
        data: str,
        output: Path,
        how: Labelling,
        config: DataConfig,
        limit: int | None = None,
    ) -> None:
        self.output, self.how = output, how
        self._source = open_source(data, "train")
        self._dataset = RowDataset(self._source, config)
        self._skips = config.on_error == "skip"
        self._writer = RowWriter(output, self._dataset)
        self._columns = tuple(self._dataset.layout.theirs(_NO_LABEL))
        """Those that labels are written to: what the data call `kind` and `should_change`."""
        self.total = min(len(self._source), limit or len(self._source))
        self.counts: Counter[tuple[str, bool, str]] = Counter()
        """Rows by kind, should_change and reason."""
        self.done = 0
        """Rows of the data that are labelled or left out."""
        self.skipped = 0
        """Those that are left out."""
        if output.exists():
            self._resume()

    @property
    def written(self) -> int:
        """Labelled rows in the output."""
        return self.done - self.skipped

    @property
    def so_far(self) -> str:
        return f"{self.written} of {self.total} rows are labelled in {self.output}"

    def run(self, advance: Callable[[int], None]) -> None:
        """Label and write what is not done yet.

        Raises:
            UserError: a row that cannot be read, or an endpoint that is down; every row before is written.
        """
        at_once = 1 if self.how.endpoint is None else 4 * self.how.endpoint.concurrency
        try:
            while self.done < self.total:
                begin, end = self.done, min(self.done + at_once, self.total)
                drafts, fault = self._drafts(range(begin, end))
                self._label([draft for draft in drafts if draft and draft.label is None])
                for draft in drafts:
                    if draft:
                        append_rows(self.output, [self._written(draft)])
                    else:
                        self.skipped += 1
                    self.done += 1
                if fault:
                    raise UserError(
                        f"{fault} ({self.so_far}; the same command goes on from there when the row is corrected, and "
                        "--on-error skip leaves such rows out)"
                    ) from fault
                advance(self.done - begin)
            if self.written == 0:
                raise UserError(
                    f"all {self.total} rows are faulty; perl-rl check tells what is wrong"
                )
        finally:
            if self.written == 0:
                self.output.unlink(missing_ok=True)

    def _drafts(self, rows: Iterable[int]) -> tuple[list[_Draft | None], UserError | None]:
        """A draft for each row, None for a faulty one that is left out; or for those before a fault, with it."""
        drafts: list[_Draft | None] = []
        for i in rows:
            try:
                drafts.append(self._draft(i))
            except UserError as error:
                if not self._skips:
                    return drafts, error
                text = f"{error}: the row is left out, as others like it will be (said once)"
                tell_once(logging.WARNING, text, (self.output, "left out"))
                drafts.append(None)
        return drafts, None

    def _draft(self, i: int) -> _Draft:
        draft = _Draft(i, self._load(i, _NO_LABEL), self._writer.row(i))
        row = self._row(i)
        given = labels_of(row)
        if not self.how.relabel and len(given) == 2:
            reason = str(row.get("label_reason") or "as given")
            draft.label = self._held(draft.example, Label(**given, reason=reason))
        return draft

    def _held(self, example: Example, given: Label) -> Label:
        """A label that the data gives, in whole or in part, or `unsure` where it does not hold."""
        held = checked(example, replace(given, reason="as given"), self.how.text)
        if held.sure:
            return given
        return unsure(f"the given label does not hold: {held.reason.removeprefix('unsure: ')}")

    def _row(self, i: int) -> Mapping[str, Any]:
        return self._dataset.layout.ours(self._source.row(i))

    def _load(self, i: int, changes: Mapping[str, Any]) -> Example:
        theirs = self._dataset.layout.theirs(changes)
        return self._dataset.read({**self._source.row(i), **theirs}, i, decode=False)

    def _label(self, drafts: Sequence[_Draft]) -> None:
        how = self.how
        if how.rephrase:
            self._rephrase([draft for draft in drafts if is_open(draft.example)])
        drafts = [draft for draft in drafts if draft.label is None]  # The others' endpoint is down.
        for draft in drafts:
            # There is nothing to ask a model about a single image.
            if how.labeller != "llm" or len(draft.example.images) < 2:
                draft.label = label_by_rules(draft.example, how.text)
        if how.labeller != "rules":
            assert how.endpoint is not None
            asked = [d for d in drafts if not (isinstance(d.label, Label) and d.label.sure)]
            found = label_by_llm([d.example for d in asked], how.endpoint, how.text)
            for draft, label in zip(asked, found, strict=True):
                draft.label = label

    def _rephrase(self, drafts: Sequence[_Draft]) -> None:
        assert self.how.endpoint is not None
        found = rephrase([draft.example for draft in drafts], self.how.endpoint)
        for draft, new in zip(drafts, found, strict=True):
            if isinstance(new, EndpointError):
                draft.label = new
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
        layout, where = self._dataset.layout, self._source.place(i)
        row = layout.with_chats(self._row(i), where)
        question = layout.question(row, where)
        options = read_options(row, where)
        answers = (key for key in layout.convention.answer if row.get(key) is not None)
        answer = next(answers, "answer")
        text: Any = new.question
        if not isinstance(row[question], str):
            text = [t for t in row[question] if "system" in (t.get("role"), t.get("from"))]
            text.append({"role": "user", "content": new.question})
        gold: Any = new.answer
        if isinstance(row.get(answer), Mapping):
            gold = {**row[answer], "ground_truth": new.answer}
        changes: dict[str, Any] = {question: text, answer: gold}
        # They ask for the old answer or conclude with it.
        convention = layout.convention
        old = ("demonstration", *convention.response, *({"input"} & {*convention.turns}))
        old += options.columns if options else ()
        changes |= {key: None for key in old if row.get(key) is not None}
        changes = dict(layout.theirs(changes))
        original = {key: self._source.row(i).get(key) for key in changes}
        return {**changes, "rephrased": new.question_type, "original": original}

    def _written(self, draft: _Draft) -> dict[str, Any]:
        """The row with its label, which is `unsure` where the row does not load with it."""
        i, label = draft.number, draft.label
        if not isinstance(label, Label):
            raise UserError(f"{label} ({self.so_far}; the same command goes on from there)")
        given = labels_of(self._row(i))
        if (
            not self.how.relabel
            and len(given) == 1
            and label.sure
            and "original" not in draft.changes
        ):
            label = self._held(draft.example, replace(label, **given))
        plan = None
        try:
            labels = {"kind": label.kind, "should_change": label.should_change}
            plan = self._load(i, {**draft.changes, **labels}).plan
        except UserError as error:
            label = unsure(str(error))
        columns = dict(zip(self._columns, (label.kind, label.should_change), strict=True))
        self.counts[label.kind, label.should_change, label.reason] += 1
        reason = {"label_reason": label.reason, "label_text": self.how.text}
        own = draft.row.get("plan")  # Another column of that name is the user's.
        read = {"plan": to_json(plan)} if plan and (own is None or from_json(own)) else {}
        return {**draft.row, **draft.changes, **columns, **reason, **read}

    def _resume(self) -> None:
        """Count what the output has already."""
        for written in read_rows(self.output):
            while self._skips and self.done < self.total and self._drafts([self.done])[0] == [None]:
                self.skipped += 1
                self.done += 1
            if self.done == self.total or not self._is_row(written, self.done):
                raise UserError(
                    f"--output {self.output} holds something else than the first rows of this data "
                    "with labels; replace it with --overwrite, or choose another --output"
                )
            kind, change = (written[name] for name in self._columns)
            self.counts[kind, change, written["label_reason"]] += 1
            self.done += 1
        keep_rows(self.output, self.written)

    def _is_row(self, written: Mapping[str, Any], i: int) -> bool:
        if not written.keys() >= {*self._columns, "label_reason"}:
            return False
        if (mode := written.get("label_text")) != self.how.text:
            raise UserError(
                f"--output {self.output} holds labels for --text {mode}, not {self.how.text}; "
                "replace it with --overwrite, or choose another --output"
            )
        images = self._dataset.layout.theirs(dict.fromkeys(IMAGES))
        changed = _WRITTEN_ANEW.union(self._columns, images, written.get("original") or ())
        return all(
            written.get(key) == value
            for key, value in self._source.row(i).items()
            if key not in changed and isinstance(value, str | int | float | bool)
        )
