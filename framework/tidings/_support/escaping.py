"""Foreign text made fit for a terminal. It loses nothing: what cannot be shown is there as an escape."""

from __future__ import annotations

__all__ = ["plain", "plain_lines"]


def plain(text: str) -> str:
    """The text with everything escaped that could move a cursor, change a colour or reverse the order of letters."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def plain_lines(text: str) -> str:
    """As `plain`, in lines as a traceback has them. The first stays where it is, the others are moved to the right, so
    that no text can begin a line that looks like another entry's."""
    return "\n  ".join(map(plain, text.split("\n")))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
