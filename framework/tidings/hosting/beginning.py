"""Whether a service that has done nothing of a log is a new one, or one that was renamed or has lost its database.

It only logs: either way the service is given every event from the first on.
"""

from __future__ import annotations

import time
from typing import Final
from uuid import UUID

import sqlalchemy as sa
import structlog

from tidings.database.engine import Database
from tidings.database.presence import present
from tidings.database.tables import floors
from tidings.protocol.position import CARRIED, carried
from tidings.stores import EventStore

__all__ = ["say_that_it_begins"]

log = structlog.get_logger("tidings.running")

YOUNG_SECONDS: Final = 3600.0
"""Age of the first event, in seconds, up to which a log has no history worth a warning."""


async def say_that_it_begins(service: str, store: EventStore, database: Database, log_id: UUID, queue: str) -> None:
    """Log that a service begins at the first event of a log: a warning where it may be a mistake, else for information.

    It may be one where the first event is older than an hour, or where the database knows another service of this log
    that no process runs. Says nothing of a log without events. Raises `StoreUnavailable`, `DatabaseUnavailable`.
    """
    first = await _first_recorded_at(store)
    if first is None:
        return
    now = time.time()
    absent = await _absent_services(database, service, log_id, now)
    doubtful = now - first > YOUNG_SECONDS or bool(absent)
    former = f" Its database also knows {', '.join(absent)}, which no process runs: was one of these its name?"
    (log.warning if doubtful else log.info)(
        "service.begins_at_the_start",
        service=service,
        queue=queue,
        last_position=await store.head(),
        log_age=round(max(now - first, 0.0)),
        advice="its database has done nothing of this log, so it is given all events from the first on. For a new "
        "service that is right. If it was renamed, or has got another database, stop it, and give it its former name "
        f"and database.{former if absent else ''}",
    )


async def _first_recorded_at(store: EventStore) -> float | None:
    """When the first event that services are given was recorded, in seconds since 1970; None where there is none."""
    async for event in store.read_all(filter=CARRIED):
        if carried(event) is not None:
            return event.ticks / 1e7
    return None


async def _absent_services(database: Database, service: str, log_id: UUID, now: float) -> list[str]:
    """Other services that have worked on this log in the same database, and of which no process was seen lately."""
    query = sa.select(floors.c.service).where(floors.c.log == str(log_id), floors.c.service != service).distinct()
    async with database.reading() as connection:
        others = sorted(await connection.scalars(query))
    return [other for other in others if not await present(database, other, now)]
