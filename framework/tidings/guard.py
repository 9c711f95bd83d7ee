"""Who is at work on a bucket range, and what it has begun, so that an event that ends the process is found out.

The decisions are those of `tidings.crashes`; here they meet the database and the notebook. It runs no handler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from tidings.commits import FULL
from tidings.crashes import Caution
from tidings.database import Database
from tidings.inbox import Inbox
from tidings.notebook import Notebook, notebook_of
from tidings.work import Item, Troubles

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["Guard"]

log = structlog.get_logger("tidings.dispatch")


class Guard:
    """Of one dispatcher. What is given out while `caution.on` goes through `note` first."""

    def __init__(
        self, service: Service, database: Database, inbox: Inbox, troubles: Troubles, clock: Callable[[], float]
    ) -> None:
        self._service = service
        self._database = database
        self._inbox = inbox
        self._troubles = troubles
        self.notebook = Notebook(None, 0)
        """Told of each attempt's begin and end."""
        self.caution = Caution(clock)

    async def take_over(self) -> None:
        """This process is at work on the range from now on. Raises `DatabaseUnavailable`, and `Fenced` when a replay
        sent the service back since it joined, or another process is at it too."""
        if self.notebook.open:
            self.notebook.keep()
        else:
            self.notebook = Notebook(self._notebook_of(self._troubles.process), self._service.concurrency + 1)
        async with self._database.turn, self._database.transaction() as connection:
            await self._inbox.fence(connection)
            before = await self._inbox.occupy(connection, self._troubles.process)
            if before is None:
                return
            process, notes = before
            under_way = Notebook.read(self._notebook_of(process))
            for position, bucket in (under_way or {}).items():
                if position not in notes:
                    notes[position] = 1
                    await self._inbox.note(connection, position, bucket, 1)
        Notebook.discard(self._notebook_of(process))
        condemned = self.caution.begin(notes, int(FULL * self._service.prefetch), blind=under_way is None)
        self._troubles.crashed |= {position: (failure, notes[position]) for position, failure in condemned.items()}
        log.warning(
            "service.careful",
            service=self._service.name,
            suspected=sorted(notes.keys() - condemned.keys()),
            condemned=sorted(condemned),
            reason="the process that was at work before ended without a word, or has lost its connection to the bus; "
            "if an event crashes the process, it will be found",
        )

    async def note(self, item: Item) -> None:
        """Write down that the event is about to be run. Raises `DatabaseUnavailable`, and `Fenced` when another process
        runs it too."""
        async with self._database.turn, self._database.transaction() as connection:
            times = self.caution.note(item)
            await self._inbox.note(connection, item.event.position, item.bucket, times)

    async def leave(self) -> None:
        """This was a clean end, also of what was cut off in the middle. Raises `DatabaseUnavailable`."""
        async with self._database.turn, self._database.transaction() as connection:
            await self._inbox.leave(connection, self._troubles.process)

    def _notebook_of(self, process: str) -> str | None:
        return notebook_of(self._database.file, process, self._inbox.buckets.start)
