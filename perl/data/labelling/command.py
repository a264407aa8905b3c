"""`perl-rl label`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from perl.config import Command, DataConfig
from perl.report.metrics import plural
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.types import UserError, one_line


@dataclass(frozen=True)
class Label(Command):
    """Say for every row of a data set which images may change places and whether its answer then follows, and write
    the rows with `kind`, `should_change` and `label_reason`. Stopped, the same command goes on where it was."""

    data: Positional[str] = ""
    """JSONL or Parquet file, or hub dataset."""
    output: Path | None = None
    """JSONL file; empty: NAME.labelled.jsonl beside the data."""
    labeller: Literal["rules", "llm", "rules+llm"] = "rules"
    """Rules over the text; the model behind PERL_LLM_URL; or that model where the rules are unsure."""
    text: Literal["slots", "references"] = "slots"
    """What permutation.text of the training will be: mentions of images stay, or follow their images."""
    rephrase: bool = False
    """Let the model behind PERL_LLM_URL turn open questions over several images into multiple choice first."""
    relabel: bool = False
    """Replace labels that the data has already."""
    map: tuple[str, ...] = ()
    """What columns of ours are called in the data, as in "question=problem_text"."""
    image_root: str = ""
    """Folder that image paths start from and may not leave; empty: the data file's. The rows written need none."""
    on_error: Literal["error", "skip"] = "error"
    """What to do with a faulty row: stop, or leave it out."""
    overwrite: bool = False
    """Start again instead of going on with the output."""
    limit: int | None = None
    """Only the first rows."""

    def execute(self) -> None:
        from perl.data.dataset import BUNDLED
        from perl.data.labelling.file import LabelledFile, Labelling
        from perl.data.rows import check_output, file_beside
        from perl.llm import Endpoint
        from perl.types import Interrupted

        if self.data.startswith(BUNDLED):
            raise UserError(f"{self.data}: bundled questions are labelled already")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")
        output = self.output or file_beside(self.data, "labelled.jsonl")
        check_output(output, self.data)
        asks = self.rephrase or self.labeller != "rules"
        endpoint = Endpoint.from_env() if asks else None
        how = Labelling(self.labeller, self.text, self.rephrase, self.relabel, endpoint)
        data = DataConfig(map=self.map, image_root=self.image_root, on_error=self.on_error)
        if self.overwrite and output.exists():
            _remove_labelled(output)
        file = LabelledFile(self.data, output, how, data, self.limit)
        if file.done == file.total:
            print(
                f"all {file.written} rows are labelled in {output} (--overwrite labels them again)"
            )
        try:
            with Display() as display:
                display.stage("label", file.total, file.done, unit="row")
                file.run(display.advance)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped: {file.so_far}; the same command goes on") from None
        if file.skipped:
            print(f"left out: {file.skipped} faulty {plural('row', file.skipped)}")
        _print_counts(file.counts, output)


def _remove_labelled(output: Path) -> None:
    with output.open("rb") as file:
        first = file.readline()
    if first and b'"label_reason"' not in first:
        raise UserError(
            f"--output {output} holds no labelled rows, so --overwrite leaves it alone; choose another"
        )
    output.unlink()


def _print_counts(counts: Mapping[tuple[str, bool, str], int], output: Path) -> None:
    rows: Counter[tuple[str, bool, str]] = Counter()
    for (kind, change, reason), count in counts.items():
        rows[kind, change, kind_of_reason(reason)] += count
    table = [("kind", "should_change", "reason", "rows")]
    for (kind, change, reason), count in sorted(rows.items(), key=lambda item: (-item[1], item[0])):
        table.append((kind, str(change).lower(), reason, str(count)))
    print_table(table, str(output), left=3)


def kind_of_reason(reason: str) -> str:
    """By which rows are counted: without the word that a rule found, which stands in brackets; a model's reasons are all
    different."""
    shown = "model" if reason.startswith("model: ") else re.sub(r" \(.*\)$", "", reason)
    return one_line(shown, 80)
