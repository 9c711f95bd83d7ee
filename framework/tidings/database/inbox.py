"""What a service remembers of the log, in its own database: its parts, and their state when a process joins.

Nothing but `join`, and what reads on its own, begins a transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.dead_letters import DeadLetters
from tidings.database.engine import Database
from tidings.database.floors import Floor
from tidings.database.layout import layout_of
from tidings.database.notes import Notes
from tidings.database.occupancy import Occupancy
from tidings.database.partials import Partials
from tidings.database.replays import Replay, find_replay
from tidings.database.scope import Scope
from tidings.database.skips import Skips
from tidings.database.spans import Spans
from tidings.database.staged_events import StagedEvent, StagedEvents
from tidings.database.watermarks import Watermarks
from tidings.errors import Fenced, LogChanged

__all__ = ["Inbox", "Remembered"]


class Remembered(NamedTuple):
    """The durable state of one bucket range, as found when joining."""

    floor: int
    watermarks: dict[int, int]
    replay: Replay = Replay()
    skips: frozenset[int] = frozenset()
    """Positions of events that an operator wants dead without being run."""
    partial: Mapping[int, Mapping[str, bool]] = {}
    """Position to the handlers that are done with an event which waits for others, True for one that a replay has run
    it again."""
    partial_at: Mapping[int, int] = {}
    """Bucket to the position of its rows of that kind, the highest."""

    @property
    def highest(self) -> int:
        """The highest position that was handled: the log cannot end below it."""
        return max(self.floor, *self.watermarks.values())


class Inbox:
    """One service's rows about one log and one range of buckets."""

    def __init__(
        self, database: Database, service: str, log: UUID, buckets: range, *, epoch: int | None = None
    ) -> None:
        """With `epoch`, it joins only while the service is laid out as in that epoch."""
        self._database = database
        self._epoch = epoch
        self._scope = scope = Scope(service, log, buckets)
        self.watermarks = Watermarks(scope)
        self.floor = Floor(scope)
        self.partials = Partials(scope)
        self.spans = Spans(scope)
        self.staged = StagedEvents(scope)
        self.dead = DeadLetters(scope)
        self.skips = Skips(scope)
        self.occupancy = Occupancy(scope)
        self.notes = Notes(scope)
        self._replay = Replay()

    @property
    def buckets(self) -> range:
        """The range."""
        return self._scope.buckets

    async def join(self) -> Remembered:
        """Read the range's state, making its rows the first time.

        Raises `LogChanged` when only another log was followed so far, `Fenced` when another process made the rows at
        the same moment, or when the service was resized.
        """
        try:
            async with self._database.turn, self._database.transaction() as connection:
                return await self._join(connection)
        except IntegrityError as error:
            raise Fenced(f"service {self._scope.service!r}: another process joined at the same moment") from error

    async def check_layout(self) -> None:
        """Raises `Fenced` when the service was resized since this process laid it out, and `DatabaseUnavailable`."""
        async with self._database.reading() as connection:
            await self._check_layout(connection)

    async def _join(self, connection: AsyncConnection) -> Remembered:
        await self._check_layout(connection, locked=True)
        await self._check_log(connection)
        # The floor first: receipts that are read afterwards have everything up to it.
        floor = await self.floor.make(connection)
        receipted = await self.floor.is_receipted(connection)
        marks = await self.watermarks.read(connection, floor, receipted=receipted)
        if not receipted:
            await self.floor.receipt(connection, floor)
        await self.notes.forget_settled(connection)
        self._replay = await find_replay(connection, self._scope, floor, marks)
        skips = await self.skips.read(connection, floor)
        return Remembered(floor, marks, self._replay, skips, *await self.partials.read(connection, floor, marks))

    async def _check_layout(self, connection: AsyncConnection, *, locked: bool = False) -> None:
        if self._epoch is not None:
            layout = await layout_of(connection, self._scope.service, locked=locked)
            if layout is None or layout.epoch != self._epoch:
                raise Fenced(f"service {self._scope.service!r} was resized, and this process has not heard of it yet")

    async def _check_log(self, connection: AsyncConnection) -> None:
        rows, service, log = tables.floors, self._scope.service, self._scope.log
        logs = set(await connection.scalars(sa.select(rows.c.log).where(rows.c.service == service).distinct()))
        if logs and str(log) not in logs:
            raise LogChanged(f"service {service!r}", UUID(min(logs)), log)

    async def read_floor(self) -> int:
        """Return the floor as whichever process stored it; -1 for none. Raises `DatabaseUnavailable`."""
        async with self._database.reading() as connection:
            floor = await self.floor.read(connection)
        return -1 if floor is None else floor

    async def read_active(self) -> str | None:
        """Return the process that is at work, or ended without a word; None after a clean end. Raises
        `DatabaseUnavailable`."""
        async with self._database.reading() as connection:
            return await self.occupancy.read(connection)

    async def read_staged(self) -> list[StagedEvent]:
        """Return what an earlier process staged and may or may not have appended, the oldest first. Raises
        `DatabaseUnavailable`."""
        async with self._database.reading() as connection:
            return await self.staged.read(connection)

    async def leave(self, connection: AsyncConnection, process: str) -> None:
        """Note that `process` ends cleanly; nothing is noted where another one has taken over."""
        if await self.occupancy.leave(connection, process):
            await self.notes.forget_all(connection)

    async def emitted_before(
        self, connection: AsyncConnection, rows: Iterable[StagedEvent], replayed: Collection[int] = ()
    ) -> set[str]:
        """Return the ids of those whose cause is replayed and that wait for their append already, or were given up,
        under whatever name of their handler: they are not staged a second time. `replayed` are positions of causes that
        run again by themselves."""
        half_done = self.partials.half_done
        of_id = {
            str(identity): str(row.event.id)
            for row in rows
            if self._replay.covers(row.bucket, row.cause) or row.cause in half_done or row.cause in replayed
            for identity in row.ids
        }
        if not of_id:
            return set()
        return {of_id[identity] for identity in await self.staged.known(connection, list(of_id))}
