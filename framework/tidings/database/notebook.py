"""The events that a process is handling, in a small file beside its database that outlives the process.

The file is mapped into memory, so a note needs no system call. It is not flushed to disk: it must survive the end of
the process, not of the machine. Without a file (a database on a server, or in memory) nothing is noted here.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from struct import Struct
from typing import Final

from tidings.protocol.position import BUCKETS

__all__ = ["Notebook", "notebook_of"]

_SLOT: Final = Struct("=qq")
"""Position + 1 (0: empty), and bucket."""


def notebook_of(file: str | None, process: str, first: int) -> str | None:
    """Return the path of the notebook of a process at work on the range that begins at bucket `first`."""
    return None if file is None else f"{file}-begun-{process}-{first}"


class Notebook:
    """The notes of one process on one range. It has room for `slots` events at once; further ones are not noted."""

    def __init__(self, path: str | None, slots: int) -> None:
        self._path = path
        self._size = slots * _SLOT.size
        self._file: mmap.mmap | None = None
        self._slots: memoryview | None = None
        """The file's numbers, two for each slot."""
        self._free = list(range(0, 2 * slots, 2))
        self._used: dict[int, int] = {}
        self._make()

    def _make(self) -> None:
        with suppress(OSError):  # a folder that cannot be written: the database will say so
            if self._path is not None:
                with open(self._path, "w+b") as file:
                    # With its blocks: to write to a mapped page that the disk has no room for ends the process.
                    file.write(bytes(self._size))
                    file.flush()
                    self._file = mmap.mmap(file.fileno(), self._size)
                    self._slots = memoryview(self._file).cast("q")

    @property
    def open(self) -> bool:
        """Whether it has a file."""
        return self._file is not None

    def keep(self) -> None:
        """Make the file again if it is gone: another process has taken over meanwhile, read it and deleted it."""
        if self._file is not None and self._path is not None and not os.path.exists(self._path):
            noted = bytes(self._file)
            self._unmap()
            self._make()
            if self._file is not None:
                self._file[:] = noted

    def begin(self, position: int, bucket: int) -> None:
        """Note that an attempt at an event begins."""
        slots = self._slots
        if slots is not None and self._free:
            slot = self._used[position] = self._free.pop()
            slots[slot + 1] = bucket
            slots[slot] = position + 1

    def end(self, position: int) -> None:
        """Delete the note: the attempt has ended, and the process has not."""
        slots = self._slots
        if slots is not None and (slot := self._used.pop(position, None)) is not None:
            slots[slot] = 0
            self._free.append(slot)

    def close(self) -> None:
        """Delete the file: no attempt is under way any more."""
        if self._file is not None and self._path is not None:
            self._unmap()
            self.discard(self._path)

    def _unmap(self) -> None:
        if self._slots is not None:
            self._slots.release()
        if self._file is not None:
            self._file.close()
        self._file = self._slots = None

    @staticmethod
    def read(path: str | None) -> dict[int, int] | None:
        """Return what was under way when its process ended, position to bucket; None where there is no whole file."""
        try:
            with open(path or os.devnull, "rb") as file:
                content = file.read()
        except OSError:
            return None
        if not content or len(content) % _SLOT.size:
            return None
        found = {position - 1: bucket for position, bucket in _SLOT.iter_unpack(content) if position}
        return found if all(position >= 0 and 0 <= bucket < BUCKETS for position, bucket in found.items()) else None

    @staticmethod
    def discard(path: str | None) -> None:
        """Delete a notebook's file, if there is one."""
        with suppress(OSError):
            if path is not None:
                os.unlink(path)
