"""Which queue refuses what a relay publishes, as far as the bus can tell. It publishes nothing and changes nothing.

A broker says of a message that some queue refused it, never which one. So known queues are looked at twice, with a
refused marker in between: every other queue took that marker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from tidings.buses import EventBus, Subscription, TopologyItem
from tidings.errors import BusUnavailable, QueueRefused, TidingsError
from tidings.protocol.position import BUCKETS

__all__ = ["Queues", "Refusals", "strays"]

log = structlog.get_logger("tidings.relay")

Queues = Callable[[], Awaitable[Sequence[Subscription]]]
"""Return the partitions of the services that are known."""

LOOK_SECONDS: Final = 10.0
"""Seconds that one look at the queues may take."""
AGAIN_SECONDS: Final = 60.0
"""Seconds after which a refusal that goes on is told again."""
STRAYS: Final = 32
"""Queues named like partitions of a service that are looked for."""
STRAYS_SECONDS: Final = 600.0
"""Seconds until they are looked for again: RabbitMQ logs an error for each one that does not exist."""


def strays(known: Sequence[Subscription]) -> list[Subscription]:
    """Queues that these services may declare and do not need, whether they exist or not: `tidings.order.7` beside
    `tidings.order`."""
    wanted = {part.queue for part in known}
    services = dict.fromkeys(part.service for part in known)
    possible = [
        part
        for service in services
        for part in (Subscription(service), *(Subscription(service, index, BUCKETS) for index in range(STRAYS)))
    ]
    return [part for part in possible if part.queue not in wanted]


class Refusals:
    """What a relay knows of queues that refuse its messages."""

    def __init__(self, relay: str, bus: EventBus, queues: Queues | None, clock: Callable[[], float]) -> None:
        self.told: str | None = None
        """Which queues refuse, and what to do; None while none does."""
        self._relay = relay
        self._bus = bus
        self._queues = queues
        self._clock = clock
        self._count = 0
        self._forgotten = 0
        """How often it began anew: a look that began before does not count."""
        self._logged_at: float | None = None
        self._strays: list[Subscription] = []
        """Those that existed."""
        self._strays_at: float | None = None
        """When they were looked for last."""
        self._before: dict[str, TopologyItem] = {}
        """The queues as they were after the marker before, if a queue refused that."""

    def refused(self, error: QueueRefused) -> None:
        """Note that a queue refused a message."""
        self._count += 1
        if self.told is None:
            self.told = str(error)
            if self._due:
                self._log()

    def taken(self) -> None:
        """Note that every queue took a marker: what refused takes messages again."""
        if self.told is not None:
            log.info("relay.queues_take_all", relay=self._relay, refused=self._count)
            self.forget()

    def forget(self) -> None:
        """Begin anew: nothing is known of the queues."""
        self.told, self._count, self._before = None, 0, {}
        self._forgotten += 1

    async def look(self, error: QueueRefused) -> None:
        """Look at the queues that are known, after a marker was refused. Never raises for what the bus says.

        Markers may come meanwhile: if all queues take one, what is found then is of the past, and is not told.
        """
        forgotten = self._forgotten
        found, silent = await self._found()
        if forgotten != self._forgotten:
            return
        suspects = suspected(self._before, found, silent)
        self._before = found
        changed = False
        if suspects:  # what a look has named stays named until it names another, or none refuses
            names = ", ".join(repr(name) for name in suspects)
            details = "".join(f"{detail} " for detail in suspects.values() if detail)
            told = f"queue {names} refuses messages. {details}{str(error).partition('. ')[2]}"
            changed, self.told = told != self.told, told
        if changed or self._due:
            self._log(list(suspects))

    @property
    def _due(self) -> bool:
        return self._logged_at is None or self._clock() - self._logged_at >= AGAIN_SECONDS

    def _log(self, queues: Sequence[str] = ()) -> None:
        self._logged_at = self._clock()
        log.warning(
            "relay.queue_refuses", relay=self._relay, queues=list(queues), refused=self._count, advice=self.told
        )

    async def _found(self) -> tuple[dict[str, TopologyItem], dict[str, str]]:
        """The known queues that exist, and what the bus says of those that do not answer."""
        if self._queues is None:
            return {}, {}
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                known = await self._queues()
                possible, now = self._strays, self._clock()
                if self._strays_at is None or now - self._strays_at >= STRAYS_SECONDS:
                    possible, self._strays_at = strays(known), now
                found, silent = await self._inspected([*known, *possible])
                self._strays = [part for part in possible if part.queue in found or part.queue in silent]
                return found, silent
        except (TidingsError, TimeoutError) as error:
            log.debug("relay.queues_unseen", relay=self._relay, error=str(error))
            return {}, {}

    async def _inspected(self, parts: Sequence[Subscription]) -> tuple[dict[str, TopologyItem], dict[str, str]]:
        silent: dict[str, str] = {}
        try:
            found = await self._bus.inspect(parts)
        except BusUnavailable:  # of one of them, perhaps: a queue without a leader may end the connection
            found = []
            for part in parts:
                try:
                    found += await self._bus.inspect([part])
                except BusUnavailable as error:
                    silent[part.queue] = str(error)
            if len(silent) == len(parts):
                return {}, {}
        return {thing.name: thing for thing in found if thing.kind == "queue" and thing.state != "missing"}, silent


def suspected(
    before: Mapping[str, TopologyItem], after: Mapping[str, TopologyItem], silent: Mapping[str, str]
) -> dict[str, str]:
    """Return the queues that most likely refused a marker between two looks, each with what the bus says of it.

    Every queue that took the marker holds one message more, unless somebody consumes it.
    """
    if silent:
        return dict(silent)
    still = [
        thing
        for name, thing in after.items()
        if name in before and (thing.messages or 0) <= (before[name].messages or 0)
    ]
    unserved = [thing for thing in still if not thing.consumers]
    ranks = (
        [thing for thing in unserved if thing.state == "differs"],
        unserved,
        [thing for thing in still if thing.messages],
    )
    return {thing.name: thing.detail for thing in next((rank for rank in ranks if rank), ())}
