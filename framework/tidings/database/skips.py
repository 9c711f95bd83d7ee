"""Events that an operator wants dead without being run. Nothing here begins or commits a transaction."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope

__all__ = ["Skips"]


class Skips:
    """The skips of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def read(self, connection: AsyncConnection, floor: int) -> frozenset[int]:
        """Return the positions above the floor."""
        rows = tables.skips
        ours = self._scope.in_range(rows)
        found = set(await connection.scalars(sa.select(rows.c.position).where(*ours)))
        if any(position <= floor for position in found):  # the log lost them before the service came to them
            await connection.execute(rows.delete().where(*ours, rows.c.position <= floor))
        return frozenset(position for position in found if position > floor)

    async def remove(self, connection: AsyncConnection, positions: Sequence[int | None]) -> None:
        """Forget skips of events that are dead now."""
        if positions:
            these = (*self._scope.of_log(tables.skips), tables.skips.c.position.in_(positions))
            await connection.execute(tables.skips.delete().where(*these))
