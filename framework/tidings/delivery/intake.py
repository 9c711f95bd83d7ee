"""From the bus to the lanes: read each message, accept what is next, drop duplicates, start a pass at a gap."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

import structlog

from tidings._support.backoff import Backoff
from tidings._support.tasks import supervised
from tidings.buses import Consumer, Delivery, Subscription
from tidings.database.dead_letters import Letter
from tidings.delivery.healing import Pass
from tidings.delivery.inflight import Step
from tidings.delivery.pipeline import Pipeline
from tidings.delivery.site import Joined
from tidings.errors import BusUnavailable, Fenced, MalformedMessage
from tidings.protocol.message import MARKER, Marker, Stamped, decode
from tidings.protocol.position import Accepted, Arrival

__all__ = ["Intake", "Pulse"]

log = structlog.get_logger("tidings.intake")

RECONNECT_SECONDS: Final = (0.2, 1.5)
"""First and longest pause between attempts to reach the bus."""
SILENCE_SECONDS: Final = 10.0
"""Without a marker for so long: see whether the queue still is bound."""


class Pulse:
    """What was heard on the bus, and when: for answers about health."""

    def __init__(self) -> None:
        self.marker_at: float | None = None
        """When the last marker was heard, by the site's clock: the pulse of the whole path."""
        self.marker = -1
        """What the last marker said."""
        self.connected = False
        self.stranger: UUID | None = None
        """Another log, whose relay publishes on this bus."""
        self.stranger_at: float | None = None
        """When something of it came last, by the site's clock."""
        self.heard_at: float | None = None
        """When the last message came, of whatever kind, by the site's clock."""
        self.heard = 0
        """Messages that came."""
        self.trouble: str | None = None
        """What the bus answered last instead of messages; None while it is connected."""


class Intake:
    """Comes back to the bus by itself: what was accepted stays accepted, and what comes again is dropped."""

    def __init__(
        self,
        subscription: Subscription,
        joined: Joined,
        accepted: Accepted,
        pipeline: Pipeline,
        healing: Pass,
    ) -> None:
        self._subscription = subscription
        assert joined.site.bus is not None
        self._bus = joined.site.bus
        self._joined = joined
        self._accepted = accepted
        self._pipeline = pipeline
        self._admission = pipeline.admission
        self._healing = healing
        self._clock = joined.site.clock
        self.pulse = Pulse()
        self._holding = asyncio.Event()

    @property
    def reached(self) -> int:
        """Everything at or below this position was accepted."""
        return self._accepted.reached

    def hold(self) -> None:
        """Take nothing more, and keep the connection: nobody else is given the queue before `run` is cancelled."""
        self._holding.set()

    async def run(self) -> None:
        """Until cancelled. Raises `TopologyMismatch` and `ConfigurationError`, which no waiting heals, and `Fenced`."""
        backoff = Backoff(*RECONNECT_SECONDS)
        while True:
            try:
                await self._bus.provision(self._subscription)
                async with self._bus.consume(
                    self._subscription, prefetch=self._joined.site.service.prefetch
                ) as consumer:
                    log.info("service.connected", service=self._subscription.service, queue=self._subscription.queue)
                    self.pulse.connected, self.pulse.marker_at, self.pulse.trouble = True, None, None
                    backoff.reset()
                    chosen = False
                    async with supervised(self._stay_bound()):
                        async for delivery in consumer:
                            if not chosen and not self._holding.is_set():
                                chosen = True
                                await self._take_over()
                            if self._holding.is_set():
                                await asyncio.Event().wait()
                            self.take(consumer, delivery)
                raise BusUnavailable(f"queue {self._subscription.queue!r}: the bus ended the deliveries")
            except BusUnavailable as error:
                self.pulse.trouble = str(error)
                what = "bus.lost" if self.pulse.connected else "bus.unreachable"
                log.warning(what, service=self._subscription.service, error=str(error), next_attempt_in=backoff.pause)
            finally:
                self.pulse.connected = False
                self._pipeline.takeover.stand_by()
            await backoff.wait()

    async def _stay_bound(self) -> None:
        """Bind the queue again while no marker comes: when somebody unbinds it, or deletes the exchange, which the
        relay makes anew without bindings, no bus tells a consumer. Raises `TopologyMismatch`."""
        while True:
            await asyncio.sleep(SILENCE_SECONDS / 2)
            if self.pulse.marker_at is None or self._clock() - self.pulse.marker_at >= SILENCE_SECONDS:
                try:
                    await self._bus.provision(self._subscription)
                except BusUnavailable as error:  # what was connected before may still be: its own loss ends it
                    log.warning("bus.silent", service=self._subscription.service, error=str(error))

    async def _take_over(self) -> None:
        """The first delivery on a connection: of all processes of the service, the bus has chosen this one.

        What a standby knew when it joined may be long ago. Its first commit would be fenced, but what its handlers do
        outside of the database would be done again before that: so it joins again, in its place in the line. With
        work of an earlier connection at hand it cannot; where another process has done more since, it raises `Fenced`.
        """
        service, floor = self._subscription.service, self._pipeline.floor
        if self._pipeline.idle and not self._healing.under_way:
            remembered = await self._joined.inbox.join()
            self._accepted.begin(remembered.floor, remembered.watermarks)
            await self._pipeline.takeover.resume(remembered)
        elif (settled := await self._joined.inbox.read_floor()) > floor:
            raise Fenced(
                f"service {service!r}: taking over from another process, which has settled everything up to position "
                f"{settled}; this one knew of position {floor}"
            )
        await self._pipeline.takeover.take_over()
        log.info("service.consuming", service=service, queue=self._subscription.queue)

    def take(self, consumer: Consumer, delivery: Delivery) -> None:
        """One delivery: accepted, dropped, or recorded as dead; it never raises for what a message says."""
        message = delivery.message
        self.pulse.heard += 1
        self.pulse.heard_at = self._clock()
        step = Step(consumer, delivery.tag)
        try:
            if message.type == MARKER and "tidings-position" not in message.headers:
                self._hear(Marker.decode(message), step)
            else:
                self._offer(decode(message), step)
        except MalformedMessage as error:
            self._admission.bury(Letter.of_message(message, f"MalformedMessage: {error}"), step)

    def _offer(self, stamped: Stamped, step: Step) -> None:
        self._check_log(stamped.log)
        event = stamped.event
        if self._healing.under_way:
            self._gap(event.position, step)
            return
        arrival = self._accepted.offer(stamped.bucket, event.position, stamped.previous)
        if arrival is Arrival.NEXT:
            self._admission.submit(event, stamped.bucket, step)
        elif arrival is Arrival.DUPLICATE:
            log.debug("event.repeated", service=self._subscription.service, position=event.position)
            self._admission.settle(step)
        else:
            self._gap(event.position, step)

    def _hear(self, marker: Marker, step: Step) -> None:
        if marker.log == self.pulse.stranger:  # its first message is kept; more markers say nothing new
            self.pulse.stranger_at = self._clock()
            self._admission.settle(step)
            return
        self._check_log(marker.log)
        self.pulse.marker_at = self._clock()
        self.pulse.marker = max(self.pulse.marker, marker.position)
        upto = max(marker.position, *marker.touched.values(), -1)
        if self._healing.under_way:
            self._gap(upto, step)
            return
        arrival = self._accepted.hear(marker.position, marker.base, marker.touched)
        if arrival is Arrival.GAP:
            self._gap(upto, step)
        else:
            self._admission.settle(step._replace(floor=marker.position) if arrival is Arrival.NEXT else step)

    def _gap(self, upto: int, step: Step) -> None:
        """Forget the message: the pass will find what it brought, and everything before it, in the log."""
        self._admission.settle(step)
        if upto > self._accepted.reached:
            self._healing.start(upto)

    def _check_log(self, log_id: UUID) -> None:
        if log_id != self._joined.lineage.log:
            self.pulse.stranger, self.pulse.stranger_at = log_id, self._clock()
            raise MalformedMessage(
                f"it belongs to log {log_id}, this service follows {self._joined.lineage.log}: a relay of another "
                "store publishes on this bus"
            )
