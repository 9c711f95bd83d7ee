"""What to do about a log or a database that can be read, but takes no writes: the same words wherever it is told."""

from __future__ import annotations

from typing import Final

__all__ = ["STORE_WRITABLE", "writable", "writes_refused"]

STORE_WRITABLE: Final = (
    "free the disk of the store's machine (df -h), or make it writable: nothing can be appended until then. What "
    "services emit waits in their databases, and goes on by itself"
)
"""What to do about a log that takes no appends."""


def writes_refused(error: str) -> str:
    return f"the log can be read, but takes no appends: {error}"


def writable(place: str) -> str:
    """What to do about a database that takes no writes; `place` is its file or URL."""
    goes_on = "the service goes on by itself, and nothing is lost"
    if "://" in place:
        return (
            "free its disk, or name the primary in TIDINGS_DATABASE. On PostgreSQL, as the service's user: "
            f"psql -c 'SHOW transaction_read_only' -c 'SELECT pg_is_in_recovery()' ({place}). Then {goes_on}"
        )
    return (
        f"free its disk or make it writable: df -h '{place}'; ls -l '{place}'; findmnt -T '{place}' (is it mounted "
        f"ro?); lsof '{place}' (does somebody hold it?). Then {goes_on}"
    )
