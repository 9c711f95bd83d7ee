"""The simulated broker: queues that lose, repeat and reorder, connections that break, and locks that are given twice.

It keeps the rules of `tidings.buses` where no fault was decided; what it does to a message depends on the seed alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from typing import Any, Final

from tidings.buses import Delivery, Subscription, TopologyItem
from tidings.errors import BusError, BusUnavailable, QueueRefused, Unroutable
from tidings.protocol.message import MARKER, Message
from tidings.testing.simulation.dice import Dice
from tidings.testing.simulation.loop import Process, SimulatedLoop

__all__ = ["SimulatedBroker", "SimulatedBus"]

FATES: Final = ("is lost", "is there twice", "stands before others")
WEATHER: Final = (0.01, 0.06, 0.25)
"""Probabilities of each fate of a message. A world has one of them."""
BEHIND: Final = 0.3
"""Probability that messages which are delivered again come after the others, as they may in a quorum queue."""
TRAVEL: Final = 0.002
"""Seconds that a message takes from one end of a connection to the other."""
BROKERS: Final = Context()
"""No process's: what is on its way arrives whatever becomes of its sender."""


def named(message: Message) -> str:
    """Name a message in the story."""
    if message.type == MARKER:
        return f"marker {message.message_id.rpartition('-')[2]}"
    return str(message.headers["tidings-position"])


class _Queue:
    """Waiting messages, and consumers in the order in which they came: the first is the active one."""

    def __init__(self, name: str, buckets: range) -> None:
        self.name = name
        self.buckets = buckets
        self.ready: deque[Message] = deque()
        self.consumers: list[_Consumer] = []

    def pump(self) -> None:
        while self.ready and self.consumers and self.consumers[0].room:
            self.consumers[0].deliver(self.ready.popleft())


class SimulatedBroker:
    """The broker that all processes share."""

    def __init__(self, loop: SimulatedLoop, dice: Dice, tell: Callable[..., None]) -> None:
        self.loop = loop
        self.dice = dice
        self.tell = tell
        self.weather = WEATHER[int(dice.chance("weather") * len(WEATHER))]
        self.calm = False
        """The broker has no more faults of its own."""
        self.queues: dict[str, _Queue] = {}
        self.connections: list[_Connection] = []
        self.locks: dict[str, _Connection] = {}
        self.lock_freed = asyncio.Event()
        self.published: Counter[int] = Counter()
        """Position to the number of messages that were sent with it."""
        self.markers = 0
        self.refusing: dict[str, float] = {}
        """Queue to the time until which it refuses every message."""
        self._copies: Counter[str] = Counter()

    def cut(self, process: Process | None) -> None:
        """Break the connections of a process, or all with None."""
        for connection in list(self.connections):
            if process is None or connection.process is process:
                connection.lose("the connection broke")

    def delete(self, name: str) -> None:
        """Delete a queue and end its consumers."""
        queue = self.queues.pop(name, None)
        for consumer in list(queue.consumers) if queue is not None else ():
            consumer.lose("the queue was deleted")

    def forget_locks(self) -> None:
        """Forget who holds which lock: another process gets it while its holder goes on."""
        self.locks.clear()
        self.free_locks()

    def free_locks(self) -> None:
        """Wake everyone who waits for a lock."""
        self.lock_freed.set()
        self.lock_freed = asyncio.Event()

    def publish(self, message: Message) -> BusError | None:
        """Put a message into every queue of its bucket. Return what its sender is told instead of a confirm."""
        if not self.queues:
            return Unroutable("tidings.events", message.message_id)
        if message.type == MARKER:
            self.markers += 1
        else:
            self.published[message.headers["tidings-position"]] += 1
        refused = None
        for queue in list(self.queues.values()):
            if message.bucket is None or message.bucket in queue.buckets:
                if self.refusing.get(queue.name, 0.0) > self.loop.time():
                    refused = QueueRefused(f"a queue refuses messages. It is {queue.name}")
                    self.tell("broker", f"{queue.name} refuses {named(message)}")
                    continue
                self._push(queue, message)
                queue.pump()
        return refused

    def _push(self, queue: _Queue, message: Message) -> None:
        what, ready = named(message), queue.ready
        self._copies[f"{queue.name}/{what}"] += 1
        name = f"fate of {what} for {queue.name}/{self._copies[f'{queue.name}/{what}']}"
        fate = 3 if self.calm else int(self.dice.chance(name) / self.weather)
        if fate > 2 or (fate == 2 and not ready) or not self.dice.allows(name):
            ready.append(message)
            return
        self.tell("broker", f"{what} for {queue.name} {FATES[fate]}")
        if fate == 1:
            ready.append(message)
        if fate:
            ready.insert(int(self.dice.chance(f"{name}/where") * len(ready)), message)

    def requeue(self, queue: _Queue, messages: list[Message]) -> None:
        """Put messages that were not settled back into the queue."""
        if messages and self.queues.get(queue.name) is queue:
            name = f"requeue {queue.name}/{named(messages[0])}"
            if not self.calm and self.dice.chance(name) < BEHIND and self.dice.allows(name):
                self.tell("broker", f"puts {', '.join(map(named, messages))} back into {queue.name}, behind the rest")
                queue.ready.extend(messages)
            else:
                queue.ready.extendleft(reversed(messages))
        queue.pump()


class _Connection:
    """A connection that can break. The client notices at its next call."""

    def __init__(self, broker: SimulatedBroker, process: Process) -> None:
        self.broker = broker
        self.process = process
        self.lost: str | None = None
        broker.connections.append(self)

    def lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self.broker.connections.remove(self)
            for name, holder in list(self.broker.locks.items()):
                if holder is self:
                    del self.broker.locks[name]
            self.broker.free_locks()  # also wakes those whose own connection this is


class _Publisher(_Connection):
    swallows = False
    """The broker accepts messages and confirms none."""

    def __init__(self, broker: SimulatedBroker, process: Process) -> None:
        super().__init__(broker, process)
        self._arrives = 0.0
        self._sent = 0
        self._unconfirmed: dict[asyncio.Future[Any], None] = {}

    async def send(self, message: Message) -> None:
        await (await self.begin(message))

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        process, loop = self.process, self.broker.loop
        process.spring("publish")
        if process.paused or process.dead or process.chance(0.05):
            await process.io("slow publish")
        if self.lost is not None:
            raise BusUnavailable(self.lost)
        confirmed = loop.create_future()
        self._unconfirmed[confirmed] = None
        self._sent += 1
        # It arrives even if its sender is killed or paused by then, unless the connection breaks first.
        self._arrives = max(self._arrives, loop.time() + TRAVEL * process.seconds() / 0.002)
        loop.call_at(self._arrives, self._arrive, message, confirmed, context=BROKERS)
        return confirmed

    def _arrive(self, message: Message, confirmed: asyncio.Future[Any]) -> None:
        broker = self.broker
        if self.lost is not None and broker.dice.chance(f"on its way {self.process}/{self._sent}") < 0.5:
            return
        error = broker.publish(message)
        if isinstance(error, Unroutable):
            self._settle(confirmed, error)
            return
        if message.type == MARKER:
            broker.tell(self.process, f"published {named(message)} {message.body.decode()}")
        else:
            broker.tell(
                self.process, f"published {named(message)} (the one before it is {message.headers['tidings-previous']})"
            )
        if not self.swallows:
            broker.loop.call_later(TRAVEL, self._settle, confirmed, error)

    def _settle(self, confirmed: asyncio.Future[Any], error: Exception | None) -> None:
        self._unconfirmed.pop(confirmed, None)
        if confirmed.done():
            return
        if error is None:
            confirmed.set_result(None)
        else:
            confirmed.set_exception(error)
            confirmed.exception()  # marks it as seen: the task that waits for it may be dead

    def lose(self, reason: str) -> None:
        super().lose(reason)
        for confirmed in list(self._unconfirmed):
            self._settle(confirmed, BusUnavailable(reason))


class _Consumer(_Connection):
    def __init__(self, broker: SimulatedBroker, process: Process, queue: _Queue, prefetch: int) -> None:
        super().__init__(broker, process)
        self._queue = queue
        self._prefetch = prefetch
        self._given = 0
        self._unsettled: deque[Delivery] = deque()
        self._arrived: deque[Delivery] = deque()
        self._waiter: asyncio.Future[None] | None = None
        queue.consumers.append(self)

    @property
    def room(self) -> bool:
        return len(self._unsettled) < self._prefetch

    def deliver(self, message: Message) -> None:
        self._given += 1
        delivery = Delivery(self._given, message)
        self._unsettled.append(delivery)
        self.broker.loop.call_later(TRAVEL, self._arrive, delivery, context=BROKERS)

    def _arrive(self, delivery: Delivery) -> None:
        self._arrived.append(delivery)
        self._wake()

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        process = self.process
        process.spring("take")
        if process.paused or process.dead or process.chance(0.05):
            await process.io("slow take")
        while not self._arrived:
            if self.lost is not None:
                raise BusUnavailable(self.lost)
            self._waiter = self.broker.loop.create_future()
            await self._waiter
        # Deliveries that have arrived are usable even after the connection is lost.
        return self._arrived.popleft()

    def settle_through(self, tag: int) -> None:
        if self.lost is None and not self.process.gone:
            while self._unsettled and self._unsettled[0].tag <= tag:
                self._unsettled.popleft()
            self._queue.pump()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        super().lose(reason)
        self._queue.consumers.remove(self)
        back = [delivery.message for delivery in self._unsettled]
        self._unsettled.clear()
        self.broker.requeue(self._queue, back)
        self._wake()


class SimulatedBus:
    """The bus as one process sees it."""

    counts_all_consumers: Final = True

    def __init__(self, broker: SimulatedBroker, process: Process) -> None:
        self._broker = broker
        self._process = process

    async def provision(self, subscription: Subscription | None = None) -> None:
        """See `EventBus.provision`."""
        await self._process.io("provision")
        if subscription is not None and subscription.queue not in self._broker.queues:
            self._broker.queues[subscription.queue] = _Queue(subscription.queue, subscription.buckets)

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        """See `EventBus.delete`."""
        await self._process.io("delete")
        for subscription in subscriptions:
            self._broker.delete(subscription.queue)

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """See `EventBus.inspect`."""
        await self._process.io("inspect")
        found = []
        for each in subscriptions:
            queue = self._broker.queues.get(each.queue)
            if queue is None:
                found.append(TopologyItem("queue", each.queue, "missing"))
            else:
                found.append(TopologyItem("queue", each.queue, "fits", "", len(queue.ready), len(queue.consumers)))
        return found

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[_Publisher]:
        """See `EventBus.publisher`."""
        broker, process = self._broker, self._process
        await process.io("connect")
        connection = _Publisher(broker, process)
        with _open(connection):
            if lock is not None:
                while lock in broker.locks:
                    await broker.lock_freed.wait()
                    await process.io("lock")
                    if connection.lost is not None:
                        raise BusUnavailable(connection.lost)
                broker.locks[lock] = connection
                broker.tell(process, "leads")
            yield connection

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[_Consumer]:
        """See `EventBus.consume`."""
        await self._process.io("connect")
        queue = self._broker.queues.get(subscription.queue)
        if queue is None:
            raise BusUnavailable(f"queue {subscription.queue!r} does not exist")
        with _open(_Consumer(self._broker, self._process, queue, prefetch)) as consumer:
            queue.pump()
            yield consumer

    async def close(self) -> None:
        """Break all connections of this process."""
        self._broker.cut(self._process)


@contextmanager
def _open(connection: Any) -> Iterator[Any]:
    try:
        yield connection
    finally:
        connection.lose("closed")
