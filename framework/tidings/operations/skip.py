"""Skips one event of a service: the event becomes a dead letter that blocks nothing, whatever its state was.

If the service has not done the event yet, the skip is noted in its database, and every process that does not know the
note is fenced: it can no longer commit the event, joins again, and makes it dead without running it. So a skip is
durable before the service comes to the event, and works even if the service is paused, stuck, or dies at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.held_events import turns
from tidings.database.tables import dead, floors, held, skips, watermarks
from tidings.database.watermarks import lock_service
from tidings.errors import TidingsError
from tidings.operations.fencing import fence
from tidings.operations.held import as_skipped
from tidings.protocol.position import carried
from tidings.stores import RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["NotSkippable", "Skip", "skip", "skip_state"]


class NotSkippable(TidingsError):
    """The service will never run the event, or has already done so."""


class Skip(Enum):
    """The state that an event was in, and what skipping it changes."""

    HELD = "held"
    """It was held, and is dead now."""
    DEAD = "dead"
    """It was dead and blocked its partition key, which goes on now."""
    RELEASED = "dead already"
    """It was dead and blocked nothing. Nothing was changed."""
    PENDING = "not handled yet"
    """It will be dead when the service comes to it."""
    NOTED = "skipped before"
    """It was skipped before, and will be dead when the service comes to it. Nothing was changed."""


async def skip_state(database: Database, service: Declaration, log: UUID, event: RecordedEvent) -> Skip:
    """Return what `skip` would return, without changing anything. Raises `NotSkippable`, `DatabaseUnavailable`."""
    async with database.reading() as connection:
        return (await _look(connection, service, log, event))[0]


@again_when_contended
async def skip(database: Database, service: Declaration, log: UUID, event: RecordedEvent) -> Skip:
    """Skip the event, in one transaction, and return which state it was in.

    Raises `NotSkippable`, `DatabaseUnavailable`.
    """
    name, at = service.name, event.position
    async with database.turn, commanding(database) as connection:
        await lock_service(connection, name, log)
        found, rows, pending = await _look(connection, service, log, event, locked=True)
        if rows:
            await connection.execute(dead.insert(), [as_skipped(row) for row in rows])
            await connection.execute(held.delete().where(*_of(held, name, log), held.c.position == at))
        if found is Skip.DEAD:
            letters = (*_of(dead, name, log), dead.c.kind == "handler", dead.c.position == at)
            await connection.execute(dead.update().where(*letters).values(holds_key=False))
        bucket = carried(event)
        if pending and found is not Skip.NOTED and bucket is not None:
            values = {"service": name, "log": str(log), "position": at, "bucket": bucket}
            await connection.execute(skips.delete().where(*_of(skips, name, log), skips.c.position == at))
            await connection.execute(skips.insert().values(values))
            await fence(connection, name, log, (bucket,))
    return found


def _of(table: sa.Table, service: str, log: UUID) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.service == service, table.c.log == str(log)


async def _look(
    connection: AsyncConnection, service: Declaration, log: UUID, event: RecordedEvent, *, locked: bool = False
) -> tuple[Skip, Sequence[sa.Row[Any]], bool]:
    """Return the event's state, its held rows, and whether a handler may still come to it."""
    name, at, bucket = service.name, event.position, carried(event)
    where = f"event {event.id} (position {at}) of stream {event.stream!r}"
    if bucket is None:
        raise NotSkippable(f"{where} is never carried to services: there is nothing to skip")
    of_event = sa.select(held).where(*_of(held, name, log), held.c.position == at).order_by(*turns(connection))
    rows = (await connection.execute(of_event.with_for_update() if locked else of_event)).all()
    letters = (*_of(dead, name, log), dead.c.kind == "handler", dead.c.position == at)
    holding = list(await connection.scalars(sa.select(dead.c.holds_key).where(*letters)))
    mark = await connection.scalar(
        sa.select(watermarks.c.position).where(*_of(watermarks, name, log), watermarks.c.bucket == bucket)
    )
    floor = await connection.scalar(
        sa.select(sa.func.max(floors.c.position)).where(
            *_of(floors, name, log), floors.c.first_bucket <= bucket, floors.c.last_bucket >= bucket
        )
    )
    pending = mark is not None and at > max(mark, -1 if floor is None else floor)
    pending = pending and bool(service.handlers_of(event.type))
    if rows:
        return Skip.HELD, rows, pending
    if holding and any(holding):
        return Skip.DEAD, (), pending
    if pending:
        noted = sa.select(skips.c.position).where(*_of(skips, name, log), skips.c.position == at)
        return (Skip.PENDING if await connection.scalar(noted) is None else Skip.NOTED), (), True
    if holding:
        return Skip.RELEASED, (), False
    if not service.handlers_of(event.type):
        raise NotSkippable(f"service {name!r} has no handler for {event.type!r}, so it passes by {where} in any case")
    if mark is None:
        raise NotSkippable(f"service {name!r} has never run on log {log}: start it once, then skip the event")
    raise NotSkippable(f"service {name!r} has handled {where}: there is nothing to skip. Nothing was changed.")
