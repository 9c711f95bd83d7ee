"""The pass: read the log once from the lowest accepted position, and feed the lanes with what the bus did not bring.

It never asks the bus for anything. Gaps, lost markers, deleted queues, new subscribers and restarts all end up here.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from tidings.delivery.admission import Admission
from tidings.delivery.inflight import Step
from tidings.delivery.log_reader import LAGGING_SECONDS, read_log
from tidings.delivery.site import Site
from tidings.protocol.position import Accepted
from tidings.stores import RecordedEvent

__all__ = ["Pass"]

log = structlog.get_logger("tidings.healing")


class Pass:
    """At most one is under way; what is asked for meanwhile only moves its end."""

    def __init__(self, site: Site, accepted: Accepted, admission: Admission) -> None:
        self._service = site.service.name
        self._store = site.store
        self._accepted = accepted
        self._admission = admission
        self._clock = site.clock
        # Where messages only say that there is something to read, a pass is nothing to speak of.
        self._say = log.info if site.trust.content else log.debug
        self._upto = -1
        self._asked = asyncio.Event()
        self._found = 0
        """Events that the bus had not brought, in the pass under way."""

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
        start, lagging, self._found = accepted.reached, 0, 0
        self._say("pass.started", service=self._service, after=start, upto=self._upto)
        while accepted.reached < self._upto:
            # The end is asked for before reading: what is read afterwards then holds everything up to it.
            head = await self._store.head()
            await read_log(self._store, accepted.reached, head, self, self._clock)
            accepted.reach(head)
            self._admission.settle(Step(floor=head))
            if head < self._upto:
                lagging += 1
                if lagging in (1, 100):
                    log.warning("pass.waiting_for_store", service=self._service, head=head, upto=self._upto)
                await asyncio.sleep(LAGGING_SECONDS)
        seconds = round(self._clock() - began, 3)
        self._say("pass.finished", service=self._service, reached=accepted.reached, found=self._found, seconds=seconds)

    # ---- an end of `read_log`

    def wants(self, bucket: int) -> bool:
        return True

    @property
    def waits(self) -> bool:
        return self._admission.full

    async def ready(self) -> None:
        await self._admission.room()

    def take(self, event: RecordedEvent, bucket: int, metadata: dict[str, Any] | None) -> bool:
        if self._accepted.read(bucket, event.position):  # what is accepted is submitted at once
            self._found += 1
            self._admission.submit(event, bucket, metadata=metadata)
        return True

    def progressed(self, reached: int, head: int) -> None:
        self._accepted.reach(reached)
        self._admission.settle(Step(floor=reached))
        log.info("pass.progressed", service=self._service, reached=reached, head=head, found=self._found)
