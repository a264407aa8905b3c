"""`perl-rl preview`: its options, and which of them a recipe and which data take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from perl.config import Command, Config, Positive
from perl.recipe import DEFAULT_RECIPE, check_options, is_data
from perl.report.progress import Display
from perl.types import UserError

_OF_RECIPES = ("n", "stage", "data.train", "data.eval", "data.mix")
_OF_DATA = ("text", "orders", "limit", "json", "html")


@dataclass(frozen=True)
class Preview(Command):
    """What a model will be shown. Reads the data, and of a model that is named its tokenizer and image processor, no weights.

    Of DATA, each row as the model would see it: the text with its images in some of their orders, the right answer in each, and why
    images may move or not; rows that training would refuse, with the reason. As in

        perl-rl preview data/train.jsonl
        perl-rl preview data/train.jsonl --orders all --json
        perl-rl preview data/train.jsonl --text references --html preview.html

    Of a RECIPE, some training questions as the chat template writes them, and what each reward function gives for their right
    answers, as in `perl-rl preview mine.toml --data.instruction think-tags`.

    A bundled recipe's name or a .toml file is a recipe. Data are a file or folder that is there, or a name with one of / : * , . in it.
    Every key of a recipe can be given with both, as --data.map, --model.path or --reward.functions."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE|DATA")] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file; or what data.train takes."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    text: Literal["slots", "references"] | None = None
    """Of data: what keeps text and images consistent; empty: permutation.text."""
    orders: Positive | Literal["all"] | None = None
    """Of data: image orders shown of each row, the original one first, then as the first epoch draws them; all: every one,
    up to 120 of a row; empty: permutation.orders."""
    limit: Positive | None = None
    """Of data: only the first rows; empty: the first 200, and with --json alone all."""
    json: bool = False
    """Of data: one JSON object for each order of a row, or refused row, a line, and nothing else on standard output."""
    html: Path | None = None
    """Of data: write a page with the pictures to this file."""
    n: Positive | None = None
    """Of a recipe: questions of each data source, from all over it; empty: 3."""
    stage: str = ""
    """Of a recipe: name of another stage; empty: the first of RL."""
    given: Annotated[frozenset[str], Suppress] = frozenset()
    """The keys that the command line names."""

    def execute(self) -> None:
        check_options(self)
        if is_data(self.recipe):
            self._refuse(_OF_RECIPES, "a recipe", "data")
            self._show_data()
            return
        from perl.evaluation.preview.recipe import preview_recipe

        self._refuse(_OF_DATA, "data", "a recipe")
        preview_recipe(self.config, self.n or 3, self.stage)

    def _refuse(self, names: Sequence[str], whose: str, here: str) -> None:
        given = [name for name in names if getattr(self, name, None) not in (None, "", False)]
        given += sorted(self.given & set(names))
        if given:
            raise UserError(
                f"--{given[0]} is an option of {whose}, and {self.recipe} is {here}; leave it out"
            )

    def _show_data(self) -> None:
        from perl.data.rows import check_output
        from perl.evaluation.preview.listing import Totals, print_json, print_row
        from perl.evaluation.preview.page import Page
        from perl.evaluation.preview.rows import FIRST, Rows

        if self.html:
            check_output(self.html, self.recipe, "--html")
        permutation = self.config.permutation
        permutation = replace(permutation, text=self.text or permutation.text)
        config = replace(self.config, permutation=permutation)
        limit = self.limit or (None if self.json and not self.html else FIRST)
        count = None if self.orders == "all" else self.orders or permutation.orders
        rows = Rows(self.recipe, config, count, limit)
        page, totals = Page() if self.html else None, Totals(rows)
        with Display(enabled=bool(page)) as display:
            display.stage("preview", rows.shown, unit="row")
            for row in rows:
                totals.add(row)
                if page:
                    page.add(row)
                if self.json:
                    print_json(row)
                elif not page:
                    print_row(row)
                display.advance()
        if page and self.html:
            page.write(self.html, rows, totals)
        if self.json:
            print(totals.line, file=sys.stderr)
        else:
            totals.print()
        if self.html:
            print(f"page: {self.html}", file=sys.stderr if self.json else sys.stdout)
