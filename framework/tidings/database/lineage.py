"""The identity of a log through restored backups: which log an event belongs to, and how a log gets a new identity.

A log that was restored from a backup goes on with other events than before, at the same positions. So it gets a new
identity, and whoever still knows the old one is refused, instead of mistaking one event for another. Its events up to
the restored position are the old ones: they keep their identity, and with it the ids of the events that they cause.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.json_limits import parse
from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.tables import (
    begun,
    dead,
    floors,
    handlers,
    held,
    metadata,
    partials,
    replays,
    skips,
    spans,
    staged,
)
from tidings.database.watermarks import lock_service, lower
from tidings.errors import LogChanged, StreamNotFound, TidingsError
from tidings.stores import EventData, EventStore

__all__ = ["Adopted", "Lineage", "NothingToAdopt", "Renewal", "adopt", "lineage_of", "renew"]

LOG_STREAM: Final = "tidings_log"
RENEWED: Final = "tidings_LogRenewed"
_FOLLOWING: Final = [table for table in metadata.sorted_tables if "log" in table.c]
"""The tables whose rows are about one log."""


class NothingToAdopt(TidingsError):
    """The service's database follows this log already, or no log at all."""


class Lineage:
    """The identities of a log. `former` has the last position of each earlier identity, the oldest first."""

    __slots__ = ("former", "log")

    def __init__(self, log: UUID, former: Sequence[tuple[int, UUID]] = ()) -> None:
        self.log = log
        self.former = tuple(former)

    def at(self, position: int) -> UUID:
        """Return the identity that the log had at the position."""
        for upto, log in self.former:
            if position <= upto:
                return log
        return self.log

    def common(self, log: UUID) -> int | None:
        """Return the position up to which this log and an earlier one are the same; None for an unrelated log."""
        return next((upto for upto, former in self.former if former == log), None)


class Renewal(NamedTuple):
    """What `renew` did."""

    before: UUID
    log: UUID
    position: int
    """The last position at which the log is still the old one."""


class Adopted(NamedTuple):
    """What `adopt` did to one service's database."""

    before: UUID
    position: int
    """The position up to which the service's work still counts."""
    lost: int
    """The number of held or dead events that the log has lost. They are dead letters of kind `message` now."""
    beyond: int
    """The number of buckets in which the service handled events that the log has lost. Their effects stay."""


async def lineage_of(store: EventStore) -> Lineage:
    """Read the lineage from the log. Raises `StoreUnavailable`."""
    log, former = await store.log_id(), list[tuple[int, UUID]]()
    try:
        async for event in store.read_stream(LOG_STREAM):
            if event.type == RENEWED:
                told = parse(event.data)
                former.append((int(told["position"]), UUID(told["before"])))
    except StreamNotFound:
        pass
    return Lineage(log, former)


async def renew(store: EventStore) -> Renewal:
    """Give the log a new identity. Nothing else may use the log meanwhile. Raises `StoreError`."""
    before, position, version = await store.log_id(), await store.head(), -1
    async for event in store.read_stream(LOG_STREAM, backwards=True, limit=1):
        version = event.version
    log = uuid4()
    told = {"log": str(log), "before": str(before), "position": position}
    await store.append(LOG_STREAM, [EventData(RENEWED, json.dumps(told).encode(), id=log)], expected=version)
    return Renewal(before, log, position)


@again_when_contended
async def adopt(database: Database, service: str, lineage: Lineage) -> Adopted:
    """Let a service's database follow the log as it is now, in one transaction.

    What the service has done still counts up to the position where both logs are the same. What it did after that is
    forgotten, except for its effects. Raises `LogChanged` for a database of another log, `NothingToAdopt`,
    `DatabaseUnavailable`.
    """
    async with database.turn, commanding(database) as connection:
        logs = set(await connection.scalars(sa.select(floors.c.log).where(floors.c.service == service).distinct()))
        if str(lineage.log) in logs or not logs:
            what = "follows this log already" if logs else "has never followed a log"
            raise NothingToAdopt(f"service {service!r} {what} ({lineage.log}). Nothing was changed.")
        known = [(upto, UUID(log)) for log in logs if (upto := lineage.common(UUID(log))) is not None]
        if not known:
            raise LogChanged(f"service {service!r}", UUID(min(logs)), lineage.log)
        upto, before = max(known, key=lambda one: one[0])
        await lock_service(connection, service, before)
        lost = await _lose(connection, service, before, upto)
        beyond = await _cap(connection, service, before, upto)
        for table in _FOLLOWING:
            await connection.execute(table.update().where(*_of(table, service, before)).values(log=str(lineage.log)))
    return Adopted(before, upto, lost, beyond)


def _of(table: sa.Table, service: str, log: UUID) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.service == service, table.c.log == str(log)


async def _cap(connection: AsyncConnection, service: str, log: UUID, upto: int) -> int:
    """Lower to the position whatever is above it. Returns the number of buckets concerned."""
    columns: list[tuple[sa.Table, Any]] = [
        (replays, replays.c.upto),
        (spans, spans.c.done),
        (spans, spans.c.upto),
        (handlers, handlers.c.since),
        (staged, staged.c.cause),
    ]
    for table, column in columns:
        await connection.execute(
            table.update().where(*_of(table, service, log), column > upto).values({column.key: upto})
        )
    for table in (partials, begun, skips):
        await connection.execute(table.delete().where(*_of(table, service, log), table.c.position > upto))
    return await lower(connection, service, log, upto)


async def _lose(connection: AsyncConnection, service: str, log: UUID, upto: int) -> int:
    """Keep what was held or dead above the position as dead letters that nobody can retry: another event may stand at
    their position."""
    reason = f"lost: its event was above position {upto}, where the restored log goes on with others. It was: "
    names = ("event_id", "stream", "type", "data", "metadata", "is_json", "handler", "attempts", "detail")
    above = (*_of(held, service, log), held.c.position > upto)
    rows = (await connection.execute(sa.select(held).where(*above))).all()
    now, own = datetime.now(UTC), {"service": service, "log": str(log), "kind": "message"}
    for row in rows:
        kept = {name: getattr(row, name) for name in names}
        await connection.execute(dead.insert().values(own | kept | {"reason": reason + row.reason, "died_at": now}))
    await connection.execute(held.delete().where(*above))
    letters = (*_of(dead, service, log), dead.c.kind == "handler", dead.c.position > upto)
    gone = (await connection.execute(sa.select(dead.c.id, dead.c.reason).where(*letters))).all()
    for letter in gone:
        changes = {"kind": "message", "reason": reason + letter.reason, "position": None, "holds_key": False}
        await connection.execute(dead.update().where(dead.c.id == letter.id).values(changes))
    return len(rows) + len(gone)
