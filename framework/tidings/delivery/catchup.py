"""The past of handlers that were added late, or were away: read the log from where they are, and feed the lanes.

A handler that is behind in a bucket is given nothing of it when it comes, so that its order stays. It has caught up
where everything that the bucket has accepted was given to it: then its row is removed, in the lane's order, and from
the next event on it is given what the others are given. It runs no handler, and writes nothing itself.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog

from tidings.delivery.admission import Admission
from tidings.delivery.breaker import Breakers
from tidings.delivery.inflight import Step
from tidings.delivery.log_reader import LAGGING_SECONDS, read_log
from tidings.delivery.site import Site
from tidings.delivery.takeover import Takeover
from tidings.modelling.roster import Roster
from tidings.protocol.position import Accepted
from tidings.stores import RecordedEvent

__all__ = ["CatchUp"]

log = structlog.get_logger("tidings.catchup")

PAUSED_SECONDS: Final = 30.0
"""Seconds until one more event is read while every handler that is behind is paused: there must be something to try."""


class CatchUp:
    """Catching up of one bucket range, while this process is joined to it. While the process stands by, it rests."""

    def __init__(
        self,
        site: Site,
        accepted: Accepted,
        admission: Admission,
        takeover: Takeover,
        roster: Roster,
        breakers: Breakers,
    ) -> None:
        self._site = site
        self._accepted = accepted
        self._admission = admission
        self._takeover = takeover
        self._roster = roster
        self._breakers = breakers
        self._generation = -1
        self._given = False
        """The reading under way has given something to a handler."""

    async def run(self) -> None:
        """Until cancelled. Raises `StoreUnavailable`."""
        while True:
            await self._takeover.newer_than(self._generation)
            self._generation = self._roster.generation
            if self._roster.spans:
                await self._catch_up()

    @property
    def _is_stale(self) -> bool:
        """Another process may have been at work: where the handlers are must be read anew."""
        return self._generation != self._roster.generation

    @property
    def _is_paused(self) -> bool:
        """The breaker of every handler that is behind is open: what is read now would only fill the held events."""
        paused = self._breakers.open
        return bool(paused) and all(name in paused for spans in self._roster.spans.values() for name, _ in spans)

    async def _catch_up(self) -> None:
        reached, began = self._roster.first, self._site.clock()
        names = sorted({name for spans in self._roster.spans.values() for name, _ in spans})
        log.info("handlers.catching_up", service=self._site.service.name, handlers=names, after=reached)
        while self._roster.spans and not self._is_stale:
            head = await self._site.store.head()
            if reached < head:
                reached = await self._read(reached, head)
            if self._is_stale:  # what it came to is said of the spans that were read anew, or that nobody has read yet
                return
            for bucket in list(self._roster.spans):
                self._end(bucket, reached)
            self._admission.settle(Step(caught=reached))
            if self._is_paused:
                await self._takeover.resumed(PAUSED_SECONDS)
            elif self._roster.spans:
                await asyncio.sleep(LAGGING_SECONDS)
        seconds = round(self._site.clock() - began, 3)
        if not self._roster.spans and not self._is_stale:
            log.info(
                "handlers.caught_up", service=self._site.service.name, handlers=names, reached=reached, seconds=seconds
            )

    async def _read(self, reached: int, head: int) -> int:
        self._given = False
        return await read_log(self._site.store, reached, head, self, self._site.clock)

    def _end(self, bucket: int, reached: int) -> None:
        for span in self._roster.ended(bucket, reached, self._accepted.tail(bucket)):
            self._admission.end_span(span)

    # ---- an end of `read_log`

    def wants(self, bucket: int) -> bool:
        return bucket in self._roster.spans or self._is_stale

    @property
    def waits(self) -> bool:
        return self._admission.full or not self._takeover.knows_newer_than(-1)

    async def ready(self) -> None:
        if self._admission.full:
            await self._admission.room()
        await self._takeover.newer_than(-1)

    def take(self, event: RecordedEvent, bucket: int, metadata: dict[str, Any] | None) -> bool:
        # No await in here: what is accepted, and what is given, must not change in between.
        position = event.position
        if self._is_stale:
            return False
        self._end(bucket, position - 1)
        late = self._roster.late(event.type, bucket, position)
        if late and self._given and self._is_paused:
            return False
        for handler, span in late:
            self._admission.submit_late(event, handler, span, metadata)
            self._given = True
        return True

    def progressed(self, reached: int, head: int) -> None:
        if not self._is_stale:
            self._admission.settle(Step(caught=reached))
            log.info("handlers.progressed", service=self._site.service.name, reached=reached, head=head)
