"""From the bus to the lanes: read each message, refuse what is beyond the log, accept what is next, drop duplicates,
start a pass at a gap.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from tidings._support.backoff import Backoff
from tidings._support.tasks import supervised
from tidings._support.telling import Telling
from tidings.buses import Consumer, Delivery, Subscription
from tidings.database.dead_letters import Letter
from tidings.delivery.head_check import HeadCheck
from tidings.delivery.healing import Pass
from tidings.delivery.inflight import Step
from tidings.delivery.news import News
from tidings.delivery.own_clock import OwnClock
from tidings.delivery.pipeline import Pipeline
from tidings.delivery.site import Joined
from tidings.errors import BusUnavailable, DatabaseUnavailable, Fenced, MalformedMessage
from tidings.protocol.message import MARKER, Marker, Message, Stamped, decode
from tidings.protocol.position import Accepted, Arrival

__all__ = ["Intake", "Pulse"]

log = structlog.get_logger("tidings.intake")

RECONNECT_SECONDS: Final = (0.2, 1.5)
"""First and longest pause between attempts to reach the bus."""
SILENCE_SECONDS: Final = 10.0
"""Without a marker for so long: see whether the queue still is bound."""
REFUSAL_SECONDS: Final = 10.0
"""Seconds between two warnings about messages that are refused."""


class _Unsealed(NamedTuple):
    """A message that nobody has published who has the key."""

    message: Message


class _Unreadable(NamedTuple):
    """A message that is not ours, and why."""

    message: Message
    reason: str


class Pulse:
    """What was heard on the bus, and when: for answers about health."""

    def __init__(self) -> None:
        self.marker_at: float | None = None
        """When the last marker of a relay at work was heard, by the site's clock: the pulse of the whole path."""
        self.marker = -1
        """What the last marker said."""
        self.connected = False
        self.stranger: UUID | None = None
        """Another log, whose relay publishes on this bus."""
        self.stranger_at: float | None = None
        """When something of it came last, by the site's clock."""
        self.news = News()
        """What was new of what was taken."""
        self.heard = 0
        """Messages that were taken: not those that were refused."""
        self.trouble: str | None = None
        """What the bus answered last instead of messages; None while it is connected."""
        self.refused = 0
        """Messages that claimed a position beyond the log, had no seal though there is a key, or could not be read."""
        self.refusal = ""
        """The last of them."""
        self.refused_at: float | None = None
        """When it came, by the site's clock."""
        self.chosen = False
        """The bus has given this process something on this connection, or nobody else is there to be given it."""

    def strange(self, said: UUID, own: UUID, now: float) -> MalformedMessage:
        """Note that a message of another log came. Return what is wrong with it."""
        self.stranger, self.stranger_at = said, now
        return MalformedMessage(
            f"it belongs to log {said}, this service follows {own}: a relay of another store publishes on this bus"
        )


class Intake:
    """Comes back to the bus by itself: what was accepted stays accepted, and what comes again is dropped."""

    def __init__(
        self,
        subscription: Subscription,
        joined: Joined,
        accepted: Accepted,
        pipeline: Pipeline,
        healing: Pass,
        head: int,
    ) -> None:
        """`head`: a position that the log was seen to have."""
        self._subscription = subscription
        assert joined.site.bus is not None
        self._bus = joined.site.bus
        self._joined = joined
        self._accepted = accepted
        self._pipeline = pipeline
        self._admission = pipeline.admission
        self._healing = healing
        self.pulse = Pulse()
        self._holding = asyncio.Event()
        self._choosing = asyncio.Lock()
        self.own_clock = OwnClock(subscription, joined, accepted, pipeline, healing, self.pulse.news)
        self._heads: HeadCheck[tuple[_Said, Step]]
        self._heads = HeadCheck(joined.site.store, head, subscription.service)

    @property
    def reached(self) -> int:
        """Everything at or below this position was accepted."""
        return self._accepted.reached

    def hold(self) -> None:
        """Take nothing more, and keep the connection: nobody else is given the queue before `run` is cancelled."""
        self._holding.set()

    async def run(self) -> None:
        """Until cancelled. Raises `TopologyMismatch` and `ConfigurationError`, which no waiting heals, and `Fenced`."""
        backoff, telling = Backoff(*RECONNECT_SECONDS), Telling(log, self._joined.site.clock)
        while True:
            try:
                await self._provision()
                async with self._bus.consume(
                    self._subscription, prefetch=self._joined.site.service.prefetch
                ) as consumer:
                    log.info("service.connected", service=self._subscription.service, queue=self._subscription.queue)
                    self.pulse.connected, self.pulse.marker_at, self.pulse.trouble = True, None, None
                    self.pulse.chosen = False
                    self.pulse.news.begin(self.reached)
                    self.own_clock.begin()
                    backoff.reset()
                    telling.seems_over("bus.regained", service=self._subscription.service)
                    async with supervised(self._stay_bound()), supervised(self._take_what_waited()):
                        async for delivery in consumer:
                            if not self.pulse.chosen and not self._holding.is_set():
                                await self._take_over()
                            if self._holding.is_set():
                                await asyncio.Event().wait()
                            self.take(consumer, delivery)
                raise BusUnavailable(f"queue {self._subscription.queue!r}: the bus ended the deliveries")
            except BusUnavailable as error:
                self.pulse.trouble = str(error)
                what = "bus.lost" if self.pulse.connected else "bus.unreachable"
                telling.failed(what, error, service=self._subscription.service, next_attempt_in=backoff.pause)
            finally:
                self._heads.forget()
                self.pulse.connected = False
                self._pipeline.takeover.stand_by()
            await backoff.wait()

    async def _provision(self) -> None:
        """Make the queue where there is none. Raises `Fenced` where the service was resized: whoever heard of that has
        taken the queue away, and nobody would take it away again."""
        with suppress(DatabaseUnavailable):  # an outage of the database alone ends nothing that is at work
            await self._joined.inbox.check_layout()
        await self._bus.provision(self._subscription)

    async def _stay_bound(self) -> None:
        """Bind the queue again while no marker comes: when somebody unbinds it, or deletes the exchange, which the
        relay makes anew without bindings, no bus tells a consumer. Raises `TopologyMismatch`."""
        telling = Telling(log, self._joined.site.clock)
        while True:
            await asyncio.sleep(SILENCE_SECONDS / 2)
            if self.pulse.marker_at is None or self._joined.site.clock() - self.pulse.marker_at >= SILENCE_SECONDS:
                try:
                    await self._provision()
                except BusUnavailable as error:  # what was connected before may still be: its own loss ends it
                    telling.failed("bus.silent", error, service=self._subscription.service)
            upto = await self.own_clock.due(chosen=self.pulse.chosen)
            if upto is not None and not self._holding.is_set():
                await self._take_over(unless_at_work=not self.own_clock.counts)
                if not self._holding.is_set():
                    self._healing.start(upto)

    async def _take_over(self, *, unless_at_work: bool = False) -> None:
        """Once on each connection, before anything is taken: of all processes of the service, this is the one at work,
        because the bus gives it something, or nobody else is there to be given it.

        What a standby knew when it joined may be long ago. Its first commit would be fenced, but what its handlers do
        outside of the database would be done again before that: so it joins again, in its place in the line. With
        work of an earlier connection at hand it cannot; where another process has done more since, it raises `Fenced`.
        With `unless_at_work` also if another one is noted as being at work, whatever it has done.
        """
        service = self._subscription.service
        async with self._choosing:
            if self.pulse.chosen:
                return
            floor = self._pipeline.floor
            if self._pipeline.idle and not self._healing.under_way:
                remembered = await self._joined.inbox.join()
                self._accepted.begin(remembered.floor, remembered.watermarks)
                self.pulse.news.begin(self.reached)
                await self._pipeline.takeover.resume(remembered)
            elif (settled := await self._joined.inbox.read_floor()) > floor:
                raise Fenced(
                    f"service {service!r}: taking over from another process, which has settled everything up to "
                    f"position {settled}; this one knew of position {floor}"
                )
            await self._pipeline.takeover.take_over(unless_at_work=unless_at_work)
            self.pulse.chosen = True
        log.info("service.consuming", service=service, queue=self._subscription.queue)

    def take(self, consumer: Consumer, delivery: Delivery) -> None:
        """One delivery: accepted, dropped, refused, or recorded as dead; it never raises for what a message says."""
        step = Step(consumer, delivery.tag)
        said = self._read(delivery.message)
        # Another log's message is refused for that, whatever position it names.
        claim = -1 if isinstance(said, Marker) and said.log != self._joined.lineage.log else _furthest(said)
        if self._heads.knows(claim):
            self._go_on(said, step)
        else:
            self._heads.keep(claim, (said, step))

    def _read(self, message: Message) -> _Said:
        seal = self._joined.site.trust.seal
        if seal is not None and not seal.holds(message.type, message.content_type, message.headers, message.body):
            return _Unsealed(message)
        own = self._joined.lineage.log
        try:
            if message.type == MARKER and "tidings-position" not in message.headers:
                marker = Marker.decode(message)
                if marker.log not in (own, self.pulse.stranger):  # the first is kept; more markers say nothing new
                    raise self.pulse.strange(marker.log, own, self._joined.site.clock())
                return marker
            stamped = decode(message)
            if stamped.log != own:
                raise self.pulse.strange(stamped.log, own, self._joined.site.clock())
            return stamped
        except MalformedMessage as error:
            return _Unreadable(message, str(error))

    async def _take_what_waited(self) -> None:
        while True:
            for (said, step), reached in await self._heads.rule():
                if self._holding.is_set():
                    return
                if reached:
                    self._go_on(said, step)
                else:
                    claim = f"position {_furthest(said)}, the log ends at {self._heads.head}"
                    self._refuse(f"{_named(said)} claims {claim}", step)

    def _go_on(self, said: _Said, step: Step) -> None:
        if isinstance(said, _Unsealed):
            self._refuse(f"{_named(said)} has no seal of TIDINGS_BUS_KEYS", step)
            return
        self.pulse.heard += 1
        if isinstance(said, Stamped):
            self._offer(said, step)
        elif isinstance(said, Marker):
            self._hear(said, step)
        elif self._joined.site.trust.content and self._joined.site.memory.unreadable.take(len(said.message.body)):
            self._admission.bury(Letter.of_message(said.message, f"MalformedMessage: {said.reason}"), step)
        else:  # what the log holds is not lost with it: the next marker shows the gap
            self._refuse(f"{_named(said)} cannot be read: {said.reason}", step)

    def _refuse(self, reason: str, step: Step) -> None:
        """Drop a message that is not of this log's relay. If it is, the next marker shows the gap."""
        pulse, now = self.pulse, self._joined.site.clock()
        pulse.refusal = reason
        pulse.refused += 1
        if pulse.refused_at is None or now - pulse.refused_at >= REFUSAL_SECONDS:
            log.warning(
                "message.refused",
                service=self._subscription.service,
                queue=self._subscription.queue,
                reason=reason,
                refused=pulse.refused,
                advice="somebody other than this log's relay publishes on the bus, or a relay runs on a copy of the "
                "log, or with other keys. What the log holds is handled when the next marker of its own relay comes",
            )
        pulse.refused_at = now
        self._admission.settle(step)

    def _offer(self, stamped: Stamped, step: Step) -> None:
        event = stamped.event
        self.pulse.news.hear(event.position, self._joined.site.clock())
        if self._healing.under_way or not self._joined.site.trust.content:
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
        if marker.log != self._joined.lineage.log:  # not `stranger`: another one may have come while this one waited
            self.pulse.stranger_at = self._joined.site.clock()
            self._admission.settle(step)
            return
        now = self._joined.site.clock()
        self.pulse.news.hear(marker.position, now)
        if self.pulse.news.current(marker.position):
            self.pulse.marker_at = now
        self.pulse.marker = max(self.pulse.marker, marker.position)
        upto = max(marker.position, *marker.touched.values(), -1)
        if self._healing.under_way or not self._joined.site.trust.content:
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


_Said = Stamped | Marker | _Unsealed | _Unreadable
"""What became of reading a message."""


def _furthest(said: _Said) -> int:
    """Return the highest position that a message speaks of; -1 for one that is not believed anyway."""
    if isinstance(said, Stamped):
        return said.event.position
    if isinstance(said, Marker):
        return max(said.position, said.base, *said.touched.values())
    return -1


def _named(said: _Said) -> str:
    if isinstance(said, Stamped):
        return f"event {said.event.id} of stream {said.event.stream!r}"
    if isinstance(said, Marker):
        return "a marker"
    return f"a message of type {said.message.type[:80]!r} with id {said.message.message_id[:80]!r}"
