"""Files that only their owner may read: logs and databases hold everything that happened. It opens none of others."""

from __future__ import annotations

import os
from contextlib import suppress

__all__ = ["make_private", "private"]


def private(path: str, flags: int) -> int:
    """As `opener` of `open`: what is made is the owner's alone, and what is there keeps its mode."""
    return os.open(path, flags, 0o600)


def make_private(path: str | os.PathLike[str]) -> None:
    """Make an empty file that is the owner's alone, unless there is one. SQLite gives the files beside a database the
    database's mode. Where it cannot be made, whoever opens it next says why."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
