"""Rows of a preview as a page: the text with the pictures where the model sees them, in each order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.evaluation.preview.listing import cut, gold, label, moved
from perl.report.gallery import chat_text
from perl.report.html import thumbnail, write_page
from perl.types import IMAGE_SLOT, Variant

if TYPE_CHECKING:
    from perl.evaluation.preview.listing import Totals
    from perl.evaluation.preview.rows import Row, Rows

_LONG = 2000
"""Characters of a text between two images that are shown whole."""
OPEN = 6
"""Orders of a row that are shown at once; a click shows the others."""


class Page:
    """Takes rows one by one, and keeps small copies of their pictures, each distinct one once."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._pictures: dict[str, str] = {}

    def add(self, row: Row) -> None:
        said: dict[str, Any] = {"id": row.id, "refused": "", "reason": row.reason}
        if row.fault:
            said["refused"] = row.fault.message
        else:
            keys = [self._key(thumbnail(image)) for image in row.example.images]
            said["label"], said["moves"] = label(row), row.moves
            said["orders"] = [_order(row, variant, keys) for variant in row.variants]
            said["total"] = row.total
        self._rows.append(said)

    def write(self, path: Path, rows: Rows, totals: Totals) -> None:
        write_page(
            path,
            "preview.html.j2",
            title=rows.data,
            text=rows.text,
            counts=totals.counts,
            line=totals.line,
            pictures=self._pictures,
            rows=self._rows,
            open=OPEN,
        )

    def _key(self, uri: str) -> str:
        return self._pictures.setdefault(uri, f"p{len(self._pictures)}")


def _order(row: Row, variant: Variant, keys: Sequence[str]) -> dict[str, Any]:
    first, *rest = chat_text(variant.messages).split(IMAGE_SLOT)
    parts: list[Any] = [cut(first, _LONG)]
    for slot, (i, text) in enumerate(zip(variant.order, rest, strict=True)):
        parts.append(
            {"slot": slot + 1, "original": i + 1, "name": row.images[i], "picture": keys[i]}
        )
        parts.append(cut(text, _LONG))
    return {
        "order": " ".join(str(i + 1) for i in variant.order),
        "moved": moved(row, variant),
        "parts": [part for part in parts if part],
        "answer": gold(variant, _LONG),
    }
