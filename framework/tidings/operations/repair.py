"""Heal what `verify` found: have the log read by whoever is behind. What is settled is never run again.

It handles nothing itself where another process may be at work: over a network it publishes one marker, which makes
every consumer that is behind start a pass, and which the others drop. Nothing here moves a floor or a watermark.
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
from tidings.relay.checkpoints import write_checkpoint
from tidings.stores import EventStore

__all__ = ["append_staged", "move_checkpoint", "publish_marker"]


async def move_checkpoint(store: EventStore, report: Report) -> int | None:
    """Give a relay whose checkpoint cannot be right one that can; the new checkpoint, None where none was needed.

    It is the lowest floor of the services in the report: what they have settled need not go out again. A service that
    is not in the report and is further behind learns so from the relay's first marker, and reads the log. Raises
    `StoreUnavailable`; `StreamDeleted` where the relay's stream was tombstoned.
    """
    if report.relay is None or report.relay.ok:
        return None
    floors = [service.floor for service in report.services if service.ran and service.beyond < 0]
    position = min([*floors, report.position])
    await write_checkpoint(store, report.relay.name, position)
    return position


async def publish_marker(bus: EventBus, log: UUID, position: int) -> None:
    """Make every service that has not taken in everything up to `position` read it from the log.

    The marker's base is its position. To who has accepted everything so far it is a duplicate; to anybody else a base
    above what was heard is a gap. It says nothing of single buckets, so it cannot claim what is not true. It waits in
    the queues of services that are not running. Raises `Unroutable`, `BusUnavailable`.
    """
    await bus.provision()
    async with bus.publisher() as publisher:
        await publisher.send(Marker(log, position, position, {}).encode())


async def append_staged(
    store: EventStore, database: Database, service: str, log: UUID, *, seconds: float
) -> tuple[int, list[str]]:
    """Append what handlers emitted long enough ago, for at most `seconds` seconds.

    Returns how many were appended, and why others cannot be.

    Safe beside the service's own process: both look for the id in the stream first, and append at the version that
    they have just read; of two at once one is refused, or told the first one's answer. What is too fresh to be left
    alone for certain is left alone. An event that the store refuses for good stays as it is: its service buries it.
    Raises `StoreUnavailable`, `DatabaseUnavailable`.
    """
    inbox = Inbox(database, service, log, ALL_BUCKETS)
    before = {row.event.id for row in await inbox.read_staged()}
    if not before:
        return 0, []
    await asyncio.sleep(2 * FRESH_SECONDS)  # its own process may append a fresh row without looking
    rows = [row for row in await inbox.read_staged() if row.event.id in before]
    told = _Told()
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


class _Told:
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
