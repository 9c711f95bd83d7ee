"""Which other process has a SQLite database open. It asks the operating system, and changes nothing."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from typing import Final

__all__ = ["open_elsewhere"]

# While a database in WAL mode is open, each of its connections holds a shared lock on this byte of the -shm file
# (UNIX_SHM_DMS in SQLite's os_unix.c); the last one to close it deletes the file.
_BYTE: Final = 128
_DARWIN: Final = sys.platform == "darwin"
_FLOCK: Final = "qqihh" if _DARWIN else "hhqqi"
"""The kernel's struct flock: fcntl(2)."""


def open_elsewhere(file: str) -> int | None:
    """The id of a process, this one apart, that has the SQLite database open; None when nobody has.

    For a database that this process has closed: POSIX drops all its own locks on a file of which it closes any
    descriptor. Raises `OSError` where this user may not look.
    """
    try:
        descriptor = os.open(f"{file}-shm", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Would a lock for writing be refused, and by whom?
        lock = (_BYTE, 1, 0, fcntl.F_WRLCK, os.SEEK_SET) if _DARWIN else (fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0)
        found = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *lock)))
    finally:
        os.close(descriptor)
    kind, process = (found[3], found[2]) if _DARWIN else (found[0], found[4])
    return None if kind == fcntl.F_UNLCK else int(process)
