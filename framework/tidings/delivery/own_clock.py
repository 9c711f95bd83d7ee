"""Reading the log without being told to: what a service does while nothing new comes over the bus, though it is the one
at work.

Its queue may refuse messages, be unbound, or have no leader; or no relay runs, and somebody sends old messages again.
The log is the truth: what it holds is handled, only later than over the bus. It accepts and runs nothing by itself: it
starts a pass.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, Final, cast

import structlog

from tidings.buses import CountsConsumers, Subscription
from tidings.delivery.healing import Pass
from tidings.delivery.news import News
from tidings.delivery.pipeline import Pipeline
from tidings.delivery.site import Joined
from tidings.errors import BusUnavailable, DatabaseUnavailable, StoreUnavailable
from tidings.protocol.position import CARRIED, Accepted, carried

__all__ = ["OwnClock"]

log = structlog.get_logger("tidings.intake")

SILENT_SECONDS: Final = 20.0
"""Seconds without news after which a service looks whether the log holds more than it was told."""
LOOK_SECONDS: Final = 10.0
"""Seconds between two looks that find nothing: a service whose log rests asks for its head as seldom as this."""


class OwnClock:
    """When to read the log without a marker. Another process of the service that is at work is left alone."""

    def __init__(
        self,
        subscription: Subscription,
        joined: Joined,
        accepted: Accepted,
        pipeline: Pipeline,
        healing: Pass,
        news: News,
    ) -> None:
        self.read_at: float | None = None
        """When it last had the log read, by the site's clock."""
        self._subscription = subscription
        self._joined = joined
        self._accepted = accepted
        self._pipeline = pipeline
        self._healing = healing
        self._news = news
        self._connected_at = joined.site.clock()
        self._looked_at: float | None = None
        self._seen: int | None = None
        """The head of the log at the last look, if something of it was not accepted."""
        self._clear = -1
        """The log was read up to here, and held nothing for services that was not accepted."""

    @property
    def counts(self) -> bool:
        """The bus tells whether another process waits for its turn at the queue."""
        bus = self._joined.site.bus
        return isinstance(bus, CountsConsumers) and bus.counts_all_consumers

    def begin(self) -> None:
        """A connection was made: begin to wait anew."""
        self._connected_at = self._joined.site.clock()
        self._seen = self.read_at = self._looked_at = None

    async def due(self, *, chosen: bool) -> int | None:
        """Return up to where the log is to be read now; None where nothing is to be done, or not by this process.

        `chosen`: the bus has given this process something on this connection. It looks twice before it says so, so that
        a process which is at work has the time between two looks to do what the first one found.
        """
        now = self._joined.site.clock()
        since = max(self._news.at or self._connected_at, self._connected_at)
        if self.read_at is not None and self.read_at < since:
            self.read_at = None  # news came again
        if now - since < SILENT_SECONDS:
            self._seen = None
            return None
        if self._healing.under_way or self._pipeline.unsettled >= self._joined.site.service.prefetch:
            return None  # full, it takes nothing: messages wait in its queue
        if self._seen is None and self._looked_at is not None and now - self._looked_at < LOOK_SECONDS:
            return None
        self._looked_at = now
        try:
            seen = await self._look(chosen)
        except (StoreUnavailable, DatabaseUnavailable, BusUnavailable) as error:
            log.debug("service.cannot_look", service=self._subscription.service, error=str(error))
            return None
        if seen is not None:
            self._say(seen, round(now - since))
            self.read_at = now
        return seen

    async def _look(self, chosen: bool) -> int | None:
        """Return what the log held at the last look, if this process is to read it now. Raises what store, database and
        bus answer."""
        head = await self._joined.site.store.head()
        seen, self._seen = self._seen, head if head > max(self._accepted.reached, self._clear) else None
        if self._seen is None or seen is None or seen <= self._accepted.reached:
            return None
        if await self._joined.inbox.read_floor() > self._pipeline.floor:
            return None  # another process has settled more: it is at work
        if not chosen and not await self._alone():
            return None
        first = await self._first_unheard(head)
        if first is None:  # what the log has more is not for services: checkpoints, what a store notes for itself
            self._seen, self._clear = None, head
        if first is None or first > seen:
            return None
        self._news.owed = first
        return seen

    async def _first_unheard(self, head: int) -> int | None:
        after = max(self._accepted.reached, self._clear)
        async with aclosing(cast("Any", self._joined.site.store.read_all(after=after, filter=CARRIED))) as events:
            async for event in events:
                if event.position > head:
                    return None
                if carried(event) is not None:
                    return int(event.position)
        return None

    def _say(self, seen: int, silent: int) -> None:
        if self.read_at is None:
            log.warning(
                "service.reads_the_log",
                service=self._subscription.service,
                queue=self._subscription.queue,
                after=self._accepted.reached,
                upto=seen,
                silent=silent,
                advice="nothing new comes over the bus, though the log holds more: it is read instead, again and "
                "again, until news comes. Does a relay run, and does the queue take messages? tidings status, tidings "
                "topology diff",
            )

    async def _alone(self) -> bool:
        """Whether the bus can have chosen nobody else: nobody else consumes the queue, or nobody is noted as being at
        work. A process that ended without a word stays noted until the bus gives a message to another one."""
        site = self._joined.site
        if self.counts:
            assert site.bus is not None
            found = await site.bus.inspect([self._subscription])
            return any(thing.name == self._subscription.queue and thing.consumers == 1 for thing in found)
        return await self._joined.inbox.read_active() in (None, site.process)
