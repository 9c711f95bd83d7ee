"""Held events: what failed for now, and what waits behind it for its partition key; each runs again when it is due.

A key is blocked while it has a held event, or a dead letter that holds it. Later events of a blocked key are held
behind, so that order stays. Only the oldest event of a key is ever due. Every write takes the connection of the
transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import dead, held
from tidings.errors import Fenced
from tidings.inbox import recorded, storable
from tidings.stores import RecordedEvent

__all__ = ["HeldEvent", "HeldRows"]

AT_ONCE: Final = 256
"""Held events read at once: what is due, with its followers."""

_HOLD: Final = held.insert()


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


class HeldRows:
    """One service's held events of one log and one range of buckets."""

    def __init__(self, service: str, log: UUID, buckets: range) -> None:
        self._service = service
        self._own = {"service": service, "log": str(log)}
        self._mine = self._of(held, buckets)
        holding = sa.select(dead.c.key).where(*self._of(dead, buckets), dead.c.holds_key)
        keys = sa.union_all(sa.select(held.c.key).where(*self._mine), holding).subquery()
        self._blocked = sa.select(keys.c.key, sa.func.count().label("rows")).group_by(keys.c.key)
        this = (held.c.service == service, held.c.log == str(log), held.c.position == sa.bindparam("of_position"))
        self._postpone = (
            held.update()
            .where(*this)
            .values({name: sa.bindparam(f"new_{name}") for name in ("attempts", "tries", "due", "reason", "detail")})
        )
        self._release = held.delete().where(*this)
        older, grave = held.alias(), dead.alias()
        free = ~sa.exists().where(
            *self._of(grave, buckets),
            grave.c.holds_key,
            grave.c.key == held.c.key,
            grave.c.position < held.c.position,
        )
        self._first = (
            sa.select(held.c.key)
            .where(
                *self._mine,
                held.c.key.not_in(sa.bindparam("besides", expanding=True)),
                (held.c.due <= sa.bindparam("now")) | (held.c.due > sa.bindparam("absurd")),
                ~sa.exists().where(
                    *self._of(older, buckets), older.c.key == held.c.key, older.c.position < held.c.position
                ),
                free,
            )
            .order_by(held.c.due)
            .limit(AT_ONCE)
        )
        # A dead letter that holds its key may stand between held events, older ones having been retried.
        self._due = (
            sa.select(held)
            .where(*self._mine, held.c.key.in_(sa.bindparam("keys", expanding=True)), free)
            .order_by(held.c.position)
            .limit(AT_ONCE)
        )

    def _of(self, table: Any, buckets: range) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            table.c.service == self._own["service"],
            table.c.log == self._own["log"],
            table.c.bucket.between(buckets.start, buckets.stop - 1),
        )

    async def blocked(self, connection: AsyncConnection) -> dict[str, int]:
        """Each blocked key with the number of rows that block it."""
        return {row.key: row.rows for row in await connection.execute(self._blocked)}

    async def due(
        self, connection: AsyncConnection, now: float, longest: float, besides: Collection[str]
    ) -> list[HeldEvent]:
        """What may run now, of other keys than `besides`; each key's events in order, `AT_ONCE` at most.

        A due time further away than `longest` seconds was written by a clock that jumped: it counts as now.
        """
        first = await connection.scalars(self._first, {"now": now, "absurd": now + longest, "besides": list(besides)})
        keys = list(first)
        if not keys:
            return []
        found = []
        for row in await connection.execute(self._due, {"keys": keys}):
            event = recorded(row)
            found.append(
                HeldEvent(
                    event, row.bucket, row.key, row.handler, row.attempts, row.tries, row.due, row.reason, row.detail
                )
            )
        return found

    async def hold(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Events that were not held before."""
        if rows:
            await connection.execute(
                _HOLD,
                [
                    self._own
                    | {
                        "position": row.event.position,
                        "bucket": row.bucket,
                        "key": row.key,
                        "version": row.event.version,
                        "ticks": row.event.ticks,
                        "event_id": str(row.event.id),
                        "stream": row.event.stream,
                        "type": row.event.type,
                        "data": row.event.data,
                        "metadata": row.event.metadata,
                        "is_json": row.event.is_json,
                        "handler": row.handler,
                    }
                    | _changing(row)
                    for row in rows
                ],
            )

    async def postpone(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Held events that failed once more. Raises `Fenced` when another process had one of them meanwhile."""
        for row in rows:
            changes: dict[str, Any] = {f"new_{name}": value for name, value in _changing(row).items()}
            changes["of_position"] = row.event.position
            self._one(row.event.position, (await connection.execute(self._postpone, changes)).rowcount)

    async def release(self, connection: AsyncConnection, positions: Sequence[int]) -> None:
        """Held events that are settled. Raises `Fenced` when another process had one of them meanwhile."""
        for position in positions:
            self._one(position, (await connection.execute(self._release, {"of_position": position})).rowcount)

    def _one(self, position: int, rows: int) -> None:
        if rows != 1:
            raise Fenced(
                f"service {self._service!r}: the held event at position {position} was settled by another process; "
                "this group was rolled back. Are two processes of the service active at once? Stop one"
            )


def _changing(row: HeldEvent) -> dict[str, Any]:
    return {
        "attempts": row.attempts,
        "tries": row.tries,
        "due": row.due,
        "reason": storable(row.reason),
        "detail": storable(row.detail),
    }
