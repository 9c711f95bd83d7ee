"""The relay: every event of the log to the bus, in order, stamped so that services can prove that nothing is missing.

It may crash, repeat or compete with another: services recognise repetitions, and what it never sent they read from the
log. Leadership only saves work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog

from tidings._support.backoff import Backoff
from tidings._support.tasks import leaves, task_group
from tidings._support.telling import Telling
from tidings.buses import EventBus, Publisher
from tidings.errors import (
    BusError,
    BusUnavailable,
    MalformedMessage,
    PublishRejected,
    QueueRefused,
    StoreUnavailable,
    TopologyMismatch,
    Unroutable,
)
from tidings.protocol.message import Marker, encode
from tidings.protocol.position import CARRIED, Chain, Ticket, Window, carried
from tidings.protocol.seal import Seal
from tidings.relay.checkpoints import Checkpointed, checkpoint_stream, read_last, write_checkpoint
from tidings.relay.refusals import Queues, Refusals
from tidings.stores import MAX_POSITION, EventStore, RecordedEvent

__all__ = ["Relay"]

log = structlog.get_logger("tidings.relay")

WINDOW: Final = 256
"""Events in flight: beyond some hundreds more bring nothing."""
CHECKPOINT_SECONDS: Final = 1.0
MARKER_SECONDS: Final = 5.0
EMBEDDED_MARKERS: Final = 1.0
"""Within one process a marker costs next to nothing, and a service that starts late waits for one."""
RETRY_SECONDS: Final = (0.2, 1.5)
"""First and longest pause after an error."""
CONFIRM_SECONDS: Final = 30.0
"""A confirm that takes longer will not come: a queue without a leader swallows it, and says nothing."""
PARTING_SECONDS: Final = 0.5
"""Seconds that a relay which stops may take to record how far it has published."""
UNHEARD: Final = 4
"""Attempts, some two seconds, after which a relay that nobody listens to says so."""
REJECTIONS: Final = 3
"""Rejections of one event by the broker after which the relay leaves it to the healing pass."""


class Relay:
    """One is enough; several of one `name` take turns: the bus's lock says who leads."""

    def __init__(
        self,
        store: EventStore,
        bus: EventBus,
        *,
        name: str = "main",
        window: int = WINDOW,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        marker_seconds: float = MARKER_SECONDS,
        confirm_seconds: float = CONFIRM_SECONDS,
        needed: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
        seal: Seal | None = None,
        queues: Queues | None = None,
    ) -> None:
        """`needed` is false while nobody can hear it, because all services of this process stand by. What it publishes
        is sealed where there is a seal. `queues` returns the partitions of the services that it knows: among them it
        looks for a queue that refuses messages."""
        self.name = name
        self.stream = checkpoint_stream(name)
        self._store = store
        self._bus = bus
        self._window = window
        self._checkpoint_seconds = checkpoint_seconds
        self._marker_seconds = marker_seconds
        self._needed = needed
        self._clock = clock
        self.seal = seal
        self.confirm_seconds = confirm_seconds
        self._rejected: dict[int, int] = {}
        """Position to how often the bus refused the event."""
        self._careful_until = -1
        """Up to here one event at a time, so that a refusal can be told from its neighbours'."""
        self.confirmed = -1
        """Everything up to here was confirmed by the bus."""
        self.leading = False
        self.trouble_is_the_stores = False
        """What interrupted the relay last came from the store; else from the bus."""
        self.trouble: str | None = None
        """What interrupted the relay last; None while the bus confirms markers."""
        self._marked_at: float | None = None
        self._waiting_since: float | None = None
        self._log_id: UUID | None = None
        self._head = -1
        """A position that the log was seen to have."""
        self.refusals = Refusals(name, bus, queues, clock)
        """Queues that refuse what it publishes. The others get everything, and their services go on."""
        self._noted: str | None = None
        """What the stored checkpoint says of them."""
        self._telling = Telling(log, clock)
        self._turn: _Turn | None = None
        """While it leads."""

    @property
    def needed(self) -> bool:
        """Somebody may hear it; else it waits."""
        return self._needed()

    @property
    def marker_age(self) -> float | None:
        """Seconds since the bus confirmed a marker; None before the first. Over 30 is unhealthy for one that leads."""
        return None if self._marked_at is None else self._clock() - self._marked_at

    @property
    def waiting(self) -> float | None:
        """Seconds spent waiting for the connection or the lock, which another relay may hold; None when not."""
        return None if self._waiting_since is None else self._clock() - self._waiting_since

    async def run(self) -> None:
        """Until cancelled. Raises `ConfigurationError` and `TopologyMismatch`, which no waiting heals."""
        backoff, unheard = Backoff(*RETRY_SECONDS), 0
        while True:
            while not self._needed():
                self.trouble = None
                await asyncio.sleep(RETRY_SECONDS[0])
            began = self.confirmed
            try:
                await self._bus.provision()
                self._waiting_since = self._clock()
                async with self._bus.publisher(lock=self.name) as publisher:
                    self.leading, self._waiting_since = True, None
                    await self._lead(publisher)
            except (BusError, StoreUnavailable, BaseExceptionGroup) as error:
                causes = list(leaves(error))
                strange = [
                    cause
                    for cause in causes
                    if not isinstance(cause, BusError | StoreUnavailable) or isinstance(cause, TopologyMismatch)
                ]
                if strange:
                    raise strange[0] from None
                self.trouble = str(causes[0])
                self.trouble_is_the_stores = isinstance(causes[0], StoreUnavailable)
                if self.confirmed > began:
                    backoff.reset()
                    unheard = 0
                if isinstance(causes[0], Unroutable):
                    unheard += 1
                    if unheard == UNHEARD:  # services that start together with the relay need a moment
                        log.warning("relay.waiting_for_services", relay=self.name, reason=str(causes[0]))
                else:
                    self._telling.failed("relay.interrupted", causes[0], relay=self.name, pause=backoff.pause)
            finally:
                self.leading, self._waiting_since, self._turn = False, None, None
                self.refusals.forget()
            await backoff.wait()

    async def part(self) -> None:
        """Record how far it has published, and tell services, before it is cancelled: else operators see events that
        were published as not published, for as long as no relay runs. Gives up after `PARTING_SECONDS`."""
        turn = self._turn
        if turn is None:
            return
        with suppress(BusError, StoreUnavailable, TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                await turn.confirmed()
                if turn.carried:
                    turn.carried = False
                    await self._store_checkpoint(self.confirmed)
                    await turn.mark()
        log.info("relay.stopped", relay=self.name, published=self.confirmed)

    def marked(self) -> None:
        """The bus confirmed a marker: the way to it is open."""
        self._marked_at, self.trouble = self._clock(), None

    async def _start(self) -> int:
        """Return where the log was published up to; its end, when the checkpoint is above that."""
        stored, self._noted = await self.last()
        start, head = max(stored, self.confirmed), await self._store.head()
        self._head = head
        if start > head:
            self._beyond_the_log(start, head, "somebody else wrote the checkpoint, or a replica lags")
        return min(start, head)

    def _beyond_the_log(self, position: int, head: int, reason: str) -> None:
        advice = f"{reason}; it begins again at the end of the log, and services read from the log what they miss"
        log.error("relay.beyond_the_log", relay=self.name, checkpoint=position, head=head, advice=advice)

    async def _pass_by(self, turn: _Turn, position: int) -> None:
        """Nothing is to be carried up to here. Raises `StoreUnavailable` for a place that the log has not reached: the
        relay would publish nothing of what comes before it."""
        if position > self._head:
            self._head = await self._store.head()
            if position > self._head:
                self._beyond_the_log(position, self._head, "the store says that it looked further than its log goes")
                raise StoreUnavailable(
                    f"the store says that it looked at position {position}, its log ends at {self._head}"
                )
        turn.pass_by(position)

    async def _lead(self, publisher: Publisher) -> None:
        log_id = await self._store.log_id()
        if log_id != self._log_id:  # positions, and what was known of them, belong to one log
            self._log_id, self.confirmed, self._careful_until, self._head = log_id, -1, -1, -1
            self._rejected.clear()
        start = self.confirmed = await self._start()
        async with task_group() as tasks:
            turn = self._turn = _Turn(self, publisher, log_id, start)
            # The first marker tells services how far the log was published before: without it, the first event of
            # every bucket would look like a gap.
            await turn.mark()
            log.info("relay.leading", relay=self.name, log=str(log_id), after=start)
            self._telling.seems_over("relay.resumed", relay=self.name)
            tasks.create_task(self._beat(turn, tasks))
            tasks.create_task(turn.watch())
            async for item in self._store.subscribe_all(after=start, filter=CARRIED):
                if isinstance(item, RecordedEvent):
                    await self._forward(turn, item)
                else:
                    await self._pass_by(turn, item.position)
            raise StoreUnavailable("the store ended the relay's subscription: it was closed, or is going down")

    async def _forward(self, turn: _Turn, event: RecordedEvent) -> None:
        bucket = carried(event)
        if bucket is None:
            return
        if self._rejected.get(event.position, 0) >= REJECTIONS:
            self._leave_out(turn, event, bucket, "the bus refuses this event")
            return
        await turn.room(1 if event.position <= self._careful_until else self._window)
        try:
            await turn.send(event, bucket)
        except MalformedMessage as error:
            self._leave_out(turn, event, bucket, f"no service could read this event's message: {error}")

    def _leave_out(self, turn: _Turn, event: RecordedEvent, bucket: int, reason: str) -> None:
        if event.position > MAX_POSITION:
            raise StoreUnavailable(f"the store says that an event is at position {event.position}, and no log has that")
        log.error(
            "relay.left_out",
            relay=self.name,
            stream=event.stream,
            position=event.position,
            event_id=str(event.id),
            advice=f"{reason}; every service reads it from the log instead",
        )
        turn.leave_out(bucket, event.position)

    async def _beat(self, turn: _Turn, tasks: asyncio.TaskGroup) -> None:
        """Checkpoints and markers: after carried events at most so often, and a marker when nothing else moves."""
        stored, marked_at = turn.start, self._clock()
        looking: asyncio.Task[None] | None = None
        while True:
            await turn.moved(self._marker_seconds)
            if (self.confirmed > stored and turn.carried) or self.refusals.told != self._noted:
                turn.carried, stored = False, self.confirmed
                await self._store_checkpoint(stored)
            elif self._clock() - marked_at < self._marker_seconds:
                continue
            free = looking is None or looking.done()  # before the marker: it must lie between two looks
            refused = await turn.mark()
            marked_at = self._clock()
            if refused is not None and free:
                # Beside the markers, which everybody else waits for: a broker in trouble may take long to answer.
                looking = tasks.create_task(self.refusals.look(refused))
            await asyncio.sleep(self._checkpoint_seconds)

    def refused(self, position: int, sent_up_to: int) -> None:
        self._rejected[position] = self._rejected.get(position, 0) + 1
        self._careful_until = max(self._careful_until, sent_up_to)

    async def checkpoint(self) -> int:
        """The stored checkpoint, -1 when there is none. Raises `StoreUnavailable` for one that cannot be read."""
        return (await self.last()).position

    async def last(self) -> Checkpointed:
        """What was noted with the stored checkpoint. Raises as `checkpoint` does."""
        return await read_last(self._store, self.name)

    async def _store_checkpoint(self, position: int) -> None:
        refusing = self.refusals.told
        self._head = max(self._head, await write_checkpoint(self._store, self.name, position, refusing))
        self._noted = refusing


class _Turn:
    """One term of leadership on one connection: the chain, the window, and what they know together."""

    def __init__(self, relay: Relay, publisher: Publisher, log_id: UUID, start: int) -> None:
        self.start = start
        self.carried = False
        """An event was confirmed since the last checkpoint."""
        self._relay = relay
        self._publisher = publisher
        self._log_id = log_id
        self._chain = Chain(start)
        self._window: Window[tuple[int | None, int]] = Window()
        self._sent = start
        self._freed = asyncio.Event()
        self._moved = asyncio.Event()
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Why the first event that failed did; `watch` raises it."""

    async def room(self, window: int) -> None:
        while len(self._window) >= window:
            self._freed.clear()
            await self._freed.wait()

    async def confirmed(self) -> None:
        """Wait until everything that was sent by now is confirmed."""
        upto = self._sent
        while self._relay.confirmed < upto:
            self._freed.clear()
            await self._freed.wait()

    async def moved(self, seconds: float) -> None:
        """Wait until something was confirmed, but no longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._moved.wait()
        except TimeoutError:
            return
        self._moved.clear()

    async def send(self, event: RecordedEvent, bucket: int) -> None:
        """Return when the event went out; its confirm ends its place in the window, an error the turn.

        Raises `MalformedMessage` when its message is one that no service could read: nothing went out.
        """
        previous = self._chain.stamp(bucket, event.position)
        message = encode(event, log=self._log_id, previous=previous, bucket=bucket, seal=self._relay.seal)
        ticket = self._window.begin((bucket, event.position))
        self._sent = event.position
        try:
            confirm = await self._publisher.begin(message)
        except PublishRejected:
            self._relay.refused(event.position, self._sent)
            raise
        # A callback, because a task for each event took a quarter of the relay's time.
        confirm.add_done_callback(partial(self._confirmed, ticket, event.position))

    def _confirmed(self, ticket: Ticket[tuple[int | None, int]], position: int, confirm: asyncio.Future[Any]) -> None:
        if confirm.cancelled():
            return
        error = confirm.exception()
        if isinstance(error, QueueRefused):  # the other queues have it, and the service behind this one reads the log
            self._relay.refusals.refused(error)
            error = None
        if error is None:
            self._end(ticket)
            return
        if isinstance(error, PublishRejected):
            self._relay.refused(position, self._sent)
        if not self._failed.done():
            self._failed.set_result(error)

    def leave_out(self, bucket: int, position: int) -> None:
        self._chain.stamp(bucket, position)
        self._end(self._window.begin((bucket, position)))

    def pass_by(self, position: int) -> None:
        """Nothing to carry up to here."""
        self._end(self._window.begin((None, position)))

    def _end(self, ticket: Ticket[tuple[int | None, int]]) -> None:
        ticket.done = True
        for bucket, position in self._window.pop():
            if bucket is not None:
                self._chain.confirm(bucket, position)
                self.carried = True
            self._relay.confirmed = max(self._relay.confirmed, position)
        self._freed.set()
        if self.carried:
            self._moved.set()

    async def mark(self) -> QueueRefused | None:
        """Send a marker. Return what a queue has against it; every other queue took it."""
        position, refused = self._relay.confirmed, None
        base, touched = self._chain.mark(position)
        marker = Marker(self._log_id, position, base, touched).encode(self._relay.seal)
        try:
            async with asyncio.timeout(self._relay.confirm_seconds):
                await self._publisher.send(marker)
        except TimeoutError as error:
            raise self._unconfirmed("the marker") from error
        except QueueRefused as error:
            refused = error
            self._relay.refusals.refused(error)
        else:
            self._relay.refusals.taken()
        self._relay.marked()
        return refused

    async def watch(self) -> None:
        """Raise when an event failed, or its confirm does not come. One look at the oldest in each `confirm_seconds`
        finds it before it is twice as old, and costs nothing per event."""
        while True:
            oldest = self._window.oldest
            await asyncio.wait([self._failed], timeout=self._relay.confirm_seconds)
            if self._failed.done():
                raise self._failed.result()
            if oldest is not None and not oldest.done:
                raise self._unconfirmed("the event")

    def _unconfirmed(self, what: str) -> BusUnavailable:
        after = self._relay.confirmed
        return BusUnavailable(
            f"{what} after position {after} was not confirmed within {self._relay.confirm_seconds:g} s. Is the "
            "broker out of memory or disk (it then blocks publishers), or a queue of a service without a leader "
            "(look at its state; a queue may be deleted: its service reads what it held from the log)?"
        )
