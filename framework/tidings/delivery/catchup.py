"""The past of handlers that were added late, or were away: read the log from where they are, and feed the lanes.

A handler that is behind in a bucket is given nothing of it when it comes, so that its order stays. It has caught up
where everything that the bucket has accepted was given to it: then its row is removed, in the lane's order, and from
the next event on it is given what the others are given. It runs no handler, and writes nothing itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from tidings.delivery.dispatch import Dispatcher
from tidings.delivery.work import Step
from tidings.protocol.metadata import own_metadata
from tidings.protocol.position import CARRIED, Accepted, carried
from tidings.stores import EventStore

__all__ = ["CatchUp"]

log = structlog.get_logger("tidings.catchup")

PROGRESS_SECONDS: Final = 1.0
"""Seconds between two notes of how far it came, where a restart goes on."""
PAUSED_SECONDS: Final = 30.0
"""Seconds until one more event is read while every handler that is behind is paused: there must be something to try."""
LAGGING_SECONDS: Final = 0.1
"""Seconds before it looks again for what the store, or the bus, has not brought yet."""


class CatchUp:
    """Of one session of a partition. While the process stands by, it rests."""

    def __init__(
        self,
        service: str,
        store: EventStore,
        accepted: Accepted,
        dispatcher: Dispatcher,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._store = store
        self._accepted = accepted
        self._dispatcher = dispatcher
        self._roster = dispatcher.roster
        self._clock = clock
        self._generation = -1

    async def run(self) -> None:
        """Until cancelled. Raises `StoreUnavailable`."""
        while True:
            await self._dispatcher.taken_over(self._generation)
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
        paused = self._dispatcher.breakers.open
        return bool(paused) and all(name in paused for spans in self._roster.spans.values() for name, _ in spans)

    async def _catch_up(self) -> None:
        reached, began = self._roster.first, self._clock()
        names = sorted({name for spans in self._roster.spans.values() for name, _ in spans})
        log.info("handlers.catching_up", service=self._service, handlers=names, after=reached)
        while self._roster.spans and not self._is_stale:
            head = await self._store.head()
            if reached < head:
                reached = await self._read(reached, head)
            if self._is_stale:
                return
            for bucket in list(self._roster.spans):
                self._end(bucket, reached)
            self._dispatcher.settle(Step(caught=reached))
            if self._is_paused:
                await self._dispatcher.resumed(PAUSED_SECONDS)
            elif self._roster.spans:
                await asyncio.sleep(LAGGING_SECONDS)
        seconds = round(self._clock() - began, 3)
        if not self._roster.spans and not self._is_stale:
            log.info("handlers.caught_up", service=self._service, handlers=names, reached=reached, seconds=seconds)

    async def _read(self, reached: int, head: int) -> int:
        dispatcher, offered, given = self._dispatcher, self._clock(), False
        async for event in self._store.read_all(after=reached, filter=CARRIED):
            if self._is_stale:  # what it came to is said of the spans that were read anew, or that nobody has read yet
                return reached
            position = event.position
            if position > head:
                break
            metadata = own_metadata(event.metadata)
            bucket = carried(event, metadata)
            if bucket is not None and bucket in self._roster.spans:
                if dispatcher.full:
                    await dispatcher.room()
                await dispatcher.taken_over(-1)
                if self._is_stale:
                    return reached
                # No await from here on: what is accepted, and what is given, must not change in between.
                self._end(bucket, position - 1)
                late = self._roster.late(event.type, bucket, position)
                if late and given and self._is_paused:
                    return position - 1
                for handler, span in late:
                    dispatcher.submit_late(event, handler, span, metadata)
                    given = True
            if self._clock() - offered >= PROGRESS_SECONDS:
                offered = self._clock()
                dispatcher.settle(Step(caught=position))
                log.info("handlers.progressed", service=self._service, reached=position, head=head)
        return head

    def _end(self, bucket: int, reached: int) -> None:
        for span in self._roster.ended(bucket, reached, self._accepted.tail(bucket)):
            self._dispatcher.end_span(span)
