"""Find one event: by its id, at a stream's version, or at a global position. It only reads.

The store has no look-up by id: what services keep in rows is found by these, everything else by reading the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database
from tidings.database.tables import dead, held, staged
from tidings.errors import StreamDeleted, StreamNotFound, TidingsError
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["EventNotFound", "Lookup", "Progress", "Target", "Waiting", "waiting_rows"]

Target = UUID | int | tuple[str, int]
"""An event's id, its global position, or stream and version."""

Progress = Callable[[int, int, int], None]
"""Told events read, position, and where reading goes to."""

STEP: Final = 1000
"""Events between two reports of progress."""


class EventNotFound(TidingsError):
    """Neither the log nor a service's row has the event."""


class Waiting(NamedTuple):
    """A staged event, or a dead letter of one."""

    service: str
    refused: str | None
    cause: int
    row: sa.Row[Any]


class Lookup:
    """In one log and its services; a service without a database has never run."""

    def __init__(
        self,
        store: EventStore,
        services: Sequence[tuple[Declaration, Database | None]],
        log: UUID,
        progress: Progress,
    ) -> None:
        self.store = store
        self.services = services
        self.log = log
        self._progress = progress
        self._looked = 0

    async def find(self, target: Target) -> RecordedEvent | Waiting:
        """Raises `EventNotFound`, `StreamNotFound`, `StreamDeleted`, `StoreUnavailable`, `DatabaseUnavailable`."""
        if isinstance(target, UUID):
            return await self._by_id(target)
        if isinstance(target, int):
            event = await self.at(target)
            if event is None:
                raise EventNotFound(f"no event is at position {target}; the log ends at {await self.store.head()}")
            return event
        stream, version = target
        event = await self._in_stream(stream, version)
        if event is not None:
            return event
        raise EventNotFound(
            f"stream {stream!r} shows no version {version}. If retention hides it, name the event by position or id"
        )

    async def _in_stream(self, stream: str, version: int) -> RecordedEvent | None:
        async for event in self.store.read_stream(stream, start=version, limit=1):
            return event if event.version == version else None
        return None

    async def at(self, position: int) -> RecordedEvent | None:
        """The event at a global position, None for none; read from the nearer end of the log, because stores begin to
        read at an event or at an end, and not between."""
        head = await self.store.head()
        backwards = position > head // 2
        async for event in self.store.read_all(backwards=backwards):
            self.read(event, position)
            if event.position == position:
                return event
            if (event.position < position) is backwards:
                return None
        return None

    async def _by_id(self, id: UUID) -> RecordedEvent | Waiting:
        waiting: Waiting | None = None
        for service, database in self.services:
            if database is None:
                continue
            async with database.reading() as connection:
                kept = await self._kept_at(connection, service.name, id)
                waiting = waiting or await self._waiting(connection, service.name, id)
            for stream, version in kept:
                with suppress(StreamNotFound, StreamDeleted):  # retention: the log itself still shows it
                    event = await self._in_stream(stream, version)
                    if event is not None and event.id == id:
                        return event
        after, head = -1 if waiting is None else waiting.cause, await self.store.head()
        async for event in self.backwards(after):
            if event.id_bytes == id.bytes:
                return event
        if waiting is not None:
            return waiting
        names = ", ".join(service.name for service, _ in self.services)
        rows = f"held, dead and staged rows of {names}, and " if names else ""
        raise EventNotFound(
            f"no event has the id {id}. Searched: {rows}all {self._looked} events of log {self.log}, which ends at "
            f"position {head}"
        )

    def own(self, table: sa.Table, service: str) -> tuple[sa.ColumnElement[bool], ...]:
        """Which rows are the service's, and of this log."""
        return table.c.service == service, table.c.log == str(self.log)

    async def _kept_at(self, connection: AsyncConnection, service: str, id: UUID) -> list[tuple[str, int]]:
        """Stream and version in held and dead rows."""
        letters = sa.select(dead.c.stream, dead.c.version).where(*self.own(dead, service), dead.c.kind == "handler")
        late = sa.select(held.c.stream, held.c.version).where(*self.own(held, service))
        query = sa.union_all(late.where(held.c.event_id == str(id)), letters.where(dead.c.event_id == str(id)))
        return [(row[0], row[1]) for row in await connection.execute(query)]

    async def _waiting(self, connection: AsyncConnection, service: str, id: UUID) -> Waiting | None:
        for table in (staged, dead):
            query = waiting_rows(table).where(*self.own(table, service), table.c.event_id == str(id))
            for row in await connection.execute(query):
                return Waiting(service, row.reason, row.cause, row)
        return None

    async def backwards(self, after: int) -> AsyncIterator[RecordedEvent]:
        """The newest first, down to `after`."""
        async for event in self.store.read_all(after=after, backwards=True):
            self.read(event, max(after, 0))
            yield event

    def read(self, event: RecordedEvent, end: int) -> None:
        """Count it, and tell now and then; reading goes to `end`."""
        self._looked += 1
        if self._looked % STEP == 0:
            self._progress(self._looked, event.position, end)


def waiting_rows(table: sa.Table) -> sa.Select[Any]:
    """Rows of emitted events that are not in the log, of either table alike."""
    columns = [table.c[name] for name in ("event_id", "type", "stream", "data", "metadata", "is_json")]
    if table is staged:
        return sa.select(*columns, staged.c.cause, sa.null().label("reason"))
    return sa.select(*columns, dead.c.position.label("cause"), dead.c.reason).where(dead.c.kind == "staged")
