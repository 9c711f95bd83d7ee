"""Staged events: what handlers and requests emitted, in rows until it is appended to the store.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope, in_parts
from tidings.stores import JSON, OCTETS, EventData

__all__ = ["StagedEvent", "StagedEvents", "requested_events", "stage"]

_STAGE: Final = tables.staged.insert()


class StagedEvent(NamedTuple):
    """An emitted event that waits to be appended. `bucket` and `cause` (a position) are those of the handled event."""

    bucket: int
    cause: int
    stream: str
    event: EventData
    aliases: tuple[UUID, ...] = ()
    """Ids under which it may have been appended when its handler had another name."""
    requested: bool = False
    """A request emitted it (`service.transaction`), no handler: `cause` is only a position below which it cannot be."""

    @property
    def ids(self) -> tuple[UUID, ...]:
        """All of its ids: if an event with any of them is in the log, this one is."""
        return (self.event.id, *self.aliases)


class StagedEvents:
    """The staged events of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        rows = tables.staged
        self._remove = rows.delete().where(*scope.of_log(rows), rows.c.event_id == sa.bindparam("of_id"))

    async def read(self, connection: AsyncConnection) -> list[StagedEvent]:
        """Return what an earlier process staged and may or may not have appended, the oldest first."""
        rows = tables.staged
        found = sa.select(rows).where(*self._scope.in_range(rows)).order_by(rows.c.id)
        return [_staged(row) for row in await connection.execute(found)]

    async def add(self, connection: AsyncConnection, rows: Sequence[StagedEvent]) -> None:
        """Keep events for their append."""
        await stage(connection, self._scope.own, rows)

    async def remove(self, connection: AsyncConnection, ids: Sequence[UUID]) -> None:
        """Forget staged events that were appended."""
        if ids:
            await connection.execute(self._remove, [{"of_id": str(identity)} for identity in sorted(ids)])

    async def give_up(self, connection: AsyncConnection, id: UUID) -> bool:
        """Forget a staged event that is to be a dead letter; False when another process did before."""
        return (await connection.execute(self._remove, {"of_id": str(id)})).rowcount > 0

    async def known(self, connection: AsyncConnection, ids: Sequence[str]) -> set[str]:
        """Return which of these ids wait for their append already, or were given up."""
        found: set[str] = set()
        for some in in_parts(list(ids)):
            waiting, dead = (
                sa.select(table.c.event_id).where(*self._scope.of_log(table), table.c.event_id.in_(some))
                for table in (tables.staged, tables.dead)
            )
            # One statement sees one moment: an operator may bring one from the dead letters back at any time.
            both = sa.union_all(waiting, dead.where(tables.dead.c.kind == "staged"))
            found.update(await connection.scalars(both))
        return found


async def stage(connection: AsyncConnection, own: Mapping[str, Any], rows: Sequence[StagedEvent]) -> None:
    """Keep events for their append; `own` is the service and the log that they belong to."""
    if rows:
        await connection.execute(_STAGE, [{**own, **_columns(row)} for row in rows])


async def requested_events(connection: AsyncConnection, service: str, log: UUID, limit: int) -> list[StagedEvent]:
    """Return the oldest of what requests emitted, in whichever process, and nobody has appended yet."""
    rows = tables.staged
    mine = (rows.c.service == service, rows.c.log == str(log), rows.c.requested)
    found = await connection.execute(sa.select(rows).where(*mine).order_by(rows.c.id).limit(limit))
    return [_staged(row) for row in found]


def _columns(row: StagedEvent) -> dict[str, Any]:
    return {
        "bucket": row.bucket,
        "cause": row.cause,
        "stream": row.stream,
        "event_id": str(row.event.id),
        "type": row.event.type,
        "data": row.event.data,
        "metadata": row.event.metadata,
        "is_json": row.event.content_type == JSON,
        "aliases": " ".join(map(str, row.aliases)),
        "requested": row.requested,
    }


def _staged(row: sa.Row[Any]) -> StagedEvent:
    return StagedEvent(
        row.bucket,
        row.cause,
        row.stream,
        EventData(row.type, row.data, row.metadata, JSON if row.is_json else OCTETS, id=UUID(row.event_id)),
        tuple(map(UUID, row.aliases.split())),
        row.requested,
    )
