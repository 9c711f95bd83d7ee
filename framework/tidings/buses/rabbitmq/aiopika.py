"""The AMQP client on aio-pika: for a team that runs it already, or wants no AMQP client of ours in production.

It uses aio-pika's connections, and on them aiormq's channels, which take pamqp's methods as `topology` writes them.
aio-pika's robust channels are not used: they would reconnect behind the back of relay and services, which know better
what to do then. `docs/rabbitmq.md` says what aiormq cannot survive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar, cast
from weakref import WeakKeyDictionary

import aio_pika
import aiormq
from aio_pika.abc import AbstractConnection, AbstractRobustConnection
from aiormq import exceptions as said
from aiormq.abc import AbstractConnection as Underlay
from aiormq.abc import DeliveredMessage
from pamqp import commands
from pamqp.base import Frame

from tidings.buses.rabbitmq.address import Address
from tidings.buses.rabbitmq.client import (
    AmqpError,
    Blame,
    ChannelClosed,
    ConnectionLost,
    OnClosed,
    OnDelivery,
    Outcome,
    conclude,
    version_of,
)
from tidings.buses.rabbitmq.content import Properties, pack, read, written

__all__ = ["AioPikaChannel", "AioPikaConnection"]

_CLOSING: Final = 3.0
"""Seconds to wait for a broker's goodbye."""
_CODES: Final[dict[type[Exception], int]] = {
    said.ChannelAccessRefused: 403,
    said.ProbableAuthenticationError: 403,
    said.AuthenticationError: 403,
    said.ChannelNotFoundEntity: 404,
    said.ChannelLockedResource: 405,
    said.ChannelPreconditionFailed: 406,
    said.ConnectionNotAllowed: 530,
}
"""AMQP's reply codes of those of aiormq's errors that do not carry them."""

F = TypeVar("F", bound=Frame)
T = TypeVar("T")

_RESERVED: WeakKeyDictionary[Underlay, dict[str, asyncio.Lock]] = WeakKeyDictionary()
"""By connection, the exclusive queues of its users: the broker tells connections apart, not who uses one."""


class AioPikaChannel:
    """An `AmqpChannel` on one of aiormq's."""

    def __init__(self, connection: AioPikaConnection, channel: aiormq.Channel) -> None:
        self._connection = connection
        self._channel = channel
        self._turn = asyncio.Lock()
        self._told: list[Frame] = []
        self._unconfirmed: dict[asyncio.Future[Outcome], Blame | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settle = self._settled = 0
        self._on_closed: OnClosed | None = None
        self.closed: AmqpError | None = None
        self.abandoned = 0
        channel.closing.add_done_callback(self._closing)

    async def call(self, request: Frame, reply: type[F]) -> F:
        """As the port says. What `tell` was told goes before it."""
        async with self._turn:
            told, self._told = self._told, []
            for frame in told:
                frame.nowait = False  # type: ignore[attr-defined]  # only methods that have it are told
                await self._answered(self._channel.rpc(frame))
            return cast("F", await self._answered(self._channel.rpc(request)))

    async def _answered(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except (Exception, asyncio.CancelledError) as error:
            raise self._ended(error) from error

    def tell(self, request: Frame) -> None:
        if self.closed is not None:
            raise self.closed
        self._told.append(request)

    @property
    def crowded(self) -> bool:
        """Never: aiormq holds back each publish by itself."""
        return False

    async def room(self) -> None:
        """Return at once."""

    def publish(
        self, exchange: str, properties: Properties, body: bytes, blame: Blame | None = None, *, routing_key: str = ""
    ) -> asyncio.Future[Outcome]:
        """As the port says. Returns are matched by message id: of two messages with one id, sent at once, only the
        second is known to be returned."""
        if self.closed is not None:
            raise self.closed
        limit = self._channel.max_content_size
        if (size := len(pack(properties, len(body)))) > limit:  # aiormq would find out after it counted the message
            raise ValueError(f"its headers are {size + 8} bytes, a frame of this broker ends at {limit + 8}")
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._unconfirmed[future] = blame
        how = written(properties)
        work = self._channel.basic_publish(
            body, exchange=exchange, routing_key=routing_key, properties=how, mandatory=True, wait=False
        )
        self._begin(self._publish(future, work))  # tasks begin in their order, and aiormq's lock keeps it
        return future

    async def _publish(self, future: asyncio.Future[Outcome], work: Coroutine[Any, Any, object]) -> None:
        outcome: Outcome | AmqpError = Outcome.CONFIRMED
        try:
            await work
        except said.PublishError:
            outcome = Outcome.RETURNED
        except said.DeliveryError:
            outcome = Outcome.REFUSED
        except (Exception, asyncio.CancelledError) as error:
            self.fail(outcome := self._ended(error))
        conclude(future, outcome, self._unconfirmed.pop(future, None))

    async def consume(
        self, queue: str, prefetch: int, on_delivery: OnDelivery, on_closed: OnClosed, *, body_limit: int
    ) -> None:
        """As the port says, but the whole body is held in memory before it is cut."""

        async def deliver(message: DeliveredMessage) -> None:
            if self.closed is None and message.delivery_tag is not None:
                on_delivery(
                    message.delivery_tag, read(message.header.properties), bytes(message.body[: body_limit + 1])
                )

        def cancelled(frame: commands.Basic.Cancel) -> None:
            self.fail(ChannelClosed("the broker cancelled the consumer: its queue was deleted, or its node is gone"))

        self._on_closed = on_closed
        self._channel.on_consumer_cancel_callbacks.add(cancelled)
        await self._answered(self._channel.basic_qos(prefetch_count=prefetch))
        await self._answered(self._channel.basic_consume(queue, deliver, consumer_tag="tidings"))

    def ack_through(self, tag: int) -> None:
        if self.closed is None:
            settling, self._settle = self._settle > self._settled, tag
            if not settling:
                self._begin(self._acknowledge())

    async def _acknowledge(self) -> None:
        """One at a time: the broker ends a channel that acknowledges a lower tag after a higher one."""
        while self._settled < self._settle and self.closed is None:
            tag = self._settle
            with suppress(Exception):  # a channel that ended settles nothing, and says so by itself
                await self._channel.basic_ack(tag, multiple=True, wait=False)
            self._settled = tag

    def fail(self, error: AmqpError) -> None:
        """End everything that waits on this channel with `error`."""
        if self.closed is not None:
            return
        self.closed = error
        self._connection.forget(self)
        self.abandoned = len(self._unconfirmed)
        for future, blame in self._unconfirmed.items():
            conclude(future, error, blame)
        self._unconfirmed.clear()
        if self._on_closed is not None:
            self._on_closed(error)

    async def flush(self) -> None:
        """Wait until what was written and settled before is on its way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSING)

    async def close(self) -> None:
        """Close this channel alone."""
        with suppress(Exception):
            await self._channel.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _closing(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self.fail(self._connection.lost or _error(error))

    def _ended(self, error: BaseException) -> AmqpError:
        """What ended a call; raises a cancellation that is the caller's own."""
        _raise_own(error)
        closing = self._channel.closing  # it knows why, where the error only says that the channel is closed
        why = closing.exception() if closing.done() and not closing.cancelled() else None
        return self.closed or self._connection.lost or _error(why or error)


class AioPikaConnection:
    """An `AmqpConnection` of its own (`open`), or a part in a connection that somebody else keeps (`shared`)."""

    def __init__(self, connection: AbstractConnection, *, ours: bool) -> None:
        assert connection.transport is not None
        self._connection = connection
        self._underlay = connection.transport.connection
        self._ours = ours
        self._channels: set[AioPikaChannel] = set()
        self._reserved: dict[str, asyncio.Lock] = {}
        self.lost: ConnectionLost | None = None
        self.version = version_of(self._underlay.server_properties)
        self._underlay.closing.add_done_callback(self._closing)

    @classmethod
    async def open(cls, address: Address, name: str, *, timeout: float = 10.0) -> AioPikaConnection:
        """Connect and log in within `timeout` seconds. `name` is what operators see. Raises `ConnectionLost`.

        That the broker blocks it (memory or disk alarm), aiormq tells its own log alone.
        """
        place: dict[str, Any] = {"host": address.host, "port": address.port, "virtualhost": address.vhost}
        place |= {"login": address.user, "password": address.password, "heartbeat": address.heartbeat}
        url = aio_pika.connection.make_url(**place, ssl=address.tls is not None)
        properties: dict[str, Any] = {"product": "Tidings", "connection_name": name}
        connection = aio_pika.Connection(url, ssl_context=address.tls, client_properties=properties)
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()
            return cls(connection, ours=True)
        except BaseException as error:
            await connection.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(f"it did not answer within {timeout:g} s") from error
            _raise_own(error)
            raise _error(error) from error

    @classmethod
    async def shared(cls, connection: AbstractConnection, *, timeout: float = 10.0) -> AioPikaConnection:
        """Take a part in a connection: it opens channels of its own, and closes those alone.

        A robust connection that is away has `timeout` seconds to be back. Raises `ConnectionLost`.
        """
        ends = asyncio.get_running_loop().time() + timeout
        while isinstance(connection, AbstractRobustConnection) and not _open(connection):
            if asyncio.get_running_loop().time() > ends:
                break
            await asyncio.sleep(0.05)
        if not _open(connection):
            raise ConnectionLost("the aio-pika connection that was handed over is closed")
        return cls(connection, ours=False)

    async def channel(self, *, confirms: bool = False) -> AioPikaChannel:
        if self.lost is not None:
            raise self.lost
        try:
            opened = await self._underlay.channel(publisher_confirms=confirms, on_return_raises=confirms)
        except (Exception, asyncio.CancelledError) as error:
            _raise_own(error)
            raise self.lost or _error(error) from error
        made = AioPikaChannel(self, cast("aiormq.Channel", opened))
        self._channels.add(made)
        return made

    async def reserve(self, queue: str) -> None:
        if self._ours:
            return
        lock = _RESERVED.setdefault(self._underlay, {}).setdefault(queue, asyncio.Lock())
        await lock.acquire()
        self._reserved[queue] = lock
        if self.lost is not None:
            self._release()
            raise self.lost

    async def close(self) -> None:
        for channel in list(self._channels):
            await channel.flush()
        with suppress(Exception):
            async with asyncio.timeout(_CLOSING):
                if self._ours:
                    await self._connection.close()
                else:
                    await self._leave()
        self._fail(ConnectionLost("the connection was closed"))

    async def _leave(self) -> None:
        """Close what is ours of a shared connection: what was consumed and not settled waits again."""
        for queue in self._reserved:
            await (await self.channel()).call(commands.Queue.Delete(queue=queue), commands.Queue.DeleteOk)
        await asyncio.gather(*(channel.close() for channel in list(self._channels)))

    def forget(self, channel: AioPikaChannel) -> None:
        """Let go of a channel that has ended."""
        self._channels.discard(channel)

    def _closing(self, closing: asyncio.Future[Any]) -> None:
        self._fail(ConnectionLost(*_text_and_code(None if closing.cancelled() else closing.exception())))

    def _fail(self, error: ConnectionLost) -> None:
        if self.lost is None:
            self.lost = error
            for channel in list(self._channels):
                channel.fail(error)
            self._release()

    def _release(self) -> None:
        for lock in self._reserved.values():
            lock.release()
        self._reserved.clear()


def _open(connection: AbstractConnection) -> bool:
    return connection.transport is not None and not connection.transport.connection.is_closed


def _raise_own(error: BaseException) -> None:
    """Raise a cancellation of the running task, and what is no error at all. aiormq raises `CancelledError` too, for a
    connection that was lost."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError):
        if task is not None and task.cancelling():
            raise error
    elif not isinstance(error, Exception):
        raise error


def _error(error: BaseException | None) -> AmqpError:
    """Return what aiormq raised as the adapter knows it."""
    kind = ChannelClosed if isinstance(error, said.AMQPChannelError) else ConnectionLost
    return kind(*_text_and_code(error))


def _text_and_code(error: BaseException | None) -> tuple[str, int]:
    if error is None or isinstance(error, asyncio.CancelledError) or (not error.args and not str(error)):
        return "the connection broke: the other side closed it", 0
    if isinstance(error, said.InvalidFrameError) and "Connection.Close" in str(error):
        return "the broker refused this user or vhost, and aiormq does not say why", 530
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), 0)
    if not code and isinstance(error, said.AMQPError) and error.args and type(error.args[0]) is int:
        code = error.args[0]
    return (str(error.args[-1]) if error.args else str(error)) or type(error).__name__, code
