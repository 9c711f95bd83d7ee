"""The acknowledgement: what was taken is settled when everything before it is committed; until then it comes again.

It tells the bus, and says how far the floor may rise. It commits nothing.
"""

from __future__ import annotations

import asyncio

from tidings._support.timers import Timers
from tidings.buses import Consumer
from tidings.database.receipts import Receipts
from tidings.delivery.batch import Pending
from tidings.delivery.inflight import InFlight, Step
from tidings.delivery.limits import FULL, ROOM
from tidings.delivery.progress import FLOOR_SECONDS, Progress
from tidings.protocol.position import Ticket, Window

__all__ = ["Acknowledgement"]


class Acknowledgement:
    """What one bucket range has taken and not settled yet, in the order in which it was taken."""

    def __init__(self, progress: Progress, pending: Pending, timers: Timers, prefetch: int) -> None:
        self._progress = progress
        self._pending = pending
        self._timers = timers
        self._full, self._room_at = int(FULL * prefetch), int(ROOM * prefetch)
        self._taken: Window[Step | None] = Window()
        self._room = asyncio.Event()
        self._floor_timer: asyncio.TimerHandle | None = None
        self.full = False
        """More is unsettled than should be: a pass reads faster than handlers work, and one may hold up the rest."""

    def __len__(self) -> int:
        """Events, messages and markers that were taken and are not settled yet."""
        return len(self._taken)

    @property
    def receipts(self) -> Receipts:
        """What was settled, so that the log can contradict it."""
        return self._progress.receipts

    @property
    def oldest(self) -> InFlight | None:
        """The event that the floor waits for; None where something else does, or nothing."""
        ticket = self._taken.oldest
        return ticket if isinstance(ticket, InFlight) else None

    async def room(self) -> None:
        """Wait until less is unsettled."""
        self._room.clear()
        await self._room.wait()

    def take(self, item: InFlight) -> None:
        """It is settled after everything that was taken before it."""
        self.full = self._taken.add(item) >= self._full

    def begin(self, step: Step) -> Ticket[Step | None]:
        """Something to settle once its ticket is done, after everything that was taken before it."""
        return self._taken.begin(step)

    def settle(self, step: Step) -> None:
        """Nothing to handle, but to be settled in its turn: a marker, a duplicate, the progress of a pass."""
        if step.floor >= 0 and (tails := self.receipts.tails()):
            step = step._replace(passed=tails)
        self._taken.begin(step, done=True)
        self._pending.wake.set()

    def acknowledge(self) -> None:
        """Settle what can be settled now."""
        consumer: Consumer | None = None
        tag = 0
        progress = self._progress
        for step in self._taken.pop():
            if step is None:
                continue
            progress.floor = max(progress.floor, step.floor)
            progress.caught = max(progress.caught, step.caught)
            if step.passed is not None:
                progress.receipts.settled(step.passed)
            if step.consumer is not None:
                if consumer is not None and step.consumer is not consumer:
                    consumer.settle_through(tag)
                consumer, tag = step.consumer, step.tag
        if consumer is not None:
            consumer.settle_through(tag)
        if len(self._taken) <= self._room_at:
            self.full = False
            self._room.set()
        if not progress.floor_is_stored and self._floor_timer not in self._timers:
            self._floor_timer = self._timers.later(FLOOR_SECONDS, self._pending.wake.set)
