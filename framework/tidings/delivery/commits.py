"""The commit, in groups: what handlers did, and that it was done, become durable together.

It runs no handler: `groups` does, within the transaction; and it tells nobody of the bus (`acknowledgement`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from sqlalchemy.exc import DBAPIError

from tidings.delivery.acknowledgement import Acknowledgement
from tidings.delivery.batch import Pending
from tidings.delivery.groups import Groups
from tidings.delivery.inflight import InFlight
from tidings.delivery.ledger import Ledger
from tidings.delivery.progress import Progress
from tidings.delivery.site import Joined

__all__ = ["Commits"]

LINGER_SECONDS: Final = 0.005
"""A commit waits this long for others to join it."""
MANY: Final = 64
"""Events in a batch from which on the next commit waits as long as the last commit took ..."""
LONGEST_SECONDS: Final = 0.025
"""... but no longer than this, ..."""
LOOK_SECONDS: Final = 0.002
"""... and looks so often whether there is anything left to wait for."""


class Commits:
    """Commits of one bucket range. An error out of `run` ends the membership: the process joins again."""

    def __init__(
        self,
        joined: Joined,
        pending: Pending,
        groups: Groups,
        progress: Progress,
        ledger: Ledger,
        acknowledgement: Acknowledgement,
    ) -> None:
        self._database = joined.site.database
        self._memory = joined.site.memory
        self._clock = joined.site.clock
        self._pending = pending
        self._groups = groups
        self._progress = progress
        self._ledger = ledger
        self._acknowledgement = acknowledgement
        self._rest = asyncio.Event()
        self._took = 0.0
        """Seconds, the last commit."""
        self._hurried = False

    @property
    def commits(self) -> int:
        """Transactions that were committed."""
        return self._ledger.commits

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong in a transaction is raised: its outcome may be unknown."""
        wake = self._pending.wake
        while True:
            await wake.wait()
            wake.clear()
            await self._linger()
            self._acknowledgement.acknowledge()
            while self._groups or self._pending.batch or self._progress.floor_is_due(self._hurried):
                began = self._clock()
                await self._commit()
                self._took = self._clock() - began
                if len(self._pending.batch) >= MANY:
                    await self._linger()
            self._rest.set()

    def hurry(self) -> None:
        """Wait for nothing any more, and store the floor with each commit: the service stops."""
        self._hurried = True
        self._pending.wake.set()

    async def rest(self) -> None:
        """Wait until there was nothing left to commit; there may be again."""
        self._rest.clear()
        await self._rest.wait()

    async def _linger(self) -> None:
        """Let others join the next commit: one of a thousand events costs little more than one of a hundred, and many
        of them would leave no time for handlers."""
        if self._hurried:
            return
        pending = self._pending
        if 0 < len(pending.batch) + len(self._groups) < MANY:
            await asyncio.sleep(LINGER_SECONDS)
        elif pending.batch:
            left = min(self._took, LONGEST_SECONDS)
            until = self._clock() + left
            while left > 0 and self._may_grow():
                await asyncio.sleep(min(left, LOOK_SECONDS))
                left = until - self._clock()

    def _may_grow(self) -> bool:
        """Something was taken that is not settled and not in the batch, and nobody waits for the commit: neither a pass
        that needs room nor an event with a session."""
        taken = self._acknowledgement
        return not taken.full and not self._groups and len(taken) > len(self._pending.batch)

    async def _commit(self) -> None:
        ran: list[InFlight] = []
        complete, began = False, self._ledger.begins()
        try:
            async with self._database.turn, self._database.transaction() as connection:
                await self._groups.run(connection, ran)
                batch = self._pending.take()
                await self._ledger.write(connection, batch, floor_now=self._hurried)
                complete = True
        except DBAPIError as error:
            if complete and ran:
                raise self._memory.suspect(ran, error) from error
            raise
        self._pending.committed()
        self._ledger.committed(batch, began)
