"""The bus on RabbitMQ: events and markers as persistent AMQP messages. It never reconnects behind its user's back.

Each publisher, each consumer and each `provision` has a connection of its own, so that a broker which blocks publishers
(memory or disk alarm) goes on delivering. Everything that can be repaired at the broker, a refused password included,
is `BusUnavailable` with the remedy: who tries again will succeed then. A URL that can never work is
`ConfigurationError`.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from pamqp import commands

from tidings.buses import Delivery, Subscription, TopologyItem
from tidings.buses.rabbitmq.address import Address, address_of, address_of_connection, check_aiormq
from tidings.buses.rabbitmq.client import (
    AmqpChannel,
    AmqpConnection,
    AmqpError,
    ChannelClosed,
    ConnectionLost,
    Outcome,
)
from tidings.buses.rabbitmq.connection import Connection
from tidings.buses.rabbitmq.content import Properties
from tidings.buses.rabbitmq.management import foreign_bindings, limiting_policies, listed_queues
from tidings.buses.rabbitmq.messages import message_of, properties_of
from tidings.buses.rabbitmq.permissions import definitions, relay_user, service_user
from tidings.buses.rabbitmq.tls import remedy_of
from tidings.buses.rabbitmq.topology import EXCHANGE, LOCK, delete, inspect, provision, routing_key
from tidings.errors import (
    BusError,
    BusUnavailable,
    ConfigurationError,
    PublishRejected,
    QueueRefused,
    TopologyMismatch,
    Unroutable,
)
from tidings.protocol.message import BODY_LIMIT, Message

if TYPE_CHECKING:
    from aio_pika.abc import AbstractConnection

__all__ = ["RabbitMQBus", "open_rabbitmq"]

_TOO_LARGE: Final = re.compile(r"message size (\d+) (?:is )?larger than (?:configured )?max size (\d+)")
_LARGER: Final = (
    f". Raise max_message_size in rabbitmq.conf to {BODY_LIMIT}, the most that an event has (RabbitMQ 4 allows it by "
    "default), or keep what is large elsewhere and let the event name it"
)
_LOCK_POLL: Final = 1.0  # seconds, give or take a quarter
_LOCK_HEARTBEAT: Final = 3
"""Seconds. RabbitMQ gives up a silent connection, and the lock that it holds, after two to three times the heartbeat:
so a standby leads within 9 s and the poll of a leader that is paused, or whose network swallows everything."""
_ABOUT_US: Final = (403, 530)
"""Replies about user or vhost, which all nodes of a cluster share: the next node would say the same."""

log = structlog.get_logger(__name__)


class _Publisher:
    def __init__(self, bus: RabbitMQBus, channel: AmqpChannel) -> None:
        self._bus = bus
        self._channel = channel

    async def send(self, message: Message) -> None:
        await (await self.begin(message))

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        # Nothing else is awaited before the frames are written: that is what keeps sends in the order in which they
        # began.
        channel = self._channel
        if channel.crowded:
            await channel.room()
        try:
            blame, key = partial(self._blame, message), routing_key(message.bucket)
            return channel.publish(EXCHANGE, properties_of(message), message.body, blame, routing_key=key)
        except AmqpError as error:
            raise self._bus.unavailable(error) from error
        except (ValueError, TypeError) as error:
            raise PublishRejected(message.message_id, f"it cannot be written as AMQP: {error}") from error

    def _blame(self, message: Message, end: Outcome | AmqpError) -> BusError:
        """What the port says of a message that was not confirmed."""
        if end is Outcome.RETURNED:
            return Unroutable(EXCHANGE, message.message_id)
        if not isinstance(end, AmqpError):  # for what the queue is, full or without a leader: any message's fate
            # The others have it, or will: the broker routes to each queue by itself, and answers at the first refusal.
            return QueueRefused(self._bus.refusal)
        error: BusError
        if self._refused(end, message):
            error = PublishRejected(message.message_id, end.text + (_LARGER if _TOO_LARGE.search(end.text) else ""))
        else:
            error = self._bus.unavailable(end)
        error.__cause__ = end
        return error

    def _refused(self, error: AmqpError, message: Message) -> bool:
        """Whether the channel was closed for this message: for its size, or because it was alone on its way."""
        if error.code != 406:
            return False
        sizes = _TOO_LARGE.search(error.text)
        return len(message.body) > int(sizes[2]) if sizes is not None else self._channel.abandoned == 1


class _Consumer:
    def __init__(self, bus: RabbitMQBus) -> None:
        self._bus = bus
        self._arrived: deque[Delivery] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._channel: AmqpChannel | None = None
        self._given = 0
        self._settled = 0
        self._lost: BusUnavailable | None = None

    async def begin(self, channel: AmqpChannel, queue: str, prefetch: int) -> None:
        self._channel = channel
        await channel.consume(queue, prefetch, self._on_delivery, self.end, body_limit=BODY_LIMIT)

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        while self._lost is None:
            if self._arrived:
                delivery = self._arrived.popleft()
                self._given = delivery.tag
                return delivery
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise self._lost

    def settle_through(self, tag: int) -> None:
        tag = min(tag, self._given)  # a tag that was never delivered would cost the channel (406)
        if tag > self._settled and self._lost is None and self._channel is not None:
            self._settled = tag
            self._channel.ack_through(tag)

    def end(self, error: AmqpError) -> None:
        """No more can come. What has arrived and was not given out is dropped: the queue gives it to the next."""
        if self._lost is None:
            self._lost = self._bus.unavailable(error)
            self._arrived.clear()
            self._wake()

    def _on_delivery(self, tag: int, properties: Properties | None, body: bytes) -> None:
        self._arrived.append(Delivery(tag, message_of(properties, body)))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RabbitMQBus:
    """An `EventBus` on one RabbitMQ node or a cluster's. `tidings.open_bus("amqp://...")` opens one by URL."""

    def __init__(self, address: Address | None = None, *, connection: AbstractConnection | None = None) -> None:
        """Take part in an open `connection` of aio-pika, robust or not, which stays its owner's: the bus opens channels
        on it, and closes those alone. Without one, the bus connects to `address` on use.

        Relay and services that share a connection share its fate: a broker that blocks publishers (memory or disk
        alarm) then reads no acknowledgements either.
        """
        if connection is not None:
            address = address_of_connection(connection)
        if address is None:
            raise ConfigurationError("RabbitMQBus needs a connection of aio-pika; for a URL there is tidings.open_bus")
        self._shared = connection
        self._address = address
        self._nodes = address.each()
        self._node = 0  # of `_nodes`: the one that let us in last
        self.connections: set[AmqpConnection] = set()
        """Those open now, for tests that cut them."""
        self._closed = False

    def __repr__(self) -> str:
        return f"RabbitMQBus({self._address})"

    async def provision(self, subscription: Subscription | None = None) -> None:
        """As the port says. With a queue limit other than `QUEUE_BYTES` the queue is taken as it is, with a warning."""
        async with self._connected("tidings provision") as connection:
            try:
                await provision(connection, self._address.vhost, subscription)
            except AmqpError as error:
                raise self.unavailable(error) from error

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        """As the port says."""
        async with self._connected("tidings delete") as connection:
            try:
                await delete(connection, subscriptions)
            except AmqpError as error:
                raise self.unavailable(error) from error

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """As the port says. A user who may not declare is told that what exists fits: nothing more can be known."""
        async with self._connected("tidings inspect") as connection:
            try:
                return await inspect(connection, self._address.vhost, subscriptions)
            except AmqpError as error:
                raise self.unavailable(error) from error

    def users(self, services: Sequence[str], relays: Sequence[str]) -> list[str]:
        """As `ExportsUsers` says: each is named as the queue that is its own."""
        return [*map(relay_user, relays), *map(service_user, services)]

    def definitions(
        self, queues: Sequence[Subscription], relays: Sequence[str], passwords: Mapping[str, str]
    ) -> dict[str, Any]:
        """As `ExportsUsers` says, for `rabbitmqctl import_definitions`: with the exchanges, in this bus's vhost."""
        return definitions(self._address.vhost, queues, relays, passwords)

    async def listed_queues(self, management: str) -> list[TopologyItem]:
        """As `ListsQueues` says; `management` is `http://host:15672`, asked as the bus's user unless it names one."""
        address = self._address
        return await listed_queues(management, address.user, address.password, address.vhost)

    async def foreign_bindings(self, management: str, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """As `ListsBindings` says; `management` as for `listed_queues`."""
        address = self._address
        return await foreign_bindings(management, address.user, address.password, address.vhost, subscriptions)

    async def limiting_policies(self, management: str, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """As `ListsLimits` says: delivery limits. `management` as for `listed_queues`."""
        address = self._address
        return await limiting_policies(management, address.user, address.password, address.vhost, subscriptions)

    @property
    def bindings_unseen(self) -> str:
        """As `ListsBindings` says."""
        return (
            f"AMQP lists no bindings: a queue bound to {EXCHANGE} that is no service's, or another exchange that is "
            "bound to a service's queue, shows with --management http://host:15672, or with  rabbitmqctl list_bindings "
            f"--vhost {self._address.vhost} source_name destination_name"
        )

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[_Publisher]:
        """As the port says. A message over the broker's `max_message_size` closes the channel: it alone is
        `PublishRejected`, whatever else was on its way is `BusUnavailable`."""
        connected = (
            self._connected("tidings publisher")
            if lock is None
            else self._connected(f"tidings relay {lock}", min(self._address.heartbeat, _LOCK_HEARTBEAT))
        )
        async with connected as connection:
            try:
                if lock is not None:
                    await self._hold(connection, lock)
                channel = await connection.channel(confirms=True)
            except AmqpError as error:
                raise self.unavailable(error) from error
            yield _Publisher(self, channel)

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[_Consumer]:
        """As the port says. Raises `BusUnavailable` too when the queue does not exist."""
        async with self._connected(f"tidings consumer {subscription.service}") as connection:
            consumer = _Consumer(self)
            try:
                await consumer.begin(await connection.channel(), subscription.queue, prefetch)
            except AmqpError as error:
                raise self.unavailable(error) from error
            yield consumer
            # Leaving closes the connection, never the consumer alone: cancelling the active one lets the next begin
            # while this one's deliveries are unsettled. Settlements were written before, so the broker has them first.

    @property
    def refusal(self) -> str:
        """Why a queue may have refused a message, and how to find out which one."""
        vhost = self._address.vhost
        return (
            "a queue refuses messages. It is full and rejects more (overflow reject-publish, as an argument or by a "
            "policy), or has no leader. "
            f"Among the queues bound to {EXCHANGE}, find one that is no service's, whose policy limits it, or whose "
            f"state is not 'running': rabbitmqctl list_bindings --vhost {vhost} source_name destination_name; "
            f"rabbitmqctl list_queues --vhost {vhost} name state policy arguments messages; tidings topology diff. "
            "Clear the policy, or delete the queue: its service reads from the log what it held"
        )

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(connection.close() for connection in list(self.connections)))

    def unavailable(self, error: AmqpError) -> BusUnavailable:
        """What the broker said, and what to do about it."""
        address = self._address
        known = f"RabbitMQ at {address}: {error}"
        match error.code:
            case 403 if isinstance(error, ConnectionLost):
                remedy = "Check user and password in TIDINGS_BUS; a percent sign or '/' in them must be percent-encoded"
            case 403:
                remedy = (
                    "Let an administrator import what 'tidings topology export' prints (it brings the exchanges and "
                    f"the permissions), or grant it: rabbitmqctl set_permissions --vhost {address.vhost} "
                    f"{address.user} …"
                )
            case 404:
                remedy = (
                    "Relay and services make it anew by themselves; where they may not, import what 'tidings topology "
                    "export' prints"
                )
            case 530:
                remedy = (
                    f"Make the vhost (rabbitmqctl add_vhost {address.vhost}), let the user in, or correct TIDINGS_BUS"
                )
            case 406:
                remedy = "Connect again; if it repeats, the broker's log says more"
            case _:
                remedy = remedy_of(error, secured=address.tls is not None) or (
                    "Connect again once it is there; check host and port in TIDINGS_BUS if it never was"
                )
        return BusUnavailable(f"{known}. {remedy}.")

    @asynccontextmanager
    async def _connected(self, name: str, heartbeat: int | None = None) -> AsyncIterator[AmqpConnection]:
        if self._closed:
            raise BusUnavailable(f"{self!r} is closed")
        try:
            connection = await self._link(name, heartbeat or self._address.heartbeat)
        except AmqpError as error:
            raise self.unavailable(error) from error
        self.connections.add(connection)
        try:
            yield connection
        finally:
            self.connections.discard(connection)
            await connection.close()

    async def _link(self, name: str, heartbeat: int) -> AmqpConnection:
        """A part in the connection that was handed over, or a connection of its own."""
        if self._shared is None:
            return await self._open(name, heartbeat)
        from tidings.buses.rabbitmq.aiopika import AioPikaConnection

        return await AioPikaConnection.shared(self._shared)

    async def _connect(self, node: Address, name: str) -> AmqpConnection:
        if self._address.client == "aio-pika":
            from tidings.buses.rabbitmq.aiopika import AioPikaConnection

            return await AioPikaConnection.open(node, name)
        return await Connection.open(node, name, on_blocked=self._on_blocked)

    async def _open(self, name: str, heartbeat: int) -> AmqpConnection:
        """Connect to the node that let us in last, or else to the next: each has one try."""
        began, complaints = self._node, []
        last: AmqpError | None = None
        for turn in range(len(self._nodes)):
            number = (began + turn) % len(self._nodes)
            node = replace(self._nodes[number], heartbeat=heartbeat)
            try:
                connection = await self._connect(node, name)
            except AmqpError as error:
                if len(self._nodes) == 1 or error.code in _ABOUT_US:
                    raise
                log.warning("bus.node_unreachable", node=f"{node.host}:{node.port}", error=str(error))
                complaints.append(f"{node.host}:{node.port}: {error}")
                last = error
            else:
                self._node = number
                return connection
        raise ConnectionLost("; ".join(complaints)) from last

    async def _hold(self, connection: AmqpConnection, name: str) -> None:
        """Wait until this connection alone has the lock's queue. A refused declare (405) costs a channel each time."""
        queue = LOCK + name
        try:
            declare = commands.Queue.Declare(queue=queue, exclusive=True)
        except ValueError as error:
            raise ConfigurationError(f"{name!r} cannot name a lock: {error}") from error
        await connection.reserve(queue)
        waiting = False
        while not await self._declared(connection, declare):
            if not waiting:
                if await self._declared(connection, commands.Queue.Declare(queue=queue, passive=True)):
                    raise TopologyMismatch(
                        f"queue {queue!r} of vhost {self._address.vhost!r} exists, but is no lock: nobody holds it as "
                        f"exclusive. Delete it (rabbitmqctl delete_queue {queue} --vhost {self._address.vhost})."
                    )
                log.info("bus.lock_waiting", lock=name, bus=str(self._address))
                waiting = True
            await asyncio.sleep(_LOCK_POLL * random.uniform(0.75, 1.25))  # no secret  # nosec B311

    async def _declared(self, connection: AmqpConnection, declare: commands.Queue.Declare) -> bool:
        """False when somebody else holds the queue as exclusive, or, asked passively, when there is none."""
        try:
            await (await connection.channel()).call(declare, commands.Queue.DeclareOk)
        except ChannelClosed as error:
            if error.code in (404, 405):
                return False
            raise
        return True

    def _on_blocked(self, reason: str | None) -> None:
        if reason is None:
            log.warning("bus.unblocked", bus=str(self._address))
        else:
            log.warning("bus.blocked", bus=str(self._address), reason=reason)


async def open_rabbitmq(url: str) -> RabbitMQBus:
    """The bus at `amqp(s)://user:password@host:port/vhost`; connects on use. Raises `ConfigurationError`.

    Of a cluster any number of nodes may be named, `host1:port,host2:port`: each connection goes to the first that lets
    it in, beginning with the one that did so last.
    Options: `heartbeat` (seconds, default 10: a dead broker is noticed after twice that; a relay's is 3 at most, so
    that a standby need not wait for long), `client` (`pamqp`, the default, or `aio-pika`; see docs/rabbitmq.md), and
    for `amqps://` `cafile`, `certfile`, `keyfile` (paths of PEM files).
    """
    address = address_of(url)
    if address.client == "aio-pika":
        check_aiormq()
    return RabbitMQBus(address)
