"""Events with several handlers of which some are done: a row for each of those, until the watermark has passed them.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope
from tidings.errors import Fenced

__all__ = ["Partials"]

_COLUMNS = ("bucket", "position", "handler")


class Partials:
    """The rows of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.half_done: Collection[int] = frozenset()
        """Positions of events that a replay may have sent back when only some of their handlers were done."""

    async def read(
        self, connection: AsyncConnection, floor: int, marks: Mapping[int, int]
    ) -> tuple[dict[int, dict[str, bool]], dict[int, int]]:
        """Return what `Remembered` calls `partial` and `partial_at`."""
        done: dict[int, dict[str, bool]] = {}
        done_at: dict[int, int] = {}
        rows = sa.select(tables.partials).where(*self._scope.in_range(tables.partials))
        for row in await connection.execute(rows):
            done_at[row.bucket] = max(row.position, done_at.get(row.bucket, -1))
            if row.position > max(floor, marks[row.bucket]):
                done.setdefault(row.position, {})[row.handler] = row.again
        self.half_done = frozenset(done)
        return done, done_at

    async def add(self, connection: AsyncConnection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Note handlers that are done with an event which waits for others: bucket, position, handler.

        The bucket's watermark is compared in the same transaction. Raises `Fenced` when another process wrote the same:
        roll back.
        """
        if not rows:
            return
        table = tables.partials
        for _, position, handler in rows if self.half_done else ():
            this = (*self._scope.of_log(table), table.c.position == position, table.c.handler == handler)
            await connection.execute(table.delete().where(*this, table.c.again))
        fresh = [self._scope.own | dict(zip(_COLUMNS, row, strict=True)) | {"again": False} for row in rows]
        try:
            await connection.execute(table.insert(), fresh)
        except IntegrityError as error:
            raise Fenced(
                f"service {self._scope.service!r}: another process handled position {rows[0][1]} at the same moment"
            ) from error

    async def check(
        self,
        connection: AsyncConnection,
        moves: Mapping[int, tuple[int, int]],
        known: Mapping[int, tuple[int, frozenset[str]]],
    ) -> None:
        """Check buckets whose watermarks move over an event with several handlers. Raises `Fenced` when rows say that
        another process is done with one of them: `known` has those of this process, by bucket for the last such event.
        Rows of an event before that one are left from an event that retention has removed: nobody handles it any more.

        Call it after `Watermarks.move`, which waits for whoever has written such rows and not committed yet.
        """
        if not moves:
            return
        table = tables.partials
        columns = (table.c.bucket, table.c.position, table.c.handler)
        these = sa.select(*columns).where(*self._scope.of_log(table), table.c.bucket.in_(moves))
        for bucket, position, handler in await connection.execute(these):
            old, new = moves[bucket]
            at, handlers = known.get(bucket, (-1, frozenset()))
            is_news = position > at or (position == at and handler not in handlers)
            if old < position <= new and is_news:
                raise Fenced(
                    f"service {self._scope.service!r}: another process has handled position {position} with "
                    f"{handler!r}; joining again"
                )

    async def forget(self, connection: AsyncConnection, moves: Mapping[int, int]) -> None:
        """Forget what these buckets had up to these positions: all handlers are done with it."""
        table = tables.partials
        for bucket, position in moves.items():
            passed = (*self._scope.of_log(table), table.c.bucket == bucket, table.c.position <= position)
            await connection.execute(table.delete().where(*passed))
