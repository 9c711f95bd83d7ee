"""Find one event: by its id, at a stream's version, or at a global position. It only reads.

The store has no look-up by id. An event that a service keeps in a row is found through that row, and every other one
by reading the log.
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

__all__ = ["EventNotFound", "Lookup", "OnProgress", "Target", "Waiting", "waiting_rows"]

Target = UUID | int | tuple[str, int]
"""What names one event: its id, its global position, or stream and version."""

OnProgress = Callable[[int, int, int], None]
"""A callback that is told of progress: events read, the position reached, and the position where reading ends."""

STEP: Final = 1000
"""Events between two reports of progress."""


class EventNotFound(TidingsError):
    """Neither the log nor any row of a service has the event."""


class Waiting(NamedTuple):
    """An emitted event that is not in the log: staged, or a dead letter because the store refused it."""

    service: str
    refused: str | None
    cause: int
    row: sa.Row[Any]


class Lookup:
    """A search in one log and its services. A service without a database has never run."""

    def __init__(
        self,
        store: EventStore,
        services: Sequence[tuple[Declaration, Database | None]],
        log: UUID,
        progress: OnProgress,
    ) -> None:
        self.store = store
        self.services = services
        self.log = log
        self._progress = progress
        self._looked = 0

    async def find(self, target: Target) -> RecordedEvent | Waiting:
        """Find the event.

        Raises `EventNotFound`, `StreamNotFound`, `StreamDeleted`, `StoreUnavailable`, `DatabaseUnavailable`.
        """
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
        """Return the event at a global position; None if there is none.

        Reads from the nearer end of the log, because a store can only begin to read at an end or at an event.
        """
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
                with suppress(StreamNotFound, StreamDeleted):  # retention hides it: the log may still show it
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
        """Return the conditions for rows of the service and this log."""
        return table.c.service == service, table.c.log == str(self.log)

    async def _kept_at(self, connection: AsyncConnection, service: str, id: UUID) -> list[tuple[str, int]]:
        """Return stream and version of the event from held and dead rows."""
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
        """Yield the log's events above position `after`, the newest first."""
        async for event in self.store.read_all(after=after, backwards=True):
            self.read(event, max(after, 0))
            yield event

    def read(self, event: RecordedEvent, end: int) -> None:
        """Count an event that was read, and report progress after every `STEP` events; reading ends at `end`."""
        self._looked += 1
        if self._looked % STEP == 0:
            self._progress(self._looked, event.position, end)


def waiting_rows(table: sa.Table) -> sa.Select[Any]:
    """Return the query for emitted events that are not in the log, with the same columns for both tables."""
    columns = [table.c[name] for name in ("event_id", "type", "stream", "data", "metadata", "is_json")]
    if table is staged:
        return sa.select(*columns, staged.c.cause, sa.null().label("reason"))
    return sa.select(*columns, dead.c.position.label("cause"), dead.c.reason).where(dead.c.kind == "staged")
