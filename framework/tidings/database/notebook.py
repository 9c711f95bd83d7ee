"""What a process has begun and not ended, in a small file beside its database that outlives the process.

The file is mapped into memory, so that a note costs no call into the system; it is not made durable, for it speaks of
the end of a process, not of the machine's. Without a file (a database on a server, or in memory) nothing is noted here.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from struct import Struct
from typing import Final

from tidings.protocol.position import BUCKETS

__all__ = ["Notebook", "notebook_of"]

_SLOT: Final = Struct("<qq")
"""Position + 1 (0: empty), and bucket."""


def notebook_of(file: str | None, process: str, first: int) -> str | None:
    """The notebook of a process at work on the range that begins at bucket `first`, beside the database's file."""
    return None if file is None else f"{file}-begun-{process}-{first}"


class Notebook:
    """`slots` events at most are under way at once; what does not fit is not noted."""

    def __init__(self, path: str | None, slots: int) -> None:
        self._path = path
        self._size = slots * _SLOT.size
        self._file: mmap.mmap | None = None
        self._free = list(range(slots))
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

    @property
    def open(self) -> bool:
        """It has a file."""
        return self._file is not None

    def keep(self) -> None:
        """Make the file again if it is gone: a process that took over in between has read and removed it."""
        if self._file is not None and self._path is not None and not os.path.exists(self._path):
            noted = bytes(self._file)
            self._file.close()
            self._file = None
            self._make()
            if self._file is not None:
                self._file[:] = noted

    def begin(self, position: int, bucket: int) -> None:
        """An attempt at an event begins."""
        if self._file is not None and self._free:
            slot = self._used[position] = self._free.pop()
            _SLOT.pack_into(self._file, slot * _SLOT.size, position + 1, bucket)

    def end(self, position: int) -> None:
        """The attempt ended, and the process did not."""
        if self._file is not None and (slot := self._used.pop(position, None)) is not None:
            _SLOT.pack_into(self._file, slot * _SLOT.size, 0, 0)
            self._free.append(slot)

    def close(self) -> None:
        """Nothing is under way any more: the file goes."""
        if self._file is not None and self._path is not None:
            self._file.close()
            self._file = None
            self.discard(self._path)

    @staticmethod
    def read(path: str | None) -> dict[int, int] | None:
        """What was under way when the process that wrote it ended, position to bucket. None where nobody noted it."""
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
        with suppress(OSError):
            if path is not None:
                os.unlink(path)
