"""A bucket range at work: its stages put together, run, asked how far they are, and drained.

Volatile: made anew at each join from what the inbox remembers; any error out of `run` ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from tidings._support.timers import Timers
from tidings.database.inbox import Remembered
from tidings.database.staged_events import StagedEvent
from tidings.delivery.admission import Admission
from tidings.delivery.attempt import Attempts
from tidings.delivery.breaker import Breakers
from tidings.delivery.inflight import InFlight
from tidings.delivery.owned import Ours
from tidings.delivery.site import Joined
from tidings.delivery.stages import assemble
from tidings.delivery.succession import Succession
from tidings.delivery.takeover import Takeover
from tidings.errors import DatabaseUnavailable
from tidings.modelling.roster import Roster

__all__ = ["Pipeline"]

log = structlog.get_logger("tidings.delivery")

PARTING_SECONDS: Final = 0.2
"""Seconds to record a clean exit. If that fails, the next process treats this one as crashed."""


class Pipeline:
    """From accepted events to acknowledged deliveries, for one bucket range."""

    def __init__(self, joined: Joined, remembered: Remembered) -> None:
        self._joined = joined
        site = joined.site
        site.memory.skip(remembered.skips)
        self._timers = Timers()
        ours = Ours(site.store, site.bus, site.database)
        self._attempts = Attempts(site.service, site.resources, ours, site.witness)
        self.breakers = Breakers(site.clock)
        succession = Succession(joined)
        self.stages, due = assemble(joined, remembered, self._attempts, succession, self._timers, self.breakers)
        self.roster = Roster(site.service.handlers_of, remembered.partial)
        stages = self.stages
        self.admission = Admission(
            site.service, self.roster, remembered.replay, stages.lanes, stages.pending, stages.acknowledgement
        )
        self.succession = succession
        self.takeover = Takeover(joined, stages, succession, self.roster, self.admission, due)
        self._stopping = self._draining = False

    @property
    def idle(self) -> bool:
        """Nothing was taken that is not settled, and nothing waits to be written."""
        return self.stages.idle

    @property
    def floor(self) -> int:
        """Everything up to here is settled (durably at most a second later)."""
        return self.stages.progress.floor

    @property
    def moves(self) -> int:
        """A number that changes whenever anything moves."""
        return self.stages.commits.commits + self.stages.runner.ended

    @property
    def working(self) -> list[InFlight]:
        """Handlers at work."""
        return list(self.stages.runner.working.values())

    @property
    def oldest(self) -> InFlight | None:
        """The event that the floor waits for; None where something else does, or nothing."""
        return self.stages.acknowledgement.oldest

    @property
    def unsettled(self) -> int:
        """Events, messages and markers that were taken and are not settled yet."""
        return len(self.stages.acknowledgement)

    @property
    def resting(self) -> int:
        """Events that rest between two quick attempts."""
        return self.stages.lanes.resting

    def collect(self, rows: Sequence[StagedEvent], *, all: bool) -> None:
        """Append what requests emitted, while this process is the one at work: as `Stager.collect`."""
        if self.takeover.active.is_set() and not self._stopping:
            self.stages.stager.collect([row for row in rows if row.bucket in self._joined.inbox.buckets], all=all)

    def watch(self, row: StagedEvent, *, alone: bool) -> asyncio.Future[bool] | None:
        """As `Stager.watch`; None where another process may append the event. `alone`: only this process can be at
        work, so it will be, even when it has only just joined."""
        ours = row.bucket in self._joined.inbox.buckets
        if self._stopping or not ours or not (alone or self.takeover.active.is_set()):
            return None
        return self.stages.stager.watch(row.event.id)

    async def run(self) -> None:
        """Until cancelled, or until the database, the store or another process ends it with an error."""
        stages = self.stages
        self._attempts.open()
        try:
            await self.takeover.read_staged()
            if not self._stopping:
                stages.lanes.open(stages.gate)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stages.runners.side_by_side.run())
                tasks.create_task(stages.commits.run())
                if stages.runners.concurrent is not None:
                    tasks.create_task(stages.runners.concurrent.run())
                tasks.create_task(stages.guard.run())
                tasks.create_task(stages.revival.run())
                tasks.create_task(stages.stager.run())
        finally:
            self._stopping = True
            stages.lanes.close()
            self._attempts.close()
            self._timers.close()
            self.succession.notebook.close()
            if self.takeover.began and self._draining:
                await self._part()

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let what runs finish and be committed, store the floor; at most so long. Then cancel
        `run`, which ends what is left, and says that this was a clean end."""
        stages = self.stages
        self._stopping = self._draining = True
        stages.lanes.close()
        self.takeover.stand_by()
        stages.lanes.committed(stages.runners.take_back() + stages.guard.take_back())
        stages.commits.hurry()
        try:
            async with asyncio.timeout(seconds):
                while (
                    stages.lanes.under_way
                    or stages.stager
                    or stages.pending.batch
                    or not stages.progress.floor_is_stored
                ):
                    await stages.commits.rest()
        except TimeoutError:
            working, now = self.working, self._joined.site.clock()
            log.warning(
                "service.drain_incomplete",
                service=self._joined.site.service.name,
                handlers=sorted({work.handler.name for work in working}),
                unfinished=[work.facts(now) for work in working],
                staged=len(stages.stager),
                advice="nothing is lost: what is not settled comes again at the next start",
            )

    async def _part(self) -> None:
        """Say that this process ended cleanly, if the database can be told now."""
        try:
            async with asyncio.timeout(PARTING_SECONDS):
                await self.succession.leave()
        except (TimeoutError, DatabaseUnavailable) as error:
            log.info(
                "service.clean_end_unrecorded",
                service=self._joined.site.service.name,
                reason=str(error) or "the database is busy",
            )
