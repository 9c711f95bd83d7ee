"""Staged events that requests emitted (`service.transaction`), and the requests that wait for their append. No I/O."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID
from weakref import WeakValueDictionary

from tidings.database.staged_events import StagedEvent

__all__ = ["Requests"]

GONE_SECONDS: Final = 2.0
"""Seconds within which the row of an event that was appended is gone."""


class Requests:
    """Events of requests that one stager is to append."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[UUID, float] = {}
        """What requests emitted, as long as it has a row: infinity, or when it was appended."""
        self._watched: WeakValueDictionary[UUID, asyncio.Future[bool]] = WeakValueDictionary()
        """Events that requests wait for."""
        self.away = False
        """The store has been away for several attempts: a request that waited for it would wait in vain."""

    def began(self, row: StagedEvent) -> None:
        """It is going to be appended."""
        if row.requested:
            self._known[row.event.id] = math.inf

    def ended(self, row: StagedEvent) -> None:
        """It was appended, or given up."""
        if row.requested:
            self._known[row.event.id] = self._clock()

    def new(self, rows: Sequence[StagedEvent], *, all: bool) -> list[StagedEvent]:
        """Return those that nobody here is appending. `rows` are `all` that wait in the database, or the oldest."""
        # A row that stays after its append is another one of the same id, by a request that came again.
        late = self._clock() - GONE_SECONDS
        new = [row for row in rows if self._known.get(row.event.id, -math.inf) < late]
        if all:
            known, self._known = self._known, {}
            for row in rows:
                if (done_at := known.get(row.event.id)) is not None:
                    self._known[row.event.id] = done_at
        return new

    def watch(self, identity: UUID) -> asyncio.Future[bool]:
        """As `Stager.watch`."""
        future = self._watched.get(identity)
        if future is None:
            self._watched[identity] = future = asyncio.get_running_loop().create_future()
            if self.away or self._known.get(identity, math.inf) < math.inf:
                future.set_result(not self.away)
        return future

    def tell(self, identity: UUID, appended: bool) -> None:
        """Tell who waits for it."""
        future = self._watched.get(identity)
        if future is not None and not future.done():
            future.set_result(appended)

    def disappoint(self) -> None:
        """Tell everybody that it is not appended for now."""
        for identity in list(self._watched):
            self.tell(identity, False)
