"""Pages that stand alone: templates filled in, all text escaped, with their pictures inside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from perl.files import replacing

THUMBNAIL = 224
"""Longest side in pixels of a small picture in a page."""


def write_page(
    path: Path, template: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any
) -> None:
    """Write the template of this package, filled with `values`, whole or not at all; OSError where that cannot be done."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    page = environment.get_template(template).render(**values)
    with replacing(path) as draft:
        draft.write_bytes(page.encode("utf-8", "replace"))  # A lone surrogate is no reason to fail.


def thumbnail(image: Image.Image) -> str:
    """A small lossy copy, as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
