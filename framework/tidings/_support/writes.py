"""Whether a store or a database takes writes, as its own writes show."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Writes"]

DOUBT_SECONDS: Final = 15.0
"""Seconds after a failed write for which a small one that succeeds does not show that all do."""


class Writes:
    """Does a store or database take writes? Learned from the writes themselves."""

    def __init__(self) -> None:
        self.error: str | None = None
        """What the last write was answered, if it failed."""
        self.failing_since: float | None = None
        """When the first of the writes failed that none was proven to work after, by the monotonic clock."""
        self.failed_at = 0.0
        """When the last write failed, by the monotonic clock."""
        self.last_at = time.monotonic()
        """When the last write ended, well or not, by the monotonic clock."""

    def succeeded(self) -> None:
        """A write succeeded, perhaps one that changes hardly anything: it proves little while others fail."""
        now = time.monotonic()
        if self.error is not None and now - self.failed_at > DOUBT_SECONDS:
            self.proven()
        self.last_at = now

    def proven(self) -> None:
        """What had to be written was written."""
        self.error = self.failing_since = None
        self.last_at = time.monotonic()

    def failed(self, error: BaseException) -> None:
        self.last_at = self.failed_at = time.monotonic()
        self.error = str(error)
        if self.failing_since is None:
            self.failing_since = self.last_at
