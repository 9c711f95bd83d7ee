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
        self._raise = rows.update().where(*scope.of_floor(), rows.c.position < to)
        self._raise = self._raise.values(position=to, receipted=to)
        self._receipted = sa.select(rows.c.position == rows.c.receipted).where(*scope.of_floor())

    async def read(self, connection: AsyncConnection) -> int | None:
        """Return the position; None where the range has no row yet."""
        position: int | None = await connection.scalar(self._position)
        return position

    async def make(self, connection: AsyncConnection) -> int:
        """Return the position when joining; a range without a row gets one."""
        if (position := await self.read(connection)) is not None:
            return position
        of_range = {"first_bucket": self._scope.buckets.start, "last_bucket": self._scope.buckets.stop - 1}
        fresh = {"position": -1, "receipted": -1}
        await connection.execute(tables.floors.insert().values(**self._scope.own, **of_range, **fresh))
        return -1

    async def is_receipted(self, connection: AsyncConnection) -> bool:
        """Return whether receipts were written for the floor. They were not where an older Tidings raised it."""
        return bool(await connection.scalar(self._receipted))

    async def receipt(self, connection: AsyncConnection, upto: int) -> None:
        """Know that receipts have everything up to `upto`, the floor as it was read. An older Tidings that is still at
        work may have raised it since."""
        await connection.execute(tables.floors.update().where(*self._scope.of_floor()).values(receipted=upto))

    async def raise_to(self, connection: AsyncConnection, position: int) -> None:
        """Raise the floor to the position. It is never lowered: two processes may each know something true.

        `Watermarks.fence` goes before: after a replay, what they know is not true. So does what has gone by up to
        there and is in no receipt yet.
        """
        await connection.execute(self._raise, {"to_position": position})
