"""How far replays have sent a bucket range back. Nothing here begins or commits a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope

__all__ = ["Replay", "find_replay"]


@dataclass(frozen=True, slots=True)
class Replay:
    """How far replays sent a bucket range back (`tidings.operations.replay`)."""

    upto: Mapping[int, int] = field(default_factory=dict)
    """By bucket: up to here everything had been settled before."""
    waiting: frozenset[tuple[int, str]] = frozenset()
    """Position and handler of held events, never done, that the replay has not come to: their rows run them."""

    def covers(self, bucket: int, position: int) -> bool:
        """Return whether the event had been settled before a replay sent its bucket back."""
        return position <= self.upto.get(bucket, -1)


async def find_replay(connection: AsyncConnection, scope: Scope, floor: int, marks: Mapping[int, int]) -> Replay:
    """Return what replays have sent back of a range that stands at this floor and these watermarks."""
    rows, held = tables.replays, tables.held
    sent_back = await connection.execute(sa.select(rows.c.bucket, rows.c.upto).where(*scope.in_range(rows)))
    if not (upto := {row.bucket: row.upto for row in sent_back}):
        return Replay()
    columns = (held.c.bucket, held.c.position, held.c.handler)
    above = sa.select(*columns).where(*scope.in_range(held), held.c.position > floor)
    waiting = [row for row in await connection.execute(above) if row.position > marks[row.bucket]]
    return Replay(upto, frozenset((row.position, row.handler) for row in waiting))
