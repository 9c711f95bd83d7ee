"""The floor of a bucket range: everything up to it is settled. Nothing here begins or commits a transaction."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope

__all__ = ["Floor"]


class Floor:
    """The floor of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        rows = tables.floors
        to: sa.BindParameter[int] = sa.bindparam("to_position")
        self._position = sa.select(rows.c.position).where(*scope.of_floor())
        self._raise = rows.update().where(*scope.of_floor(), rows.c.position < to).values(position=to)

    async def read(self, connection: AsyncConnection) -> int | None:
        """Return the position; None where the range has no row yet."""
        position: int | None = await connection.scalar(self._position)
        return position

    async def make(self, connection: AsyncConnection) -> int:
        """Return the position when joining; a range without a row gets one."""
        if (position := await self.read(connection)) is not None:
            return position
        of_range = {"first_bucket": self._scope.buckets.start, "last_bucket": self._scope.buckets.stop - 1}
        await connection.execute(tables.floors.insert().values(**self._scope.own, **of_range, position=-1))
        return -1

    async def raise_to(self, connection: AsyncConnection, position: int) -> None:
        """Raise the floor to the position. It is never lowered: two processes may each know something true.

        `Watermarks.fence` goes before: after a replay, what they know is not true.
        """
        await connection.execute(self._raise, {"to_position": position})
