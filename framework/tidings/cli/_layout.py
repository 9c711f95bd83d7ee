"""Breaks Python expressions over several lines, as formatters do."""

from __future__ import annotations

import io
import tokenize
from itertools import pairwise
from typing import Final

__all__ = ["laid_out"]

WIDTH: Final = 120
"""Characters of a line, at most, if the expression can be broken there."""


def laid_out(expression: str, indent: int = 0, *, before: int = 0, after: int = 1) -> str:
    """Return an expression on as many lines as it needs.

    All lines but the first begin with at least `indent` spaces. `before` is the number of characters in front of the
    expression on its first line, `after` that of the characters behind it on its last line.
    """
    if indent + before + len(expression) + after <= WIDTH:
        return expression
    parts = _split(expression)
    if parts is None:
        return expression
    head, items, tail = parts
    inner = " " * (indent + 4)
    lines = [f"{inner}{laid_out(item, indent + 4)},\n" for item in items]
    return f"{head}\n{''.join(lines)}{' ' * indent}{tail}"


def _split(expression: str) -> tuple[str, list[str], str] | None:
    """Split an expression at its first bracket: the text up to and with it, the items in it, and the rest.

    Return None if there is no bracket, nothing in it, or something behind it.
    """
    depth, begin, commas, end = 0, -1, list[int](), -1
    try:
        for token in tokenize.generate_tokens(io.StringIO(expression).readline):
            if token.type != tokenize.OP:
                continue
            at = token.start[1]
            if token.string in "([{":
                depth += 1
                begin = at if begin < 0 else begin
            elif token.string in ")]}":
                depth -= 1
                if depth == 0:
                    end = at
                    break
            elif token.string == "," and depth == 1:
                commas.append(at)
    except (tokenize.TokenError, SyntaxError):
        return None
    if end < 0 or expression[end + 1 :].strip():
        return None
    edges = [begin, *commas, end]
    items = [expression[one + 1 : other].strip() for one, other in pairwise(edges)]
    items = [item for item in items if item]
    return (expression[: begin + 1], items, expression[end:]) if items else None
