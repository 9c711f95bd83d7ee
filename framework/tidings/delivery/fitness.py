"""Whether an event may share a transaction without a savepoint: nothing is known against it. Pure decisions; no I/O."""

from __future__ import annotations

from typing import Final

from tidings.delivery.batch import Pending
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.progress import Progress
from tidings.delivery.site import Joined

__all__ = ["CONTENDED_SECONDS", "Fitness"]

CONTENDED_SECONDS: Final = 1.0
"""Seconds in which one transaction is under way at a time, after two were in each other's way."""


class Fitness:
    """The test for events of one bucket range."""

    def __init__(self, joined: Joined, hindrances: Hindrances, pending: Pending, progress: Progress) -> None:
        self._memory = joined.site.memory
        self._clock = joined.site.clock
        self._caution = joined.caution
        self._hindrances = hindrances
        self.pending = pending
        self._progress = progress
        self._contended_until = 0.0

    def of(self, item: InFlight) -> bool:
        """It is plain: new, by a handler with a session, and nothing has failed."""
        if not item.handler.transactional or item.role > Role.SHARED or item.replayed or self._caution.alert:
            return False
        if self._progress.spans or (self._contended_until and self._clock() < self._contended_until):
            return False
        memory, turn = self._memory, item.turn
        known = turn in memory.attempts or turn in memory.undone or turn in memory.suspected
        if known or turn in memory.condemned or item.event.position in memory.crashed:
            return False
        return self._hindrances.of(item) is None

    def contended(self) -> None:
        """Two transactions were in each other's way (a deadlock): for a while, one is under way at a time."""
        self._contended_until = self._clock() + CONTENDED_SECONDS
