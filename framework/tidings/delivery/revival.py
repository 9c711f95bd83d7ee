"""Held events come back: those that are due are found and put into their lanes, a partition key's oldest first.

It runs no handler and writes nothing. What flies in lanes is not looked for again before it has landed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Final

import structlog
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tidings.database.held_code import in_code
from tidings.database.held_due import AT_ONCE
from tidings.database.held_events import HeldEvent, Line
from tidings.delivery.breaker import Breakers
from tidings.delivery.due import HELD_SECONDS, Due
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.keys import Keys
from tidings.delivery.lanes import EventLanes
from tidings.delivery.site import Joined
from tidings.errors import DatabaseUnavailable
from tidings.modelling.fingerprints import fingerprint

__all__ = ["Revival"]

log = structlog.get_logger("tidings.delivery")

FLYING: Final = 1024
"""Lines whose held events are in lanes at once; while handlers hang, or the breaker is open, no more come."""


class Revival:
    """The search for held events of one bucket range, while the bus gives this process messages."""

    def __init__(self, joined: Joined, keys: Keys, breakers: Breakers, due: Due, lanes: EventLanes) -> None:
        self._service = joined.site.service
        self._database = joined.site.database
        self._joined = joined
        self._keys = keys
        self._breakers = breakers
        self._due = due
        self._lanes = lanes
        self.active = asyncio.Event()
        """Set while the bus gives this process messages. Whoever stands by leaves held events to the one at work."""
        self.gone: set[tuple[str, str]] = set()
        """Handler and type of held events whose handler is not in this code: they wait for one that has it."""

    async def renew(self) -> None:
        """What failed in other code is due at once: a deploy may have mended it. Raises `DatabaseUnavailable`."""
        codes = {
            handler.name: fingerprint(handler.function, handler.events) for handler in self._service.named.values()
        }
        async with self._database.reading() as connection:
            if not await self._joined.held.code.outdated(connection, codes):
                return
        async with self._database.turn, self._database.transaction() as connection:
            events = await self._joined.held.code.renew(connection, codes, time.time())
        log.info("service.tries_held_again", service=self._service.name, events=events, reason="its code has changed")

    async def run(self) -> None:
        """Until cancelled; `keys` has just been read when it becomes active. Raises `DatabaseUnavailable`, and `Fenced`
        after a replay was asked for."""
        holds = [handler.retry.hold for handler in self._service.named.values()]
        longest = max((hold.maximum for hold in holds if hold is not None), default=0.0)
        loop, due = asyncio.get_running_loop(), self._due
        await self.active.wait()
        next_whole = loop.time() + HELD_SECONDS * due.pauses
        while True:
            await self.active.wait()
            due.look.clear()
            if loop.time() >= next_whole:
                due.whole = due.stale = True
                next_whole = loop.time() + HELD_SECONDS * due.pauses
            # What flies now may be settled by a commit that this reading does not see.
            flying = self._keys.flying
            if len(flying) < FLYING:
                left, due.left = due.left, set()
                whole, due.whole = due.whole, False
                rows, trials = await self._find(longest, flying, None if whole else left)
                self._fly_all(rows)
                for row in trials:
                    self._try(row)
                self._lanes.pump()
                due.whole = due.whole or len(rows) >= AT_ONCE
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_whole):
                    await due.look.wait()

    async def _find(
        self, longest: float, flying: Collection[Line], left: Collection[Line] | None
    ) -> tuple[list[HeldEvent], list[HeldEvent]]:
        """What may run now; and of handlers whose breaker is open, what is to be tried."""
        paused, held = dict(self._breakers.open), self._joined.held
        try:
            async with self._database.reading() as connection:
                await self._joined.inbox.watermarks.fence(connection, locking=False)
                if left is None:
                    self._find_gone(await held.code.gone(connection, self._service))
                rows = await self._joined.held.due.find(
                    connection, time.time(), longest, flying, left, paused, self.gone
                )
                besides = {*flying, *(row.line for row in rows)}
                trials: list[HeldEvent] = []
                for name, breaker in paused.items():
                    if breaker.wants_trial:
                        newest = breaker.takes_newest
                        trials += await held.due.candidate(connection, name, besides, newest=newest, gone=self.gone)
                        besides.update(row.line for row in trials)
                return rows, trials
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, PoolTimeout):
                return [], []  # handlers hold all connections (a database in memory has one): no reason to end them
            raise

    def _find_gone(self, gone: set[tuple[str, str]]) -> None:
        for handler, kind in sorted(gone - self.gone):
            log.warning(
                "handler.not_in_code",
                service=self._service.name,
                handler=handler,
                type=kind,
                advice="its held events wait, and later events of their keys behind them: bring the handler back, or "
                f"skip or drop them (tidings held list --handler {handler})",
            )
        self.gone = gone

    def _fly_all(self, rows: Collection[HeldEvent]) -> None:
        """Up to the first of each line that nobody can run."""
        stopped: set[Line] = set()
        for row in rows:
            if not in_code(self._service, row.handler, row.event.type):
                stopped.add(row.line)
            if row.line not in stopped:
                self._fly(row)

    def _try(self, row: HeldEvent) -> None:
        breaker = self._breakers.open.get(row.handler)
        if not in_code(self._service, row.handler, row.event.type):
            return
        if breaker is not None:
            breaker.begin_trial()
        self._fly(row, trial=breaker is not None)

    def _fly(self, row: HeldEvent, *, trial: bool = False) -> None:
        self._keys.fly(row.line)
        role = Role.TRIAL if trial else Role.AGAIN
        item = InFlight(row.event, row.bucket, self._service.named[row.handler], role, row)
        item.replayed = row.replayed
        self._lanes.add(item)
