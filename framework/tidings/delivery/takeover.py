"""Whose turn it is: the bus has chosen this process for a bucket range, or gives it nothing any more.

Until the bus has chosen it, a process accepts nothing and runs nothing. It runs no handler itself.
"""

from __future__ import annotations

import asyncio

from tidings.database.enrolment import enrol
from tidings.database.inbox import Remembered
from tidings.delivery.admission import Admission
from tidings.delivery.due import Due
from tidings.delivery.site import Joined
from tidings.delivery.stages import Stages
from tidings.delivery.succession import Succession
from tidings.errors import Fenced
from tidings.modelling.roster import Roster

__all__ = ["Takeover"]


class Takeover:
    """The turn of this process at one bucket range that it has joined."""

    def __init__(
        self, joined: Joined, stages: Stages, succession: Succession, roster: Roster, admission: Admission, due: Due
    ) -> None:
        self._joined = joined
        self._stages = stages
        self._succession = succession
        self._roster = roster
        self._admission = admission
        self._due = due
        self.active = stages.revival.active
        """Set while the bus gives this process messages."""
        self.began = False
        """It has been at work since it joined."""
        self._again = asyncio.Event()
        self._staged_is_read = asyncio.Event()

    async def read_staged(self) -> None:
        """Read the events that were staged and not appended when this process joined."""
        self._stages.stager.add(await self._joined.inbox.read_staged(), since=None)
        self._staged_is_read.set()

    async def take_over(self, *, unless_at_work: bool = False) -> None:
        """The bus has begun to give this process messages; before that, it runs nothing. After another process that
        ended uncleanly, events are noted before they are run. Raises `DatabaseUnavailable`, and `Fenced` as
        `Succession.take_over` does."""
        # Work left from an earlier connection was taken for the handlers known then, so keep them.
        stages, fresh = self._stages, self._stages.idle or not self._roster.known
        for position in await self._succession.take_over(unless_at_work=unless_at_work):
            stages.pending.noted(position, self._joined.caution.times(position))
        await self._enrol(fresh)
        stages.stager.begin()
        await stages.revival.renew()
        self.began = True
        self.active.set()
        self._again.set()
        self._due.resumed.set()

    async def _enrol(self, fresh: bool) -> None:
        inbox, site, roster = self._joined.inbox, self._joined.site, self._roster
        async with site.database.turn, site.database.transaction() as connection:
            # The layout is locked before watermarks, by whoever locks both.
            await inbox.watermarks.fence(connection, locking=False)
            enrolled = await enrol(connection, site.service, self._joined.lineage.log, inbox.buckets)
            if fresh:  # not before: what is held may wait in another line now
                await self._stages.hindrances.read(connection, self._stages.pending.batch.notable)
        if enrolled.changed:
            inbox.watermarks.fenced_others()
            if roster.partial or self._admission.replay.waiting:  # it was read with the handlers' names of before
                raise Fenced(f"service {site.service.name!r}: its handlers are others than before; joining again")
        if fresh:
            roster.read(enrolled.after, enrolled.spans)
            self._stages.progress.spans = {span[:3]: span.done for span in enrolled.spans if span.open}
        elif enrolled.changed:
            raise Fenced(f"service {site.service.name!r}: another version of it was at work meanwhile")

    async def resume(self, remembered: Remembered) -> None:
        """Go on from what another process has left, instead of from what was known before; only while everything is
        idle. `take_over`, which follows, reads which keys are blocked."""
        await self._staged_is_read.wait()
        self._stages.progress.resume(remembered)
        self._admission.replay = self._stages.gate.replay = remembered.replay
        self._joined.site.memory.skip(remembered.skips)
        self._roster.renew(remembered.partial)
        self._stages.stager.add(await self._joined.inbox.read_staged(), since=None)

    def stand_by(self) -> None:
        """The bus gives this process nothing any more: held events are left to the one at work."""
        self.active.clear()

    def knows_newer_than(self, generation: int) -> bool:
        """Whether this process is at work, and knows handlers of another generation than this; -1 is before all."""
        return self.active.is_set() and self._roster.known and self._roster.generation != generation

    async def newer_than(self, generation: int) -> None:
        """Wait until `knows_newer_than`."""
        while not self.knows_newer_than(generation):
            self._again.clear()
            await self._again.wait()

    async def resumed(self, seconds: float) -> None:
        """Wait until a handler that was paused succeeds, or until what is known of handlers is read anew; at most so
        many seconds."""
        self._due.resumed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._due.resumed.wait()
        except TimeoutError:
            pass
