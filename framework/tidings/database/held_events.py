"""Held events: what failed for now, and what waits behind it for its partition key; each runs again when it is due.

A key is blocked while it has a held event, or a dead letter that holds it. Later events of a blocked key are held
behind, so that order stays. Only the oldest event of a key is ever due. Here are the rows, and their counts for
operators; it writes none.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.event_rows import recorded
from tidings.database.tables import held
from tidings.stores import RecordedEvent

__all__ = [
    "NEVER_TRIED",
    "HeldCount",
    "HeldEvent",
    "Line",
    "changing",
    "held_by_handler",
    "held_event",
    "lock_held",
    "turns",
]

NEVER_TRIED: Final[sa.ColumnElement[int]] = sa.literal_column("0", sa.Integer)
"""Attempts at an event that only waits behind another one. It is written as the index of those that failed has it: of a
parameter no database could know that it fits."""

Line = tuple[str, str]
"""A partition key in a line of handlers (`Handler.line_of`): order is kept within it, and nothing waits for another."""


class HeldEvent(NamedTuple):
    """A row. `due` is seconds since 1970; `tries` counts attempts since it was held, `attempts` all of them."""

    event: RecordedEvent
    bucket: int
    key: str
    handler: str
    attempts: int
    tries: int
    due: float
    reason: str
    detail: str | None
    replayed: bool = False
    """It had been settled before a replay ran it again."""
    since: float | None = None
    """When it was held first, seconds since 1970; None where that was not noted."""
    code: str | None = None
    """Fingerprint of the handler's code that failed; None where that was not noted."""

    handlers_line: str = ""

    @property
    def line(self) -> Line:
        return self.key, self.handlers_line


class HeldCount(NamedTuple):
    """What one handler has failed at, and is held. Times are seconds since 1970."""

    handler: str
    events: int
    """Without those that only wait behind one of them."""
    since: float | None
    """When the oldest of them was held first."""
    due: float
    """When the next of them runs again."""
    reason: str
    """Of the one that runs next: one line, error type and message."""


async def held_by_handler(connection: AsyncConnection, service: str, log: UUID) -> list[HeldCount]:
    """Counts of held events that have failed, by handler, most first. An index answers but for one row of each."""
    tried = (held.c.service == service, held.c.log == str(log), held.c.attempts > NEVER_TRIED)
    count = sa.func.count().label("events")
    counts = sa.select(held.c.handler, count, sa.func.min(held.c.since), sa.func.min(held.c.due)).where(*tried)
    found = []
    rows = await connection.execute(counts.group_by(held.c.handler).order_by(count.desc(), held.c.handler))
    for handler, events, since, due in rows.all():
        one = sa.select(held.c.reason).where(*tried, held.c.handler == handler, held.c.due == due).limit(1)
        reason = await connection.scalar(one)
        found.append(HeldCount(handler, events, since, due, (reason or "").partition("\n")[0]))
    return found


def turns(connection: AsyncConnection) -> tuple[sa.ColumnElement[int], sa.ColumnElement[str]]:
    """Return position and handler, to order held events in the order in which everybody locks them. That is the one in
    which Python sorts texts: the order of a database's own collation would let two wait for each other."""
    if connection.dialect.name == "postgresql":
        return held.c.position, sa.collate(held.c.handler, "C")
    return held.c.position, held.c.handler


async def lock_held(connection: AsyncConnection, *where: sa.ColumnElement[bool]) -> None:
    """Lock these rows in the order in which everybody locks them, before a statement changes many at once."""
    if connection.dialect.name == "postgresql":
        rows = sa.select(sa.literal(1)).select_from(held).where(*where)
        await connection.execute(rows.order_by(*turns(connection)).with_for_update())


def held_event(row: sa.Row[Any]) -> HeldEvent:
    """Return the held event that a row keeps."""
    return HeldEvent(
        recorded(row),
        row.bucket,
        row.key,
        row.handler,
        row.attempts,
        row.tries,
        row.due,
        row.reason,
        row.detail,
        row.replayed,
        row.since,
        row.code,
        row.line,
    )


def changing(row: HeldEvent) -> dict[str, Any]:
    """Return the columns that change with each attempt."""
    return {
        "attempts": row.attempts,
        "tries": row.tries,
        "due": row.due,
        "reason": row.reason,
        "detail": row.detail,
        "code": row.code,
    }
