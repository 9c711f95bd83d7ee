"""Which other process has a SQLite database open, or a file locked. It asks the operating system; it locks nothing."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from typing import Final

__all__ = ["lock_holder", "open_elsewhere", "writer_elsewhere"]

# While a database in WAL mode is open, each of its connections holds a shared lock on this byte of the -shm file
# (UNIX_SHM_DMS in SQLite's os_unix.c); the last one to close it deletes the file.
_OPEN: Final = 128
# Whoever writes holds this one (WAL_WRITE_LOCK in SQLite's wal.c, at WALINDEX_LOCK_OFFSET).
_WRITER: Final = 120
_DARWIN: Final = sys.platform == "darwin"
_FLOCK: Final = "qqihh" if _DARWIN else "hhqqi"
"""The kernel's struct flock: fcntl(2)."""


def open_elsewhere(file: str) -> int | None:
    """The id of a process, this one apart, that has the SQLite database open; None when nobody has.

    For a database that this process has closed: POSIX drops all its own locks on a file of which it closes any
    descriptor. Raises `OSError` where this user may not look.
    """
    return _holder_of(file, _OPEN)


def writer_elsewhere(file: str) -> int | None:
    """Return the id of a process that has the one writer of a SQLite database in WAL mode; else as `open_elsewhere`."""
    return _holder_of(file, _WRITER)


def _holder_of(file: str, byte: int) -> int | None:
    try:
        descriptor = os.open(f"{file}-shm", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return lock_holder(descriptor, byte, 1)
    finally:
        os.close(descriptor)


def lock_holder(descriptor: int, first: int = 0, length: int = 0) -> int | None:
    """The id of a process, this one apart, that has a lock on these bytes of the file (by default on any); None when
    nobody has. 0 where the system does not say who."""
    # Would a lock for writing be refused, and by whom?
    wanted = (
        (first, length, 0, fcntl.F_WRLCK, os.SEEK_SET) if _DARWIN else (fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
    )
    found = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *wanted)))
    kind, process = (found[3], found[2]) if _DARWIN else (found[0], found[4])
    return None if kind == fcntl.F_UNLCK else max(int(process), 0)
