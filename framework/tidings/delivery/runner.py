"""The runner: one attempt of a handler at an event in flight, from its context to what it returned or raised.

It judges nothing (`tidings.delivery.verdicts`), and knows neither transactions nor lanes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from tidings.database.held_events import HeldEvent
from tidings.delivery.attempt import Attempt, Attempts
from tidings.delivery.failure import Failure
from tidings.delivery.guard import Survivors
from tidings.delivery.inflight import AGAIN, RUNNING, InFlight
from tidings.delivery.site import Joined
from tidings.delivery.succession import Succession
from tidings.modelling.codec import read_metadata
from tidings.modelling.context import Context
from tidings.modelling.handlers import Inject

__all__ = ["Runner"]


class Runner:
    """The runner of one bucket range."""

    def __init__(self, joined: Joined, attempts: Attempts, succession: Succession, survivors: Survivors) -> None:
        self._service = joined.site.service.name
        self._clock = joined.site.clock
        self._ids = joined.site.trust.ids
        self._memory = joined.site.memory
        self._lineage = joined.lineage
        self._caution = joined.caution
        self._attempts = attempts
        self._succession = succession
        self._survivors = survivors
        self.ended = 0
        """Attempts that have ended."""
        self.working: dict[int, InFlight] = {}
        """Handlers at work, by position."""

    def context(self, item: InFlight) -> Context:
        """Return what the next attempt is told of its event."""
        event = item.event
        metadata, item.metadata = item.metadata, None  # the next attempt must not see what this one makes of it
        attempts = self._memory.attempts
        tried = attempts.get(item.turn, 0) if attempts else 0
        if item.role >= AGAIN:
            tried += cast("HeldEvent", item.source).attempts
        if metadata is None:
            metadata = read_metadata(event)
        handler, lineage = item.handler, self._lineage
        log_id = lineage.at(event.position) if lineage.former else lineage.log
        return Context(
            self._service, handler.name, log_id, event, metadata, tried + 1, item.replayed, handler.was, self._ids
        )

    def begin(self, item: InFlight, context: Context, provide: Callable[[Inject], Any]) -> Attempt | Failure | None:
        """Begin an attempt, and end it where it waits for nothing; whoever gets an `Attempt` awaits its `outcome`."""
        item.to(RUNNING)
        item.since = self._clock()
        self.working[item.event.position] = item
        self._succession.notebook.begin(item.event.position, item.bucket)
        begun: Attempt | Failure | None = None
        try:
            begun = self._attempts.begin(item.handler, context, provide)
        finally:
            if not isinstance(begun, Attempt):
                self._end(item)
        return begun

    async def run(self, item: InFlight, context: Context, provide: Callable[[Inject], Any]) -> Failure | None:
        """One whole attempt: None when it succeeded."""
        begun = self.begin(item, context, provide)
        return await self.outcome(item, begun) if isinstance(begun, Attempt) else begun

    async def outcome(self, item: InFlight, begun: Attempt) -> Failure | None:
        """Wait until an attempt ends: None when it succeeded."""
        cut_off = False
        try:
            return await begun.outcome()
        except asyncio.CancelledError:
            cut_off = True
            raise
        finally:
            self._end(item, cut_off=cut_off)

    def _end(self, item: InFlight, *, cut_off: bool = False) -> None:
        self.ended += 1
        position = item.event.position
        del self.working[position]
        self._succession.notebook.end(position)
        if self._caution.alert and not cut_off:  # an attempt that was cut off has not shown what it does
            self._survivors.note(item)
