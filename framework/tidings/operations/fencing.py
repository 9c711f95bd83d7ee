"""Fences processes of a service when what they read on joining is no longer true, so that they join again."""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.tables import floors, watermarks

__all__ = ["fence"]


async def fence(connection: AsyncConnection, service: str, log: UUID, buckets: Collection[int]) -> None:
    """Fence every process that has joined a partition with one of these buckets: it cannot commit there any more."""
    if not buckets:
        return
    of_log = (floors.c.service == service, floors.c.log == str(log))
    ranges = await connection.execute(sa.select(floors.c.first_bucket, floors.c.last_bucket).where(*of_log))
    for first, last in ranges.all():
        if any(first <= bucket <= last for bucket in buckets):
            these = (watermarks.c.service == service, watermarks.c.log == str(log))
            mine = watermarks.update().where(*these, watermarks.c.bucket.between(first, last))
            await connection.execute(mine.values(replays=watermarks.c.replays + 1))
