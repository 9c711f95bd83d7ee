"""How many groups may be under way at once: as many as there are, but one after two were in each other's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final

__all__ = ["Contention"]

FIRST_SECONDS: Final = 1.0
"""Seconds for which one group is under way at a time after the first deadlock; twice as long after the next ..."""
LONGEST_SECONDS: Final = 60.0
"""... but no longer than this."""


class Contention:
    """Told of deadlocks between transactions."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = 0.0
        self._seconds = FIRST_SECONDS
        self._turn = asyncio.Lock()

    @property
    def noticed_lately(self) -> bool:
        """One group at a time may begin."""
        return self._until > 0 and self._clock() < self._until

    def notice(self) -> None:
        """A group was undone for what another transaction did. Several at once count as one."""
        now = self._clock()
        if now < self._until:
            return
        lately = self._until > 0 and now - self._until < 2 * self._seconds
        self._seconds = min(2 * self._seconds, LONGEST_SECONDS) if lately else FIRST_SECONDS
        self._until = now + self._seconds

    def room(self) -> AbstractAsyncContextManager[object]:
        """Wait, while that is so, until no other group is under way that began meanwhile."""
        return self._turn if self.noticed_lately else nullcontext()
