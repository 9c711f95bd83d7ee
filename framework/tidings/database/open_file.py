"""Whether the file of an SQLite database is still the one that was opened. It reads and writes no file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from tidings.errors import DatabaseMoved

__all__ = ["OpenFile"]

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks at the path of an open file."""


class OpenFile:
    """The file that a database's connections have open, told from any other by its device and inode.

    SQLite goes on with a file that was moved or deleted as if nothing had happened: what is committed then is in no
    file of that name, and the next process begins with an empty one.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = os.path.abspath(path)
        """Also right after the process has gone to another folder."""
        self._clock = clock
        self._opened: tuple[int, int] | None = None
        self._next_look = 0.0

    def opened(self) -> None:
        """Note which file it is: the first connection has just opened it."""
        if self._opened is None:
            found = os.stat(self.path)
            self._opened = (found.st_dev, found.st_ino)
            self._next_look = self._clock() + LOOK_SECONDS

    def look(self) -> None:
        """As `check`, at most once in `LOOK_SECONDS`."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self.check()

    def check(self) -> None:
        """Raise `DatabaseMoved` when the path leads to no file, or to another one, than was opened."""
        if self._opened is None:
            return
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise DatabaseMoved(self.path, replaced=False) from None
        except OSError:  # a file system that does not answer: SQLite says so when it needs it
            return
        if (found.st_dev, found.st_ino) != self._opened:
            raise DatabaseMoved(self.path, replaced=True)
