"""The commit, in groups: what handlers did, and that it was done, become durable together; then deliveries are settled.

What was taken is settled when everything before it was committed; until then it would come again. It runs no handler:
`work` does, within the transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.timers import Timers
from tidings.buses import Consumer
from tidings.database.dead_letters import Letter
from tidings.database.engine import Database
from tidings.delivery.progress import FLOOR_SECONDS, Batch, Progress
from tidings.delivery.sessions import SessionHandlers
from tidings.delivery.work import Item, Step, Troubles
from tidings.protocol.position import Settled

__all__ = ["Commits"]

LINGER_SECONDS: Final = 0.005
"""A commit waits this long for others to join it."""
MANY: Final = 64
"""Where so many events have joined it, it waits as long as the last commit took ..."""
LONGEST_SECONDS: Final = 0.025
"""... but no longer than this, ..."""
LOOK_SECONDS: Final = 0.002
"""... and looks so often whether there is anything left to wait for."""
FULL: Final = 2.0
"""A pass rests when so many times the prefetch are unsettled: more were never under way when a process ended."""
ROOM: Final = 1.5
"""It goes on when so many times the prefetch are left, so that handlers have enough to do during a commit."""


class Commits:
    """Of one dispatcher; any error out of `run` ends it."""

    def __init__(
        self,
        database: Database,
        progress: Progress,
        sessions: SessionHandlers,
        troubles: Troubles,
        timers: Timers,
        prefetch: int,
        clock: Callable[[], float],
        *,
        work: Callable[[AsyncConnection, list[Item]], Awaitable[None]],
        committed: Callable[[Batch, float], None],
    ) -> None:
        """`work` runs handlers with a session in the transaction, and adds those whose effects are in it to the list.
        `committed` is told what has become durable, and when the transaction began."""
        self._database = database
        self.progress = progress
        self._sessions = sessions
        self._troubles = troubles
        self._timers = timers
        self._full, self._room_at = int(FULL * prefetch), int(ROOM * prefetch)
        self._clock = clock
        self._work = work
        self._committed = committed
        self.batch = Batch()
        """What the next commit makes durable."""
        self._taken: Settled[Step | None] = Settled()
        self.full = False
        """More is unsettled than should be: a pass reads faster than handlers work, and one may hold up the rest."""
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._rest = asyncio.Event()
        self._floor_timer: asyncio.TimerHandle | None = None
        self._took = 0.0
        """Seconds, the last commit."""
        self._hurried = False
        self.commits = 0
        """Transactions that were committed."""

    @property
    def oldest(self) -> Item | None:
        """The event that the floor waits for; None where something else does, or nothing."""
        ticket = self._taken.oldest
        return ticket if isinstance(ticket, Item) else None

    # ---- what comes in

    @property
    def unsettled(self) -> int:
        """Events, messages and markers that were taken and are not settled yet."""
        return len(self._taken)

    async def room(self) -> None:
        """Wait until less is unsettled."""
        self._room.clear()
        await self._room.wait()

    def take(self, item: Item) -> None:
        """It is settled after everything that was taken before it."""
        self.full = self._taken.add(item) >= self._full

    def settle(self, step: Step) -> None:
        """Nothing to handle, but to be settled in its turn."""
        self._taken.begin(step, done=True)
        self._wake.set()

    def bury(self, letter: Letter, step: Step) -> None:
        """A message that is not ours: recorded, then settled."""
        self.batch.foreign.append((letter, self._taken.begin(step)))
        self._wake.set()

    def appended(self, id: UUID) -> None:
        """A staged event that needs its row no more."""
        self.batch.appended.append(id)
        self._wake.set()

    def given_up(self, id: UUID, letter: Letter) -> None:
        """A staged event that can never be appended."""
        self.batch.never.append((id, letter))
        self._wake.set()

    def doubt(self, item: Item) -> None:
        """An attempt failed: the next commit finds out whether another process has done the event meanwhile. Without
        that, a service whose every attempt fails for that reason would wait for ever for what nobody can mend."""
        self.batch.doubted.append(item)
        self._wake.set()

    def noted(self, position: int, times: int) -> None:
        """An event that was noted before it was run has ended. Its note is to count so many unclean ends from now on;
        0 for no note."""
        self.batch.noted[position] = times
        self._wake.set()

    def wake(self) -> None:
        """There is something to commit, or to settle."""
        self._wake.set()

    # ---- what goes out

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong in a transaction is raised: its outcome may be unknown."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._linger()
            self._settle()
            while self._sessions or self.batch or self.progress.floor_is_due(self._hurried):
                began = self._clock()
                await self._commit()
                self._took = self._clock() - began
                self._settle()
                if len(self.batch) >= MANY:
                    await self._linger()
            self._rest.set()

    def hurry(self) -> None:
        """Wait for nothing any more, and store the floor with each commit: the service stops."""
        self._hurried = True
        self._wake.set()

    async def rest(self) -> None:
        """Wait until there was nothing left to commit; there may be again."""
        self._rest.clear()
        await self._rest.wait()

    async def _linger(self) -> None:
        """Let others join the next commit: one of a thousand events costs little more than one of a hundred, and many
        of them would leave no time for handlers."""
        if self._hurried:
            return
        if 0 < len(self.batch) + len(self._sessions) < MANY:
            await asyncio.sleep(LINGER_SECONDS)
        elif self.batch:
            left = min(self._took, LONGEST_SECONDS)
            until = self._clock() + left
            while left > 0 and self._may_grow():
                await asyncio.sleep(min(left, LOOK_SECONDS))
                left = until - self._clock()

    def _may_grow(self) -> bool:
        """Something was taken that is not settled and not in the batch, and nobody waits for the commit: neither a pass
        that needs room nor an event with a session."""
        return not self.full and not self._sessions and len(self._taken) > len(self.batch)

    async def _commit(self) -> None:
        ran: list[Item] = []
        complete, began = False, self._clock()
        try:
            async with self._database.turn, self._database.transaction() as connection:
                await self._work(connection, ran)
                batch, self.batch = self.batch, Batch()
                await self.progress.write(connection, batch, floor_now=self._hurried)
                complete = True
        except DBAPIError as error:
            if complete and ran:
                raise self._troubles.suspect(ran, error) from error
            raise
        if len(batch):
            self._database.writes.proven()
        self.progress.written(batch)
        self.commits += 1
        for item in batch.finished:
            item.done = True
        for _, ticket in batch.foreign:
            ticket.done = True
        self._troubles.forget(batch.finished)
        self._committed(batch, began)

    def _settle(self) -> None:
        consumer: Consumer | None = None
        tag = 0
        for step in self._taken.pop():
            if step is None:
                continue
            self.progress.floor = max(self.progress.floor, step.floor)
            self.progress.caught = max(self.progress.caught, step.caught)
            if step.consumer is not None:
                if consumer is not None and step.consumer is not consumer:
                    consumer.settle_through(tag)
                consumer, tag = step.consumer, step.tag
        if consumer is not None:
            consumer.settle_through(tag)
        if len(self._taken) <= self._room_at:
            self.full = False
            self._room.set()
        if not self.progress.floor_is_stored and self._floor_timer not in self._timers:
            self._floor_timer = self._timers.later(FLOOR_SECONDS, self._wake.set)
