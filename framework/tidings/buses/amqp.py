"""AMQP 0-9-1 on pamqp: one connection's frames, channels, confirms. Knows nothing of events, and never reconnects.

Why not aiormq or aio-pika for this: their reader dies of a message whose properties pamqp cannot decode (a type that is
no UTF-8, a year 300000), so that one foreign message would block its queue for ever; each delivery costs two tasks; a
lost confirm surfaces as `CancelledError`; and `connection.blocked` cannot be observed. Here a frame is parsed by hand
where it is hot, and what one message holds can hurt that message only.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeVar, cast

from pamqp import commands, frame, header
from pamqp.base import Frame
from pamqp.heartbeat import Heartbeat

__all__ = ["Address", "AmqpError", "Channel", "ChannelClosed", "Connection", "ConnectionLost", "Outcome"]

Properties = commands.Basic.Properties
OnDelivery = Callable[[int, Properties | None, bytes], None]
"""Called with delivery tag, properties (None if they cannot be decoded) and body."""

_FRAME: Final = struct.Struct(">BHI")
_ACK: Final = struct.Struct(">QB")
_HEADER: Final = struct.Struct(">HHQ")
_METHOD, _CONTENT, _BODY, _HEARTBEAT = 1, 2, 3, 8
_END: Final = b"\xce"
_DELIVER, _RETURN, _ACKED, _NACKED = (60 << 16) + 60, (60 << 16) + 50, (60 << 16) + 80, (60 << 16) + 120
_ALIVE: Final = Heartbeat().marshal()
_BIGGEST_FRAME: Final = 1 << 20

F = TypeVar("F", bound=Frame)


class AmqpError(Exception):
    """What the broker said, or why it can say no more; `code` is AMQP's reply code, 0 where there is none."""

    def __init__(self, text: str, code: int = 0) -> None:
        self.text, self.code = text, code
        super().__init__(f"{code} {text}" if code else text)


class ConnectionLost(AmqpError):
    """The connection could not be made, or is gone."""


class ChannelClosed(AmqpError):
    """The broker closed one channel, or cancelled its consumer; the connection lives on."""


class Outcome(Enum):
    """What became of a publish: confirmed in every queue, refused, or no queue to go to."""

    CONFIRMED = "confirmed"
    REFUSED = "refused"
    RETURNED = "returned"


@dataclass(frozen=True)
class Address:
    """Where and as whom to connect; its text never shows the password. `heartbeat` in seconds."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    heartbeat: int = 10

    def __str__(self) -> str:
        return f"{self.host}:{self.port}, vhost {self.vhost!r}, user {self.user!r}"


@dataclass(slots=True)
class _Publish:
    future: asyncio.Future[Outcome]
    key: str | None
    returned: bool = False


class _Content:
    """A message that is arriving: its method, then its header, then as many body frames as the header promised."""

    __slots__ = ("body", "method", "properties", "size", "tag")

    def __init__(self, method: int, tag: int) -> None:
        self.method, self.tag = method, tag
        self.size = -1
        self.properties: Properties | None = None
        self.body = bytearray()


def _method(payload: bytes) -> Frame:
    return cast("Frame", frame.unmarshal(_FRAME.pack(_METHOD, 0, len(payload)) + payload + _END)[2])


class Channel:
    """One channel: calls, publishes with confirms, one consumer. Made by `Connection.channel`."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number
        self._turn = asyncio.Lock()
        self._reply: asyncio.Future[Frame] | None = None
        self._content: _Content | None = None
        self._unconfirmed: dict[int, _Publish] = {}
        self._published = 0
        self._on_delivery: OnDelivery | None = None
        self._on_closed: Callable[[AmqpError], None] | None = None
        self.closed: AmqpError | None = None
        """Why this channel is of no more use; None while it lives."""
        self.abandoned = 0
        """Messages that were unconfirmed when it closed: with one, the broker's complaint is about that one."""

    async def call(self, request: Frame, reply: type[F]) -> F:
        """Send a method and wait for its reply. Raises `AmqpError`; when cancelled, the channel is of no more use."""
        async with self._turn:
            if self.closed is not None:
                raise self.closed
            self._reply = asyncio.get_running_loop().create_future()
            self._connection.write(frame.marshal(request, self._number))
            try:
                answer = await self._reply
            except asyncio.CancelledError:
                self.fail(ChannelClosed(f"{request.name} was cancelled before its reply came"))
                raise
            finally:
                self._reply = None
        if not isinstance(answer, reply):
            raise ConnectionLost(f"the broker answered {request.name} with {answer.name}")
        return answer

    def publish(self, exchange: str, properties: Properties, body: bytes) -> asyncio.Future[Outcome]:
        """Send a mandatory message at once; the future is done when the broker has confirmed it.

        Raises `AmqpError` on a dead channel, `ValueError` or `TypeError` for properties that no frame can hold. Returns
        are matched by message id, and all unconfirmed messages of that id count as returned: one too many is sent
        again, which is harmless; one too few would be lost.
        """
        if self.closed is not None:
            raise self.closed
        number, limit = self._number, self._connection.frame_max - 8
        content = frame.marshal(header.ContentHeader(body_size=len(body), properties=properties), number)
        if len(content) > limit + 8:
            raise ValueError(f"its headers are {len(content)} bytes, a frame of this broker ends at {limit + 8}")
        parts = [frame.marshal(commands.Basic.Publish(exchange=exchange, mandatory=True), number), content]
        for start in range(0, len(body), limit):
            part = body[start : start + limit]
            parts += (_FRAME.pack(_BODY, number, len(part)), part, _END)
        self._connection.write(*parts)
        self._published += 1
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._unconfirmed[self._published] = _Publish(future, properties.message_id or None)
        return future

    async def consume(
        self, queue: str, prefetch: int, on_delivery: OnDelivery, on_closed: Callable[[AmqpError], None]
    ) -> None:
        """Begin to consume: `on_delivery` for each message, `on_closed` once when no more can come."""
        await self.call(commands.Basic.Qos(prefetch_count=prefetch), commands.Basic.QosOk)
        self._on_delivery, self._on_closed = on_delivery, on_closed
        await self.call(commands.Basic.Consume(queue=queue, consumer_tag="tidings"), commands.Basic.ConsumeOk)

    def ack_through(self, tag: int) -> None:
        """Settle all deliveries up to `tag`; nothing happens on a dead channel, whose tags mean nothing any more."""
        if self.closed is None:
            self._connection.write(frame.marshal(commands.Basic.Ack(delivery_tag=tag, multiple=True), self._number))

    def fail(self, error: AmqpError) -> None:
        """End everything that waits on this channel with `error`."""
        if self.closed is not None:
            return
        self.closed = error
        self.abandoned = len(self._unconfirmed)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
        for publish in self._unconfirmed.values():
            if not publish.future.done():
                publish.future.set_exception(error)
        self._unconfirmed.clear()
        if self._on_closed is not None:
            self._on_closed(error)

    # ---- frames of this channel ----------------------------------------------------------

    def on_method(self, payload: bytes) -> None:
        method = int.from_bytes(payload[:4], "big")
        if method == _DELIVER:
            at = 5 + payload[4]
            self._content = _Content(method, int.from_bytes(payload[at : at + 8], "big"))
        elif method in (_ACKED, _NACKED):
            tag, flags = _ACK.unpack_from(payload, 4)
            self._confirmed(tag, bool(flags & 1), Outcome.CONFIRMED if method == _ACKED else Outcome.REFUSED)
        elif method == _RETURN:
            self._content = _Content(method, 0)
        else:
            answer = _method(payload)
            if isinstance(answer, commands.Channel.Close):
                self._connection.write(frame.marshal(commands.Channel.CloseOk(), self._number))
                self._connection.forget(self._number)
                self.fail(ChannelClosed(answer.reply_text or "", answer.reply_code or 0))
            elif isinstance(answer, commands.Basic.Cancel):
                self.fail(
                    ChannelClosed("the broker cancelled the consumer: its queue was deleted, or its node is gone")
                )
            elif self._reply is not None and not self._reply.done():
                self._reply.set_result(answer)

    def on_header(self, payload: bytes) -> None:
        content = self._content
        if content is None:
            raise ConnectionLost("the broker sent a content header out of turn")
        content.size = _HEADER.unpack_from(payload)[2]
        parsed = header.ContentHeader()
        try:
            parsed.unmarshal(payload)
            content.properties = parsed.properties
        except Exception:  # whatever a foreign publisher put there must stay a matter of that message
            content.properties = None
        if not content.size:
            self._arrived(content)

    def on_body(self, payload: bytes) -> None:
        content = self._content
        if content is None:
            raise ConnectionLost("the broker sent a content body out of turn")
        content.body += payload
        if len(content.body) >= content.size:
            self._arrived(content)

    def _arrived(self, content: _Content) -> None:
        self._content = None
        if content.method == _DELIVER:
            if self._on_delivery is not None and self.closed is None:
                self._on_delivery(content.tag, content.properties, bytes(content.body))
            return
        key = content.properties.message_id if content.properties is not None else None
        for publish in self._unconfirmed.values():
            if publish.key == (key or None):
                publish.returned = True

    def _confirmed(self, tag: int, multiple: bool, outcome: Outcome) -> None:
        unconfirmed = self._unconfirmed
        tags = [tag]
        if multiple:
            tags = []
            for sent in unconfirmed:  # in the order of publishing, so this stops at the first that is newer
                if sent > tag:
                    break
                tags.append(sent)
        for sent in tags:
            publish = unconfirmed.pop(sent, None)
            if publish is not None and not publish.future.done():
                publish.future.set_result(Outcome.RETURNED if publish.returned else outcome)


class Connection(asyncio.Protocol):
    """One connection; `Connection.open` makes it. After `lost` is set it is of no more use."""

    def __init__(self, heartbeat: int, on_blocked: Callable[[str | None], None] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._heartbeat = heartbeat
        self._on_blocked = on_blocked
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._output: list[bytes] = []
        self._flushing = False
        self._channels: dict[int, Channel] = {}
        self._methods: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._wrote = True
        self._silent = 0
        self.lost: ConnectionLost | None = None
        """Why this connection is of no more use; None while it lives."""
        self.frame_max = 131_072

    @classmethod
    async def open(
        cls,
        address: Address,
        name: str,
        *,
        timeout: float = 10.0,
        on_blocked: Callable[[str | None], None] | None = None,
    ) -> Connection:
        """Connect and log in within `timeout` seconds. `name` is what operators see; `on_blocked` is called with the
        reason when the broker stops taking messages, with None when it takes them again. Raises `ConnectionLost`."""
        connection = cls(address.heartbeat, on_blocked)
        try:
            async with asyncio.timeout(timeout):
                await connection._loop.create_connection(
                    lambda: connection, address.host, address.port, ssl=address.tls
                )
                await connection._log_in(address, name)
        except TimeoutError as error:
            await connection._abort()
            raise ConnectionLost(f"it did not answer within {timeout:g} s") from error
        except OSError as error:  # refused, unknown host, TLS
            await connection._abort()
            raise ConnectionLost(str(error) or type(error).__name__) from error
        except BaseException:
            await connection._abort()
            raise
        connection._tick()
        return connection

    async def channel(self, *, confirms: bool = False) -> Channel:
        """A new channel, on request with publisher confirms. Raises `AmqpError`."""
        if self.lost is not None:
            raise self.lost
        number = next(number for number in range(1, 65536) if number not in self._channels)
        channel = self._channels[number] = Channel(self, number)
        await channel.call(commands.Channel.Open(), commands.Channel.OpenOk)
        if confirms:
            await channel.call(commands.Confirm.Select(), commands.Confirm.SelectOk)
        return channel

    async def close(self, timeout: float = 3.0) -> None:
        """Say goodbye and wait for the answer, but not longer than `timeout` seconds: a stuck broker gives none."""
        if self.lost is None:
            self.write(frame.marshal(commands.Connection.Close(reply_code=200, class_id=0, method_id=0), 0))
            self._flush()
            await asyncio.wait([self._gone], timeout=timeout)
        await self._abort()

    def cut(self) -> None:
        """Break the connection as a network does, for tests."""
        if self._transport is not None:
            self._transport.abort()

    def forget(self, number: int) -> None:
        """A channel is closed on both sides: its number is free."""
        self._channels.pop(number, None)

    def write(self, *parts: bytes) -> None:
        """Frames to send; those of one turn of the loop leave together, which brokers answer with fewer confirms."""
        self._output += parts
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def fail(self, error: ConnectionLost) -> None:
        """End everything that waits on this connection with `error`."""
        if self.lost is not None:
            return
        self.lost = error
        if self._timer is not None:
            self._timer.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        for channel in list(self._channels.values()):
            channel.fail(error)
        self._channels.clear()
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        self._flushing = False
        if self._output and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._output))
            self._wrote = True
        self._output.clear()

    async def _abort(self) -> None:
        """Cut the connection, and wait until the loop has let go of its socket."""
        self.fail(ConnectionLost("the connection was closed"))
        if self._transport is not None:
            await asyncio.wait([self._gone], timeout=1)

    # ---- logging in ----------------------------------------------------------------------

    async def _log_in(self, address: Address, name: str) -> None:
        self.write(b"AMQP\x00\x00\x09\x01")
        await self._expect(commands.Connection.Start)
        capabilities = {
            "authentication_failure_close": True,
            "basic.nack": True,
            "connection.blocked": True,
            "consumer_cancel_notify": True,
            "publisher_confirms": True,
        }
        properties = {"product": "Tidings", "connection_name": name, "capabilities": capabilities}
        secret = f"\x00{address.user}\x00{address.password}"
        start = commands.Connection.StartOk(cast("Any", properties), mechanism="PLAIN", response=secret)
        self.write(frame.marshal(start, 0))
        tune = await self._expect(commands.Connection.Tune)
        self.frame_max = min(tune.frame_max or _BIGGEST_FRAME, _BIGGEST_FRAME)
        answer = commands.Connection.TuneOk(tune.channel_max or 0, self.frame_max, self._heartbeat)
        self.write(frame.marshal(answer, 0), frame.marshal(commands.Connection.Open(virtual_host=address.vhost), 0))
        await self._expect(commands.Connection.OpenOk)

    async def _expect(self, kind: type[F]) -> F:
        while not self._methods:
            if self.lost is not None:
                raise self.lost
            self._waiter = self._loop.create_future()
            await self._waiter
        method = self._methods.popleft()
        if not isinstance(method, kind):
            raise ConnectionLost(f"it sent {method.name} where {kind.name} was due")
        return method

    # ---- the loop's callbacks ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(ConnectionLost(f"the connection broke: {exc or 'the other side closed it'}"))
        if not self._gone.done():
            self._gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        buffer = self._input
        buffer += data
        at, end = 0, len(buffer)
        try:
            while end - at >= 7 and self.lost is None:
                kind, number, size = _FRAME.unpack_from(buffer, at)
                if kind == 65:  # "A" of "AMQP": the broker speaks another version
                    raise ConnectionLost("it speaks another protocol than AMQP 0-9-1")
                stop = at + 8 + size
                if size > self.frame_max:
                    raise ConnectionLost("it sends what is no AMQP frame")
                if stop > end:
                    break
                if buffer[stop - 1] != 0xCE:
                    raise ConnectionLost("it sends what is no AMQP frame")
                self._received(kind, number, bytes(buffer[at + 7 : stop - 1]))
                at = stop
        except ConnectionLost as error:
            self.fail(error)
        except Exception as error:  # a frame that nobody can read ends the connection, as AMQP wants it
            self.fail(ConnectionLost(f"a frame cannot be read: {type(error).__name__} {error}"))
        del buffer[:at]

    def _received(self, kind: int, number: int, payload: bytes) -> None:
        if kind == _HEARTBEAT:
            return
        if number == 0:
            self._on_method(_method(payload))
            return
        channel = self._channels.get(number)
        if channel is None:
            return
        if kind == _METHOD:
            channel.on_method(payload)
        elif kind == _CONTENT:
            channel.on_header(payload)
        elif kind == _BODY:
            channel.on_body(payload)

    def _on_method(self, method: Frame) -> None:
        if isinstance(method, commands.Connection.Close):
            self.write(frame.marshal(commands.Connection.CloseOk(), 0))
            self._flush()
            self.fail(ConnectionLost(method.reply_text or "", method.reply_code or 0))
        elif isinstance(method, commands.Connection.CloseOk):
            self.fail(ConnectionLost("the connection was closed"))
        elif isinstance(method, commands.Connection.Blocked):
            if self._on_blocked is not None:
                self._on_blocked(method.reason or "no reason given")
        elif isinstance(method, commands.Connection.Unblocked):
            if self._on_blocked is not None:
                self._on_blocked(None)
        else:
            self._methods.append(method)
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def _tick(self) -> None:
        """Twice in a heartbeat: say that we live, and count how long nothing was heard.

        Counting turns of this timer, not seconds, keeps a loop that was blocked itself from blaming the broker.
        """
        if self.lost is not None:
            return
        self._silent = 0 if self._heard else self._silent + 1
        if self._silent >= 4:
            self.fail(ConnectionLost(f"nothing was heard for {2 * self._heartbeat} s"))
            return
        if not self._wrote:
            self.write(_ALIVE)
        self._heard = self._wrote = False
        self._timer = self._loop.call_later(self._heartbeat / 2, self._tick)
