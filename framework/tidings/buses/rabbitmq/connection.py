"""AMQP 0-9-1 on pamqp: one connection's frames, channels, confirms. Knows nothing of events, and never reconnects.

Why not aiormq or aio-pika for this: a message whose properties pamqp cannot decode (a type that is no UTF-8, a
timestamp after the year 9999) ends their connection and goes back to its queue, so that one foreign message would block
that queue for ever (seen with aiormq 7.2.4 and aio-pika 10.2.1, plain and robust); each delivery costs two tasks; a
lost confirm surfaces as `CancelledError`; and `connection.blocked` cannot be observed. Here a frame is parsed by hand
where it is hot, and what one message holds can hurt that message only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.heartbeat import Heartbeat

from tidings.buses.rabbitmq.address import Address
from tidings.buses.rabbitmq.channel import BODY, CONTENT, FRAME, HEARTBEAT, METHOD, Channel, read_method
from tidings.buses.rabbitmq.client import ConnectionLost, version_of

__all__ = ["Connection"]

_ALIVE: Final = Heartbeat().marshal()
_SMALLEST_FRAME, _BIGGEST_FRAME = 4096, 1 << 20
"""Bytes: AMQP's `frame-min-size`, and what one frame may take here whatever the broker offers."""
_UNREAD: Final = 16
"""Methods on channel 0 that nobody has asked for: a broker that sends more is none."""

F = TypeVar("F", bound=Frame)


class Connection(asyncio.Protocol):
    """One connection; `Connection.open` makes it. After `lost` is set it is of no more use."""

    def __init__(self, heartbeat: int, on_blocked: Callable[[str | None], None] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._heartbeat = heartbeat
        self._on_blocked = on_blocked
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._output: list[bytes] = []
        self._flushing = self._paused = False
        self._line: deque[asyncio.Future[None]] = deque()
        """Who waits for `room`, first come first served."""
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
        self.version: tuple[int, ...] = ()
        """RabbitMQ's version, such as (4, 0); empty for another broker."""

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

    async def reserve(self, queue: str) -> None:
        """Return at once: nobody else uses this connection."""

    def cut(self) -> None:
        """Break the connection as a network does, for tests."""
        if self._transport is not None:
            self._transport.abort()

    def forget(self, number: int) -> None:
        """A channel is closed on both sides: its number is free."""
        self._channels.pop(number, None)

    @property
    def crowded(self) -> bool:
        """The transport holds as much as it should, or others wait for it already."""
        return bool(self._paused or self._line)

    async def room(self) -> None:
        """Wait for the turn to write, at once after this returns; who is last in line waits longest. Returns too when
        the connection is lost."""
        place: asyncio.Future[None] = self._loop.create_future()
        self._line.append(place)
        self._next()
        try:
            await place
        finally:
            self._line.remove(place)
            self._next()

    def _next(self) -> None:
        if self._line and not self._line[0].done() and (self.lost is not None or not self._paused):
            self._line[0].set_result(None)

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
        self._next()
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
        start = await self._expect(commands.Connection.Start)
        self.version = version_of(start.server_properties)
        capabilities = {
            "authentication_failure_close": True,
            "basic.nack": True,
            "connection.blocked": True,
            "consumer_cancel_notify": True,
            "publisher_confirms": True,
        }
        properties = {"product": "Tidings", "connection_name": name, "capabilities": capabilities}
        secret = f"\x00{address.user}\x00{address.password}"
        answer = commands.Connection.StartOk(cast("Any", properties), mechanism="PLAIN", response=secret)
        self.write(frame.marshal(answer, 0))
        tune = await self._expect(commands.Connection.Tune)
        self.frame_max = min(tune.frame_max or _BIGGEST_FRAME, _BIGGEST_FRAME)
        if self.frame_max < _SMALLEST_FRAME:
            raise ConnectionLost(f"it allows frames of {self.frame_max} bytes, AMQP 0-9-1 at least {_SMALLEST_FRAME}")
        tuned = commands.Connection.TuneOk(tune.channel_max or 0, self.frame_max, self._heartbeat)
        self.write(frame.marshal(tuned, 0), frame.marshal(commands.Connection.Open(virtual_host=address.vhost), 0))
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
        error = ConnectionLost(f"the connection broke: {exc or 'the other side closed it'}")
        error.__cause__ = exc  # a client certificate that is refused is heard of only after TLS 1.3's handshake
        self.fail(error)
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._next()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        buffer = self._input
        buffer += data
        at, end = 0, len(buffer)
        try:
            while end - at >= 7 and self.lost is None:
                kind, number, size = FRAME.unpack_from(buffer, at)
                if kind == 65:  # "A" of "AMQP": the broker speaks another version
                    raise ConnectionLost("it speaks another protocol than AMQP 0-9-1")
                if kind == 21:  # an alert of TLS
                    raise ConnectionLost("it speaks TLS, so its URL begins with amqps://")
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
        if kind == HEARTBEAT:
            return
        if number == 0:
            self._on_method(read_method(payload))
            return
        channel = self._channels.get(number)
        if channel is None:
            return
        if kind == METHOD:
            channel.on_method(payload)
        elif kind == CONTENT:
            channel.on_header(payload)
        elif kind == BODY:
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
        elif len(self._methods) >= _UNREAD:
            raise ConnectionLost(f"the broker sent {method.name} out of turn")
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
