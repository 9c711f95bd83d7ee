"""Held events come back: those that are due are found and put into their lanes, a partition key's oldest first.

It runs no handler and writes nothing. What flies in lanes is not looked for again before it has landed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database
from tidings.database.held_code import in_code
from tidings.database.held_due import AT_ONCE
from tidings.database.held_events import HeldEvent, Line
from tidings.database.held_rows import HeldRows
from tidings.delivery.breaker import Breakers
from tidings.delivery.keys import Keys
from tidings.delivery.work import Item
from tidings.errors import DatabaseUnavailable
from tidings.modelling.fingerprints import fingerprint

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["HELD_SECONDS", "Revival"]

log = structlog.get_logger("tidings.dispatch")

HELD_SECONDS: Final = 1.0
"""So often a service looks through all held events, because operators may have changed what they wait for. What it
knows itself (a time that has come, an event that ran) it looks for at once, and only for that."""
FLYING: Final = 1024
"""Lines whose held events are in lanes at once; while handlers hang, or the breaker is open, no more come."""


class Revival:
    """`give` puts an item into its lane, `pump` gives out what the lanes have."""

    def __init__(
        self,
        service: Declaration,
        database: Database,
        held: HeldRows,
        keys: Keys,
        breakers: Breakers,
        give: Callable[[Item], None],
        pump: Callable[[], None],
        fence: Callable[[AsyncConnection], Awaitable[None]],
    ) -> None:
        self._service = service
        self._database = database
        self._held = held
        self._keys = keys
        self._breakers = breakers
        self._give = give
        self._pump = pump
        self._fence = fence
        self.active = asyncio.Event()
        """Set while the bus gives this process messages. Whoever stands by leaves held events to the one at work."""
        self.look = asyncio.Event()
        """Look again now, not only when the second is over."""
        self._left: set[Line] = set()
        """Lines of which a held event has landed and left others behind."""
        self._gone: set[tuple[str, str]] = set()
        """Handler and type of held events whose handler is not in this code: they wait for one that has it."""
        self._whole = True
        """The next look is through all held events."""
        self.stale = False
        """Operators may have changed what blocks keys: read it again. What this process does, it knows; what another
        process does, fences it."""

    async def renew(self) -> None:
        """What failed in other code is due at once: a deploy may have mended it. Raises `DatabaseUnavailable`."""
        codes = {
            handler.name: fingerprint(handler.function, handler.events) for handler in self._service.named.values()
        }
        async with self._database.reading() as connection:
            if not await self._held.code.outdated(connection, codes):
                return
        async with self._database.turn, self._database.transaction() as connection:
            events = await self._held.code.renew(connection, codes, time.time())
        log.info("service.tries_held_again", service=self._service.name, events=events, reason="its code has changed")

    async def run(self) -> None:
        """Until cancelled; begin it when `keys` has just been read. Raises `DatabaseUnavailable`, and `Fenced` after a
        replay was asked for."""
        holds = [handler.retry.hold for handler in self._service.named.values()]
        longest = max((hold.maximum for hold in holds if hold is not None), default=0.0)
        loop = asyncio.get_running_loop()
        next_whole = loop.time() + HELD_SECONDS
        while True:
            await self.active.wait()
            self.look.clear()
            if loop.time() >= next_whole:
                self._whole = self.stale = True
                next_whole = loop.time() + HELD_SECONDS
            # What flies now may be settled by a commit that this reading does not see.
            flying = self._keys.flying
            if len(flying) < FLYING:
                left, self._left = self._left, set()
                whole, self._whole = self._whole, False
                rows, trials = await self._due(longest, flying, None if whole else left)
                self._fly_all(rows)
                for row in trials:
                    self._try(row)
                self._pump()
                self._whole = self._whole or len(rows) >= AT_ONCE
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_whole):
                    await self.look.wait()

    def look_at_all(self) -> None:
        """Look through all held events now: what they waited for may be over."""
        self._whole = True
        self.look.set()

    async def _due(
        self, longest: float, flying: Collection[Line], left: Collection[Line] | None
    ) -> tuple[list[HeldEvent], list[HeldEvent]]:
        """What may run now; and of handlers whose breaker is open, what is to be tried."""
        paused = dict(self._breakers.open)
        try:
            async with self._database.reading() as connection:
                await self._fence(connection)
                if left is None:
                    self._find_gone(await self._held.code.gone(connection, self._service))
                rows = await self._held.due.find(connection, time.time(), longest, flying, left, paused, self._gone)
                besides = {*flying, *(row.line for row in rows)}
                trials: list[HeldEvent] = []
                for name, breaker in paused.items():
                    if breaker.wants_trial:
                        newest = breaker.takes_newest
                        trials += await self._held.due.candidate(
                            connection, name, besides, newest=newest, gone=self._gone
                        )
                        besides.update(row.line for row in trials)
                return rows, trials
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, PoolTimeout):
                return [], []  # handlers hold all connections (a database in memory has one): no reason to end them
            raise

    def _find_gone(self, gone: set[tuple[str, str]]) -> None:
        for handler, kind in sorted(gone - self._gone):
            log.warning(
                "handler.not_in_code",
                service=self._service.name,
                handler=handler,
                type=kind,
                advice="its held events wait, and later events of their keys behind them: bring the handler back, or "
                f"skip or drop them (tidings held list --handler {handler})",
            )
        self._gone = gone

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
        item = Item(row.event, row.bucket, self._service.named[row.handler], None, row, replayed=row.replayed)
        item.trial = trial
        self._give(item)

    def landed(self, row: HeldEvent) -> None:
        """What came of a held event is durable, or it was left alone."""
        if self._keys.land(row.line):
            if self._keys.blocks(row):
                self._left.add(row.line)
            self.look.set()
