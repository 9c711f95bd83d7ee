"""Whether a file can grow, as its file system says. It writes nothing."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["no_room"]

ROOM: Final = 1 << 20
"""Bytes that must be free. SQLite takes small writes into pages that it has already, until it needs new ones."""


def no_room(path: str) -> str | None:
    """Return why the file cannot grow: its file system is full or read-only, or the user may not write to it. None if
    it can, and if the system does not say."""
    try:
        found = os.statvfs(path)
    except (OSError, AttributeError):  # Windows has no statvfs
        return None
    if found.f_flag & os.ST_RDONLY:
        return f"the file system of {path} is read-only"
    root = os.geteuid() == 0
    free = (found.f_bfree if root else found.f_bavail) * found.f_frsize
    if found.f_blocks and free < ROOM:  # some file systems do not count their blocks
        return f"the disk of {path} is full: {free} bytes are free"
    return None if os.access(path, os.W_OK) else f"{path} cannot be written: its permissions do not let this user"
