"""Writes a batch within a transaction, and says what that sets free. Commits and concurrent groups share it.

It begins and commits no transaction itself.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.delivery.acknowledgement import Acknowledgement
from tidings.delivery.batch import Batch
from tidings.delivery.inflight import COMMITTED
from tidings.delivery.progress import Progress
from tidings.delivery.release import Release
from tidings.delivery.site import Joined

__all__ = ["Ledger"]


class Ledger:
    """The writer of batches for one bucket range."""

    def __init__(self, joined: Joined, progress: Progress, release: Release, acknowledgement: Acknowledgement) -> None:
        self._database = joined.site.database
        self._memory = joined.site.memory
        self._progress = progress
        self._release = release
        self._acknowledgement = acknowledgement
        self.commits = 0
        """Transactions that were committed."""

    def begins(self) -> float:
        """A transaction begins: the time that `committed` is to be told. No other clock will do: how long ago that is
        must not depend on whether the machine slept."""
        return self._release.begins()

    async def write(self, connection: AsyncConnection, batch: Batch, *, floor_now: bool | None) -> None:
        """Write the batch in the transaction of `connection`, and the floor where it is due, or `floor_now`; with None,
        never. Raises `Fenced` when another process was here: roll back."""
        await self._progress.write(connection, batch, floor_now=floor_now)

    def committed(self, batch: Batch, began: float) -> None:
        """It is durable; its transaction began at `began`, as `begins` said."""
        if len(batch):
            self._database.writes.proven()
        self._progress.written(batch)
        self.commits += 1
        for item in batch.finished:
            item.to(COMMITTED)
            item.done = True
        for _, ticket in batch.foreign:
            ticket.done = True
        self._memory.forget(batch.finished)
        self._release.committed(batch, began)
        self._acknowledgement.acknowledge()
