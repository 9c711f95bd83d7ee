"""Repairs what `verify` found: services that are behind read the log. What is settled is never run again.

It runs no handler, because other processes may be at work. Over a network it publishes one marker: every consumer that
is behind starts a pass, and the others drop the marker. Nothing here moves a floor or a watermark.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from tidings.buses import EventBus
from tidings.database.dead_letters import Letter
from tidings.database.engine import Database
from tidings.database.inbox import Inbox
from tidings.delivery.staged import FRESH_SECONDS, Stager
from tidings.operations.report import Report
from tidings.protocol.message import Marker
from tidings.protocol.position import ALL_BUCKETS
from tidings.protocol.seal import Seal
from tidings.relay.checkpoints import write_checkpoint
from tidings.stores import EventStore

__all__ = ["append_staged", "move_checkpoint", "publish_marker"]


async def move_checkpoint(store: EventStore, report: Report) -> int | None:
    """Replace a relay's checkpoint that cannot be right, and return the new one; None if that was not needed.

    The new checkpoint is the lowest floor of the services in the report: what they have settled need not be published
    again. A service that is not in the report and is further behind sees that from the relay's first marker, and reads
    the log. Raises `StoreUnavailable`, and `StreamDeleted` if the relay's stream was tombstoned.
    """
    if report.relay is None or report.relay.ok:
        return None
    floors = [service.floor for service in report.services if service.ran and service.beyond < 0]
    position = min([*floors, report.position])
    await write_checkpoint(store, report.relay.name, position)
    return position


async def publish_marker(bus: EventBus, log: UUID, position: int, seal: Seal | None = None) -> None:
    """Make every service that has not accepted everything up to `position` read the log up to there.

    The marker's base is its position. For a service that has accepted everything so far, the marker is a duplicate. For
    any other service, the base is above the last marker that it heard, which is a gap. The marker names no buckets, so
    it cannot say anything untrue about one. It waits in the queues of services that are not running. Raises
    `Unroutable`, `BusUnavailable`.
    """
    await bus.provision()
    async with bus.publisher() as publisher:
        await publisher.send(Marker(log, position, position, {}).encode(seal))


async def append_staged(
    store: EventStore, database: Database, service: str, log: UUID, *, seconds: float
) -> tuple[int, list[str]]:
    """Append events that have been staged for a while, for at most `seconds` seconds.

    Return how many were appended, and why the store refused others.

    This is safe while the service is running: both look for the id in the stream first, and append at the version that
    they have just read. If both append at once, one is refused, or gets the answer that the first one got. Events that
    were staged a moment ago are left alone. An event that the store refuses for good stays as it is; its service makes
    it a dead letter. Raises `StoreUnavailable`, `DatabaseUnavailable`.
    """
    inbox = Inbox(database, service, log, ALL_BUCKETS)
    before = {row.event.id for row in await inbox.read_staged()}
    if not before:
        return 0, []
    # Until then, the service's own process may append a new row without looking for its id first.
    await asyncio.sleep(2 * FRESH_SECONDS)
    rows = [row for row in await inbox.read_staged() if row.event.id in before]
    told = _Outcomes()
    stager = Stager(store, told)
    stager.add(rows, since=None)
    flying = asyncio.create_task(stager.run())
    try:
        async with asyncio.timeout(seconds):
            while len(told.done) + len(told.refused) < len(rows):
                told.changed.clear()
                await told.changed.wait()
    except TimeoutError:
        pass
    finally:
        flying.cancel()
        await asyncio.gather(flying, return_exceptions=True)
        async with database.transaction() as connection:
            await inbox.staged.remove(connection, told.done)
    return len(told.done), told.refused


class _Outcomes:
    """What the stager said came of each event."""

    def __init__(self) -> None:
        self.done: list[UUID] = []
        self.refused: list[str] = []
        self.changed = asyncio.Event()

    def appended(self, id: UUID) -> None:
        self.done.append(id)
        self.changed.set()

    def given_up(self, id: UUID, letter: Letter) -> None:
        self.refused.append(f"{letter.type} {id} for {letter.stream}: {letter.reason}")
        self.changed.set()
