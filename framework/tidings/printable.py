"""Foreign text made fit for a terminal."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """The text with everything escaped that could move a cursor, change a colour or reverse the order of letters."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
