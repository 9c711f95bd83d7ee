"""The embedded bus: queues in this process, shared by name while anybody has them open. Never on disk or network.

Everything of one name is gone when its last user closes it, so it suits one process: trying things out, tests, and a
whole system on one machine whose log is durable (what the queues lose, services read from the log).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import structlog

from tidings.buses import Delivery, Subscription, TopologyItem
from tidings.errors import BusUnavailable, ConfigurationError, QueueRefused, TopologyMismatch, Unroutable
from tidings.protocol.message import Message
from tidings.protocol.position import ALL_BUCKETS

__all__ = ["QUEUE_LIMIT", "MemoryBus", "open_memory"]

QUEUE_LIMIT: Final = 1_000_000
"""Messages in one queue; beyond it the oldest is dropped (drop-head), which its service sees as a gap."""

_EXCHANGE: Final = "tidings.events"
_TURN: Final = 64
"""Messages after which a sender or consumer lets other tasks run, because nothing here ever waits for a network."""

log = structlog.get_logger(__name__)

Tamper = Callable[[str, Message], Iterable[Message]]
"""Given a queue's name and a message, what the queue gets instead: nothing, the message, several."""


class _Connection(Protocol):
    def lose(self, reason: str) -> None: ...


class _Queue:
    """Waiting messages, and consumers in the order in which they came: the first is the active one."""

    def __init__(self, name: str, limit: int, *, foreign: bool = False) -> None:
        self.name = name
        self.limit = limit
        self.foreign = foreign
        self.refuses = False
        """It takes nothing, as a full queue of a broker may."""
        self.buckets: set[int] = set()
        """Bound to the events of these, and to markers."""
        self.ready: deque[Message] = deque()
        self.consumers: deque[_Consumer] = deque()

    def push(self, message: Message) -> None:
        self.ready.append(message)
        if len(self.ready) > self.limit:
            self.ready.popleft()
        if self.consumers:
            self.consumers[0].wake()


class _Broker:
    """What all buses of one name share."""

    def __init__(self) -> None:
        self.users = 0
        self.queues: dict[str, _Queue] = {}
        self.locks: dict[str, asyncio.Lock] = {}
        self.connections: dict[_Connection, None] = {}
        self.sent = 0
        self.tamper: Tamper | None = None


_BROKERS: Final[dict[str, _Broker]] = {}


class _Publisher:
    def __init__(self, broker: _Broker, lock: asyncio.Lock | None) -> None:
        self._broker = broker
        self._lock = lock
        self._lost: str | None = None

    async def send(self, message: Message) -> None:
        await (await self.begin(message))

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        broker = self._broker
        if self._lost is not None:
            raise BusUnavailable(self._lost)
        bucket = message.bucket
        queues = [queue for queue in broker.queues.values() if bucket is None or bucket in queue.buckets]
        if not queues:
            raise Unroutable(_EXCHANGE, message.message_id)
        refusing = [queue.name for queue in queues if queue.refuses]
        for queue in queues:
            if queue.refuses:
                continue
            if broker.tamper is None:
                queue.push(message)
            else:
                for instead in broker.tamper(queue.name, message):
                    queue.push(instead)
        broker.sent += 1
        if broker.sent % _TURN == 0:
            await asyncio.sleep(0)
        confirmed = asyncio.get_running_loop().create_future()
        if refusing:
            confirmed.set_exception(QueueRefused(f"a queue refuses messages. It is {refusing[0]!r}, told to refuse"))
        else:
            confirmed.set_result(None)
        return confirmed

    def lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            if self._lock is not None:
                self._lock.release()


class _Consumer:
    def __init__(self, queue: _Queue, prefetch: int) -> None:
        self._queue = queue
        self._prefetch = prefetch
        self._unsettled: deque[Delivery] = deque()
        self._given = 0
        self._waiter: asyncio.Future[None] | None = None
        self._lost: str | None = None
        queue.consumers.append(self)

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        queue = self._queue
        if self._given % _TURN == _TURN - 1:
            await asyncio.sleep(0)
        while self._lost is None:
            if queue.ready and queue.consumers[0] is self and len(self._unsettled) < self._prefetch:
                self._given += 1
                delivery = Delivery(self._given, queue.ready.popleft())
                self._unsettled.append(delivery)
                return delivery
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise BusUnavailable(self._lost)

    def settle_through(self, tag: int) -> None:
        unsettled = self._unsettled
        while unsettled and unsettled[0].tag <= tag:
            unsettled.popleft()
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lose(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        queue = self._queue
        queue.consumers.remove(self)
        queue.ready.extendleft(delivery.message for delivery in reversed(self._unsettled))
        self._unsettled.clear()
        self.wake()
        if queue.consumers:
            queue.consumers[0].wake()


class MemoryBus:
    """An `EventBus` within the process. The methods after `close` let tests misbehave as a broker can."""

    within_process: Final = True
    """No other process can reach it: it cannot say which of several processes of a service is at work."""
    counts_all_consumers: Final = True
    """As `CountsConsumers` says."""

    def __init__(self, name: str, limit: int = QUEUE_LIMIT) -> None:
        self._name = name
        self._limit = limit
        self._broker = _BROKERS.setdefault(name, _Broker())
        self._broker.users += 1
        self._open: dict[_Connection, None] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"MemoryBus(memory://{self._name})"

    async def provision(self, subscription: Subscription | None = None) -> None:
        self._check_open()
        if subscription is None:
            return
        queue = self._broker.queues.setdefault(subscription.queue, _Queue(subscription.queue, self._limit))
        if queue.foreign:
            raise TopologyMismatch(self._foreign(queue))
        queue.buckets.update(subscription.buckets)

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        self._check_open()
        for subscription in subscriptions:
            self.delete_queue(subscription.queue)

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        self._check_open()
        found = [TopologyItem("exchange", _EXCHANGE, "fits")]
        for subscription in subscriptions:
            queue = self._broker.queues.get(subscription.queue)
            if queue is None:
                found.append(TopologyItem("queue", subscription.queue, "missing"))
                continue
            counts = len(queue.ready), len(queue.consumers)
            if queue.foreign:
                found.append(TopologyItem("queue", queue.name, "differs", self._foreign(queue), *counts))
            else:
                found.append(TopologyItem("queue", queue.name, "fits", "", *counts))
        return found

    def _foreign(self, queue: _Queue) -> str:
        return (
            f"queue {queue.name!r} of memory://{self._name} exists, but was not made by Tidings. Delete it "
            "(delete_queue) and start the service again: the log brings what it held."
        )

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[_Publisher]:
        self._check_open()
        held = None
        if lock is not None:
            held = self._broker.locks.setdefault(lock, asyncio.Lock())
            if held.locked():
                log.info("bus.lock_waiting", lock=lock, bus=f"memory://{self._name}")
            await held.acquire()
            if self._closed:
                held.release()
                self._check_open()
        publisher = _Publisher(self._broker, held)
        with self._connected(publisher):
            yield publisher

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[_Consumer]:
        self._check_open()
        queue = self._broker.queues.get(subscription.queue)
        if queue is None:
            raise BusUnavailable(
                f"queue {subscription.queue!r} of memory://{self._name} does not exist: provision the service first"
            )
        consumer = _Consumer(queue, prefetch)
        with self._connected(consumer):
            yield consumer

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for connection in list(self._open):
            connection.lose(f"the bus memory://{self._name} was closed")
        self._broker.users -= 1
        if self._broker.users == 0:
            del _BROKERS[self._name]

    # ---- for tests: what a broker, or an operator of one, can do to its users ----------

    def queued(self, name: str) -> int:
        """Messages that wait in queue `name`, without those delivered and unsettled."""
        return len(self._broker.queues[name].ready)

    def bindings(self) -> dict[str, set[int]]:
        """Queue to the buckets whose events it gets."""
        return {name: set(queue.buckets) for name, queue in self._broker.queues.items()}

    def purge(self, name: str) -> None:
        """Lose everything that waits in queue `name`."""
        self._broker.queues[name].ready.clear()

    def delete_queue(self, name: str) -> None:
        """Delete queue `name`, if there is one, with its messages; its consumers get `BusUnavailable`."""
        queue = self._broker.queues.pop(name, None)
        for consumer in list(queue.consumers) if queue is not None else ():
            consumer.lose(f"queue {name!r} of memory://{self._name} was deleted")

    def drop_connections(self) -> None:
        """Cut all publishers and consumers of this name: locks are lost, and what is unsettled comes again."""
        for connection in list(self._broker.connections):
            connection.lose(f"a connection to memory://{self._name} was dropped")

    def occupy(self, name: str) -> None:
        """Make a queue as somebody else would, which `provision` must refuse."""
        self._broker.queues[name] = _Queue(name, self._limit, foreign=True)

    def refuse(self, name: str, refuses: bool = True) -> None:
        """From now on let a queue refuse what is sent; made, and bound to all events, where there is none. Or let it
        take messages again."""
        if name not in self._broker.queues:
            self._broker.queues[name] = _Queue(name, self._limit, foreign=True)
            self._broker.queues[name].buckets.update(ALL_BUCKETS)
        self._broker.queues[name].refuses = refuses

    def repeat(self, message: Message) -> None:
        """Put a message into the queues of its bucket once more."""
        for queue in self._broker.queues.values():
            if message.bucket is None or message.bucket in queue.buckets:
                queue.push(message)

    def tamper(self, with_: Tamper | None) -> None:
        """From now on let `with_(queue, message)` say what a queue gets of each message sent; None ends it."""
        self._broker.tamper = with_

    # ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise BusUnavailable(f"the bus memory://{self._name} is closed")

    @contextmanager
    def _connected(self, connection: _Connection) -> Iterator[None]:
        self._open[connection] = self._broker.connections[connection] = None
        try:
            yield
        finally:
            connection.lose("this connection was closed")
            del self._open[connection], self._broker.connections[connection]


async def open_memory(url: str) -> MemoryBus:
    """The bus `memory://name`; without a name, the one called "". Raises `ConfigurationError` for anything more."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigurationError(f"{url!r} is no memory bus: {error}") from None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigurationError(f"{url!r} is no memory bus: write memory://name, without a path or options")
    return MemoryBus(parts.netloc)
