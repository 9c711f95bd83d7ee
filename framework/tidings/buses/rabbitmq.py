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
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from pamqp import commands

from tidings.buses import Delivery, Subscription
from tidings.buses.amqp import Address, AmqpError, Channel, ChannelClosed, Connection, ConnectionLost, Outcome
from tidings.buses.rabbitmq_topology import EXCHANGE, LOCK, provision
from tidings.errors import BusUnavailable, ConfigurationError, PublishRejected, TopologyMismatch, Unroutable
from tidings.message import Message

__all__ = ["RabbitMQBus", "address_of", "open_rabbitmq"]

_OPTIONS: Final = ("heartbeat", "cafile", "certfile", "keyfile")
_TOO_LARGE: Final = re.compile(r"message size (\d+) (?:is )?larger than (?:configured )?max size (\d+)")
_LOCK_POLL: Final = 1.0  # seconds, give or take a quarter
_SHORT: Final = 255  # bytes of an AMQP short string

Properties = commands.Basic.Properties

log = structlog.get_logger(__name__)


class _Publisher:
    def __init__(self, bus: RabbitMQBus, channel: Channel) -> None:
        self._bus = bus
        self._channel = channel

    async def send(self, message: Message) -> None:
        # No await before the frames are written: that is what keeps sends in the order in which they began.
        try:
            future = self._channel.publish(EXCHANGE, _properties(message), message.body)
        except AmqpError as error:
            raise self._bus.unavailable(error) from error
        except (ValueError, TypeError) as error:
            raise PublishRejected(message.message_id, f"it cannot be written as AMQP: {error}") from error
        try:
            outcome = await future
        except AmqpError as error:
            if self._refused(error, message):
                raise PublishRejected(message.message_id, error.text) from error
            raise self._bus.unavailable(error) from error
        if outcome is Outcome.RETURNED:
            raise Unroutable(EXCHANGE, message.message_id)
        if outcome is Outcome.REFUSED:
            raise PublishRejected(
                message.message_id, "negative confirm: a queue could not take it; see the broker's log"
            )

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
        self._channel: Channel | None = None
        self._given = 0
        self._settled = 0
        self._lost: BusUnavailable | None = None

    async def begin(self, channel: Channel, queue: str, prefetch: int) -> None:
        self._channel = channel
        await channel.consume(queue, prefetch, self._on_delivery, self.end)

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
        self._arrived.append(Delivery(tag, _message(properties, body)))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RabbitMQBus:
    """An `EventBus` on one RabbitMQ node or cluster address; opens its connections on use."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.connections: set[Connection] = set()
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

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[_Publisher]:
        """As the port says. A message over the broker's `max_message_size` closes the channel: it alone is
        `PublishRejected`, whatever else was on its way is `BusUnavailable`."""
        async with self._connected("tidings publisher" if lock is None else f"tidings relay {lock}") as connection:
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
                remedy = f"Grant what it lacks: rabbitmqctl set_permissions --vhost {address.vhost} {address.user} …"
            case 404:
                remedy = "It is made when a service or relay starts; if it was deleted, start them again"
            case 530:
                remedy = (
                    f"Make the vhost (rabbitmqctl add_vhost {address.vhost}), let the user in, or correct TIDINGS_BUS"
                )
            case 406:
                remedy = "Connect again; if it repeats, the broker's log says more"
            case _:
                remedy = "Connect again once it is there; check host and port in TIDINGS_BUS if it never was"
        return BusUnavailable(f"{known}. {remedy}.")

    @asynccontextmanager
    async def _connected(self, name: str) -> AsyncIterator[Connection]:
        if self._closed:
            raise BusUnavailable(f"{self!r} is closed")
        try:
            connection = await Connection.open(self._address, name, on_blocked=self._on_blocked)
        except AmqpError as error:
            raise self.unavailable(error) from error
        self.connections.add(connection)
        try:
            yield connection
        finally:
            self.connections.discard(connection)
            await connection.close()

    async def _hold(self, connection: Connection, name: str) -> None:
        """Wait until this connection alone has the lock's queue. A refused declare (405) costs a channel each time."""
        queue = LOCK + name
        try:
            declare = commands.Queue.Declare(queue=queue, exclusive=True)
        except ValueError as error:
            raise ConfigurationError(f"{name!r} cannot name a lock: {error}") from error
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
            await asyncio.sleep(_LOCK_POLL * random.uniform(0.75, 1.25))

    async def _declared(self, connection: Connection, declare: commands.Queue.Declare) -> bool:
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


def _properties(message: Message) -> Properties:
    headers = {name: bytearray(value) if type(value) is bytes else value for name, value in message.headers.items()}
    return Properties(
        content_type=_short(message.content_type),
        headers=cast("Any", headers),
        delivery_mode=2,
        correlation_id=_short(message.correlation_id),
        message_id=_short(message.message_id),
        message_type=_short(message.type),
        app_id=_short(message.app_id),
    )


def _short(value: str | None) -> str | None:
    """The value, or None if no AMQP short string can hold it: the headers have the same fact."""
    if not value or len(value) > _SHORT or (not value.isascii() and len(value.encode()) > _SHORT):
        return None
    return value


def _message(properties: Properties | None, body: bytes) -> Message:
    """Whatever is on the queue as a `Message`, with empty fields where a foreign publisher left them, or wrote what
    cannot be read. Never raises: one message that did would block its queue."""
    if properties is None:
        return Message(body=body, message_id="", type="", content_type="")
    headers = _headers(cast("Mapping[str, object] | None", properties.headers) or {})
    bucket = headers.get("tidings-bucket")
    return Message(
        body=body,
        message_id=properties.message_id or "",
        type=properties.message_type or "",
        headers=headers,
        content_type=properties.content_type or "",
        correlation_id=properties.correlation_id,
        app_id=properties.app_id,
        bucket=bucket if type(bucket) is int else None,
    )


def _headers(found: Mapping[str, object]) -> dict[str, str | int | bytes]:
    """Strings, integers and bytes as they are; anything else as the bytes of its text, which no reader of ours takes
    for a string or a number."""
    headers: dict[str, str | int | bytes] = {}
    for name, value in found.items():
        kind = type(value)
        if kind is str or kind is int or kind is bytes:
            headers[name] = cast("str | int | bytes", value)
        elif isinstance(value, bytearray):
            headers[name] = bytes(value)
        else:
            headers[name] = repr(value).encode("utf-8", "replace")
    return headers


def address_of(url: str) -> Address:
    """Where an AMQP URL leads. The `ConfigurationError` of one that cannot be read never shows it: a password may stand
    anywhere in it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, parts, port = None, urlsplit(""), None
    if not host or parts.fragment or "/" in parts.path[1:] or "@" in parts.path + parts.query:
        raise ConfigurationError(
            "the RabbitMQ URL cannot be read: write amqp://user:password@host:5672/vhost, and in user, password and "
            "vhost '/' as %2F, '@' as %40, '#' as %23, '?' as %3F, '%' as %25"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ConfigurationError(
            f"the RabbitMQ URL has the unknown option {unknown[0]!r}; known: {', '.join(_OPTIONS)}"
        )
    heartbeat = options.get("heartbeat", "10")
    if not heartbeat.isdecimal() or not 1 <= int(heartbeat) <= 60:
        raise ConfigurationError(f"the RabbitMQ URL says heartbeat={heartbeat!r}: it must be 1 to 60 seconds")
    tls = None
    if parts.scheme.lower() == "amqps":
        tls = _tls(options)
    elif options.keys() & {"cafile", "certfile", "keyfile"}:
        raise ConfigurationError("the RabbitMQ URL names certificates, but begins with amqp://: write amqps://")
    return Address(
        host=host,
        port=port or (5672 if tls is None else 5671),
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        vhost=unquote(parts.path[1:]) or "/",
        tls=tls,
        heartbeat=int(heartbeat),
    )


def _tls(options: Mapping[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the certificates that the RabbitMQ URL names cannot be read: {error}") from error
    return context


async def open_rabbitmq(url: str) -> RabbitMQBus:
    """The bus at `amqp(s)://user:password@host:port/vhost`; connects on use. Raises `ConfigurationError`.

    Options: `heartbeat` (seconds, default 10: a dead broker is noticed after twice that), and for `amqps://` `cafile`,
    `certfile`, `keyfile` (paths of PEM files).
    """
    return RabbitMQBus(address_of(url))
