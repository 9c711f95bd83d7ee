"""How many messages that nobody can read are kept as dead letters: whoever may publish could fill the database else.

It keeps nothing itself, and does no I/O.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

__all__ = ["Allowance"]

KEPT: Final = 1000
"""Messages that are kept in one `WINDOW_SECONDS`."""
KEPT_BYTES: Final = 64 * 1024 * 1024
"""Bytes of their bodies."""
WINDOW_SECONDS: Final = 3600.0
"""Seconds after which as many are kept again."""


class Allowance:
    """What one process of a service still keeps of unreadable messages."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._kept = self._bytes = 0

    def take(self, size: int) -> bool:
        """Count a message with so many bytes, and return whether it is to be kept."""
        now = self._clock()
        if now - self._began >= WINDOW_SECONDS:
            self._began, self._kept, self._bytes = now, 0, 0
        if self._kept >= KEPT or self._bytes + size > KEPT_BYTES:
            return False
        self._kept += 1
        self._bytes += size
        return True
