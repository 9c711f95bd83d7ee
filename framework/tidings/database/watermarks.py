"""Watermarks: per bucket, the position of the last event whose effects are committed; they fence rival processes.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.bulk import BulkUpdate
from tidings.database.scope import Scope
from tidings.errors import Fenced

__all__ = ["Watermarks", "lock_service"]


class Watermarks:
    """The watermarks of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._replays: dict[int, int] = {}
        """By bucket: how often it had been sent back when this process joined. What it knew before a replay is true no
        more, even where the watermark stands as before, or will again."""
        rows = tables.watermarks
        ours = scope.of_log(rows)
        self._move = BulkUpdate(
            rows.update()
            .where(
                *ours,
                rows.c.bucket == sa.bindparam("of_bucket"),
                rows.c.position == sa.bindparam("from_position"),
                rows.c.replays == sa.bindparam("at_replays"),
            )
            .values(position=sa.bindparam("to_position"))
        )
        self._move_all = _move_all(scope)
        first = sa.select(rows.c.replays).where(*ours, rows.c.bucket == scope.buckets.start)
        self._replays_of_first = first.with_for_update(read=True)

    async def read(self, connection: AsyncConnection) -> dict[int, int]:
        """Return bucket to position when joining; buckets without a row get one."""
        rows = tables.watermarks
        columns = (rows.c.bucket, rows.c.position, rows.c.replays)
        known = await connection.execute(sa.select(*columns).where(*self._scope.of_log(rows)))
        found = [row for row in known if row.bucket in self._scope.buckets]
        marks = {row.bucket: row.position for row in found}
        self._replays = dict.fromkeys(self._scope.buckets, 0) | {row.bucket: row.replays for row in found}
        missing = [bucket for bucket in self._scope.buckets if bucket not in marks]
        if missing:
            fresh = [self._scope.own | {"bucket": bucket, "position": -1} for bucket in missing]
            await connection.execute(rows.insert(), fresh)
        return marks | dict.fromkeys(missing, -1)

    async def move(self, connection: AsyncConnection, moves: Mapping[int, tuple[int, int]]) -> None:
        """Compare and set watermarks, bucket to (from, to). Raises `Fenced` when any stood elsewhere: roll back."""
        if not moves:
            return
        rows = [
            {"of_bucket": bucket, "from_position": old, "to_position": new, "at_replays": self._replays[bucket]}
            for bucket, (old, new) in sorted(moves.items())  # one order for all, so that no two wait for each other
        ]
        if connection.dialect.name == "postgresql":
            columns = {name: [row[name] for row in rows] for name in _MOVES}
            self._check(moves, (await connection.execute(self._move_all, columns)).rowcount)
        else:
            self._check(moves, await self._move.run(connection, rows))

    async def assert_unmoved(self, connection: AsyncConnection, marks: Mapping[int, int]) -> None:
        """Raise `Fenced` when any watermark stands elsewhere than `marks` says, bucket to position."""
        if not marks:
            return
        rows = tables.watermarks
        columns = (rows.c.bucket, rows.c.position, rows.c.replays)
        these = sa.select(*columns).where(*self._scope.of_log(rows), rows.c.bucket.in_(marks))
        found = await connection.execute(these)
        unmoved = sum((row.position, row.replays) == (marks[row.bucket], self._replays[row.bucket]) for row in found)
        self._check(marks, unmoved)

    async def fence(self, connection: AsyncConnection) -> None:
        """Raise `Fenced` when a replay has sent the service back, or other code has taken over, since this process
        joined. In a transaction that writes, nobody can until its end."""
        found = await connection.scalar(self._replays_of_first)
        if found != self._replays[self._scope.buckets.start]:
            raise Fenced(
                f"service {self._scope.service!r}: a replay was asked for, an event skipped, or another version of the "
                "service has taken over; joining again"
            )

    async def fence_rivals(self, connection: AsyncConnection, buckets: Collection[int]) -> None:
        """Count up the watermarks of these buckets without moving them.

        A process beside this one knows nothing of what this transaction stages. It can then commit nothing there, and
        joins again. Raises `Fenced` when another process was first. Call `fenced_rivals` once it is committed.
        """
        rows = tables.watermarks
        for bucket in sorted(buckets):
            counted = rows.update().where(
                *self._scope.of_log(rows), rows.c.bucket == bucket, rows.c.replays == self._replays[bucket]
            )
            done = await connection.execute(counted.values(replays=rows.c.replays + 1))
            self._check((bucket,), done.rowcount)

    def fenced_rivals(self, buckets: Collection[int]) -> None:
        """Know that `fence_rivals` was committed."""
        for bucket in buckets:
            self._replays[bucket] += 1

    def fenced_others(self) -> None:
        """Know that this process itself has counted the watermarks up, as a replay does, so that code that was at work
        before it can commit nothing any more."""
        self._replays = {bucket: times + 1 for bucket, times in self._replays.items()}

    def _check(self, buckets: Collection[int], found: int) -> None:
        if found != len(buckets):
            raise Fenced(
                f"service {self._scope.service!r}: another process moved {len(buckets) - found} of the watermarks of "
                f"buckets {sorted(buckets)}, or a replay was asked for, or an event skipped; this group was rolled "
                "back. Are two processes of the service active at once? Stop one: on a bus in memory a service is one "
                "process"
            )


async def lock_service(connection: AsyncConnection, service: str, log: UUID) -> None:
    """Keep a resizing and every group of the service from committing before this transaction ends. What they have
    committed so far is read after this. Rows are locked in the order in which groups lock them, so that neither waits
    for the other for ever."""
    layout, rows = tables.partitions, tables.watermarks
    await connection.execute(sa.select(layout.c.epoch).where(layout.c.service == service).with_for_update())
    ours = sa.select(rows.c.bucket).where(rows.c.service == service, rows.c.log == str(log))
    await connection.execute(ours.order_by(rows.c.bucket).with_for_update())


_MOVES: Final = {
    "of_bucket": sa.Integer,
    "from_position": sa.BigInteger,
    "to_position": sa.BigInteger,
    "at_replays": sa.Integer,
}


def _move_all(scope: Scope) -> sa.Update:
    """Return the statement that moves many watermarks of PostgreSQL at once: each bound parameter is a list. It locks
    their rows in one order, so that no two processes wait for each other."""
    rows = tables.watermarks
    lists = [sa.bindparam(name, type_=ARRAY(kind)) for name, kind in _MOVES.items()]
    moves = (
        sa.func.unnest(*lists).table_valued(*(sa.column(name, kind) for name, kind in _MOVES.items())).render_derived()
    )
    ours = scope.of_log(rows)
    stand = (rows.c.bucket == moves.c.of_bucket, rows.c.position == moves.c.from_position)
    locked = (
        sa.select(rows.c.bucket, moves.c.to_position)
        .where(*ours, *stand, rows.c.replays == moves.c.at_replays)
        .order_by(rows.c.bucket)
        .with_for_update(of=rows)
        .cte("locked")
    )
    return rows.update().where(*ours, rows.c.bucket == locked.c.bucket).values(position=locked.c.to_position)
