"""The pass: read the log once from the lowest accepted position, and feed the lanes with what the bus did not bring.

It never asks the bus for anything. Gaps, lost markers, deleted queues, new subscribers and restarts all end up here.
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

__all__ = ["Pass"]

log = structlog.get_logger("tidings.healing")

PROGRESS_SECONDS: Final = 1.0
"""So often a pass offers how far it came as the floor, so that a restart resumes there."""
LAGGING_SECONDS: Final = 0.1
"""Wait before asking a store again that has not reached what a message already named."""


class Pass:
    """At most one is under way; what is asked for meanwhile only moves its end."""

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
        self._clock = clock
        self._upto = -1
        self._asked = asyncio.Event()

    @property
    def under_way(self) -> bool:
        return self._asked.is_set()

    def start(self, upto: int) -> None:
        """Read until the store has reached `upto`, or further if it was asked for more."""
        self._upto = max(self._upto, upto)
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled. Raises `StoreUnavailable`: without the log a gap is never skipped."""
        while True:
            await self._asked.wait()
            await self._heal()
            self._asked.clear()

    async def _heal(self) -> None:
        accepted, began = self._accepted, self._clock()
        start, found, lagging = accepted.reached, 0, 0
        log.info("pass.started", service=self._service, after=start, upto=self._upto)
        while accepted.reached < self._upto:
            # The end is asked for before reading: what is read afterwards then holds everything up to it.
            head = await self._store.head()
            found += await self._read(head)
            accepted.reach(head)
            self._dispatcher.settle(Step(floor=head))
            if head < self._upto:
                lagging += 1
                if lagging in (1, 100):
                    log.warning("pass.waiting_for_store", service=self._service, head=head, upto=self._upto)
                await asyncio.sleep(LAGGING_SECONDS)
        seconds = round(self._clock() - began, 3)
        log.info("pass.finished", service=self._service, reached=accepted.reached, found=found, seconds=seconds)

    async def _read(self, head: int) -> int:
        accepted, dispatcher, found = self._accepted, self._dispatcher, 0
        offered = self._clock()
        async for event in self._store.read_all(after=accepted.reached, filter=CARRIED):
            position = event.position
            if position > head:
                break
            metadata = own_metadata(event.metadata)
            bucket = carried(event, metadata)
            if bucket is not None and dispatcher.full:
                await dispatcher.room()
            if bucket is not None and accepted.read(bucket, position):  # what is accepted is submitted at once
                found += 1
                dispatcher.submit(event, bucket, metadata=metadata)
            if self._clock() - offered >= PROGRESS_SECONDS:
                offered = self._clock()
                accepted.reach(position)
                dispatcher.settle(Step(floor=position))
                log.info("pass.progressed", service=self._service, reached=position, head=head, found=found)
        return found
