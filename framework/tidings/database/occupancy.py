"""Which process is at work on a bucket range. Nothing here begins or commits a transaction."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope
from tidings.errors import Fenced

__all__ = ["Occupancy"]


class Occupancy:
    """Who is at work on one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._active = sa.select(tables.floors.c.active).where(*scope.of_floor())

    async def take(self, connection: AsyncConnection, process: str) -> str | None:
        """Note that `process` is at work on the range from now on. Returns the one that was before, None after a clean
        end."""
        before: str | None = await connection.scalar(self._active.with_for_update())  # nobody passes `lock` from here
        ours = tables.floors.update().where(*self._scope.of_floor())
        await connection.execute(ours.values(active=process, asked=None))
        return before

    async def read(self, connection: AsyncConnection) -> str | None:
        """Return the process that is at work on the range, or ended there without a word; None after a clean end."""
        process: str | None = await connection.scalar(self._active)
        return process

    async def lock(self, connection: AsyncConnection, process: str) -> None:
        """Let nobody take the range over before the end of the transaction. Raises `Fenced` when somebody has done."""
        if await connection.scalar(self._active.with_for_update(read=True)) != process:
            raise Fenced(
                f"service {self._scope.service!r}: another process is at work on this range now; joining again"
            )

    async def leave(self, connection: AsyncConnection, process: str) -> bool:
        """Note that `process` ends cleanly. False when another one has taken over: then nothing is noted."""
        mine = tables.floors.update().where(*self._scope.of_floor(), tables.floors.c.active == process)
        return (await connection.execute(mine.values(active=None))).rowcount > 0
