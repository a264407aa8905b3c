"""What a case was measured on, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import plain

GLOSSARY = (
    "N: rows, one for each scored token. H: hidden size. V: vocabulary. */ 8* behind a model: an eighth of its width and "
    "of its vocabulary, so that a CPU can do it. *token level*: a policy ratio for each token, as in GRPO; *sequence "
    "level*: one for each sequence, as in GSPO. *frozen head*: the head gets no gradient. *queries*, *keys*, *size*: heads "
    "of the queries, of keys and values, and their size."
)
_LETTERS = {"N": "N = {} rows", "H": "H = {}", "V": "V = {}"}
_DTYPES = {2: "bfloat16", 4: "float32"}


def shape_line(shape: Mapping[str, Any], name: str = "") -> str:
    """`N = 256 rows, H = 256, V = 18,992, float32 (4 bytes), token level`; empty for no shape.

    Args:
        shape: a row's.
        name: its case's; a model that it names is not named again.
    """
    found = [text.format(_number(shape[key])) for key, text in _LETTERS.items() if key in shape]
    if size := dtype(shape):
        found.append(f"{size} ({shape['itemsize']} bytes)")
    if level := shape.get("level"):
        found.append(f"{plain(level)} level")
    if shape.get("frozen"):
        found.append("frozen head")
    if (model := shape.get("model")) and str(model) not in name:
        found.append(f"head of {plain(model)}")
    told = {"model", *_LETTERS, "itemsize", "level", "frozen"}
    found += [f"{plain(key)}: {_number(value)}" for key, value in shape.items() if key not in told]
    return ", ".join(found)


def dtype(shape: Mapping[str, Any]) -> str:
    """Of the benchmarks' inputs; empty where the shape does not tell."""
    size = shape.get("itemsize")
    return _DTYPES.get(size, "elements") if isinstance(size, int) else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else plain(value)
