"""Texts that hold a list or an object, as JSON or as Python, numpy and pandas print it."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from typing import Any

_SPACE = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
_VALUES = (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)


def read_literal(text: str) -> Any:
    """What a text holds: JSON, or Python's or numpy's print of lists, dicts, texts and numbers.

    Example: `read_literal("[{'role': 'user'}\\n {'role': 'assistant'}]")` is a list of two dicts.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        why = str(error)
        # Python would take `\f` of a LaTeX text for a form feed.
        if why.startswith("Invalid \\escape"):
            raise ValueError(why) from error
    try:
        tree = ast.parse(_with_commas(text.strip()), mode="eval")
        return ast.literal_eval(_Lists().visit(tree))
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(why) from error


def _with_commas(text: str) -> str:
    """Python's text with a comma between two values that follow each other, where numpy prints none."""
    words: list[str] = []
    ended = False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SPACE:
            continue
        if ended and (token.type in _VALUES or token.string in ("{", "[")):
            words.append(",")
        ended = token.type in _VALUES or token.string in ("}", "]", ")")
        words.append(token.string)
    return " ".join(words)


class _Lists(ast.NodeTransformer):
    """`array([...], dtype=object)` as the list that it is of."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        plain = isinstance(node.func, ast.Name) and node.func.id == "array" and len(node.args) == 1
        return self.visit(node.args[0]) if plain else node
