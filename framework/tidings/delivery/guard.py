"""Events that are noted before they are run, so that one that ends the process is found out. It runs no handler."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from tidings.delivery.batch import Pending
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.lanes import EventLanes
from tidings.delivery.site import Joined
from tidings.delivery.succession import Succession

__all__ = ["Guard", "Survivors"]

LOOK_SECONDS: Final = 0.01
"""Seconds until what waits for others to end, or for a commit, looks again."""


class _Runners(Protocol):
    def give(self, item: InFlight) -> None: ...


class Survivors:
    """Told of events that were noted, or suspected, and have not ended the process."""

    def __init__(self, joined: Joined, pending: Pending) -> None:
        self._service = joined.site.service
        self._pending = pending
        self.caution = joined.caution

    def note(self, item: InFlight, *, ran: bool = True) -> None:
        """Whatever came of the attempt, if there was one: it did not end the process."""
        position, name = item.turn
        handlers = () if item.role is Role.PLAIN else self._service.handlers_of(item.event.type)
        if self.caution.ended(position, name, [other.name for other in handlers], ran=ran):
            self._pending.noted(position, self.caution.times(position))


class Guard:
    """A part of the gate: what is to be noted first is given to it; `run` notes it, and gives it to the runners."""

    def __init__(self, joined: Joined, succession: Succession, lanes: EventLanes, runners: _Runners) -> None:
        self._joined = joined
        self._succession = succession
        self._lanes = lanes
        self._runners = runners
        self._waiting: list[InFlight] = []
        self._some = asyncio.Event()
        self._caution = joined.caution

    def __len__(self) -> int:
        """Events that wait to be noted."""
        return len(self._waiting)

    def give(self, item: InFlight) -> None:
        """Note it, then give it out."""
        self._caution.notes.taken(item.event.position, item.bucket)
        self._waiting.append(item)
        self._some.set()

    def take_back(self) -> int:
        """Forget what waits to be noted, and say how many that were."""
        number = len(self._waiting)
        self._waiting.clear()
        return number

    async def run(self) -> None:
        """Until cancelled. Raises `DatabaseUnavailable`, and `Fenced` when another process has taken the range over."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                async with self._succession.turn:
                    group = self._next()
                    await self._note(group)
                for item in group:
                    self._runners.give(item)
                if not group:
                    await asyncio.sleep(LOOK_SECONDS)

    def _next(self) -> list[InFlight]:
        """Those that are noted now, taken out of what waits."""
        waiting = {item.event.position: item for item in self._waiting}
        positions = self._caution.group(waiting)
        at_work = self._lanes.under_way - len(self._waiting)  # or waiting for their commit
        if not positions or (at_work and self._caution.patience(positions[0])):
            return []
        group = [waiting[position] for position in positions]
        self._waiting = [item for item in self._waiting if item not in group]
        return group

    async def _note(self, group: list[InFlight]) -> None:
        if group:
            database, inbox = self._joined.site.database, self._joined.inbox
            async with database.turn, database.transaction() as connection:
                await inbox.occupancy.lock(connection, self._joined.site.process)
                notes = {item.event.position: self._caution.note(item.event.position) for item in group}
                await inbox.notes.add(connection, notes)
