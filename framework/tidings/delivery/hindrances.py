"""Why an event is not run although its turn has come: an earlier one of its partition key, or its handler's breaker.

It is asked at the last moment, because what was given out before may have changed the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.held_rows import HeldRows
from tidings.delivery.breaker import Breakers
from tidings.delivery.due import Due
from tidings.delivery.inflight import AGAIN, TRIAL, InFlight
from tidings.delivery.keys import Keys
from tidings.delivery.outcomes import BEHIND

__all__ = ["Hindrances"]


class Hindrances:
    """What the keys and the breakers of one bucket range say."""

    def __init__(self, held: HeldRows, keys: Keys, breakers: Breakers, due: Due) -> None:
        self._held = held
        self._keys = keys
        self._breakers = breakers
        self._due = due

    def of(self, item: InFlight) -> str | None:
        """Return why the event is not run now; None where it may begin."""
        if not self._keys.blocked and not self._breakers.open and item.role < AGAIN:  # nearly always
            return None
        breaker = None if item.role is TRIAL else self._breakers.open.get(item.handler.name)
        if self._keys.must_wait(item):
            return BEHIND
        if breaker is None:
            return None
        return f"waits until handler {item.handler.name!r} succeeds again: {breaker.reason}"

    async def read(self, connection: AsyncConnection, uncommitted: Iterable[InFlight]) -> None:
        """Read which keys are blocked, in the transaction of `connection`; `uncommitted` will change it."""
        self._keys.reading()
        self._keys.read(await self._held.blocked(connection), uncommitted)

    async def refresh(self, connection: AsyncConnection, uncommitted: Iterable[InFlight]) -> None:
        """As `read`, where operators may have changed it since it was read last."""
        if self._due.stale:
            self._due.stale = False
            await self.read(connection, uncommitted)
