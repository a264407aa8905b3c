"""Tables on the terminal, the same for every command."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_WIDE = 200
"""Columns where standard output is no terminal: a file or a pipe has no width to fold to."""


def print_table(
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    left: int = 1,
    rules: Collection[int] = (),
) -> None:
    """Print a table, its first row the header.

    Args:
        rows: all of one length.
        title: stands above it.
        left: how many columns are aligned to the left; the others hold numbers.
        rules: numbers of the rows that are set off from those above; the header is 0.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for number, heading in enumerate(rows[0]):
        justify = "left" if number < left else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for number, row in enumerate(rows[1:], 1):
        if number in rules:
            table.add_section()
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    if title:
        console.print(title)  # As a title of rich's it would be folded to the width of the table.
    console.print(table)
