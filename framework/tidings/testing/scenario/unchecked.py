"""Decisions and handlings that a test has begun and not yet compared with anything. It knows only texts.

The pytest plugin fails a test that leaves some.
"""

from __future__ import annotations

import itertools
from typing import Final

__all__ = ["checked", "left", "unchecked"]

_NUMBERS: Final = itertools.count(1)
_LEFT: Final = dict[int, str]()


def unchecked(what: str) -> int:
    """Note that something is to be compared; `what` says what was left out if it never is. Return its number."""
    number = next(_NUMBERS)
    _LEFT[number] = what
    return number


def checked(number: int) -> None:
    """Note that it was compared."""
    _LEFT.pop(number, None)


def left() -> list[str]:
    """Return what was never compared, and forget it."""
    found = list(_LEFT.values())
    _LEFT.clear()
    return found
