"""gRPC over HTTP/2 on h2, the server's side: connections, calls, flow control, deadlines. It knows nothing of events.

Why not grpc.aio: it pays 50 to 150 µs for every message that is sent, while here one DATA frame carries many.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, cast

import structlog
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from tidings.server.calls import Call, Method
from tidings.server.http2_stream import HEADERS, Gone, Stream, refusal_of, seconds_of, trailers_of
from tidings.server.protocol import packed
from tidings.server.refusals import Refusal, Status, thrown

__all__ = ["Authenticate", "Connection"]

log = structlog.get_logger(__name__)

WINDOW: Final = 1024 * 1024
"""Bytes of requests that a call may send ahead of its handler."""
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
CALLS: Final = 10_000
"""Calls that one connection may have open: idle subscriptions cost little."""
HEADER_LIST: Final = 64 * 1024
FLUSH: Final = 256 * 1024
"""Bytes that are handed to the socket at once."""

Authenticate = Callable[[Mapping[str, str]], Awaitable[str]]
"""From a call's metadata to the user's name; raises `Refusal`."""

_PREFIX: Final = struct.Struct(">BI")
"""What comes before each message: whether it is compressed, and its length (gRPC over HTTP/2, "Requests")."""

NO_TIME: Final = 1e-3
"""Seconds. A call that is given no more is not begun: EventStoreDB has never answered by then, and clients round a
timeout of 0 up to this."""
LATENESS: Final = 0.1
"""Seconds until such a call is refused. The client's own clock ends it before: grpc's asyncio client takes a refusal
that comes while it is still sending for an internal error."""


class Connection(asyncio.Protocol):
    """One client's connection. Its calls are tasks of the server's group; they end with it."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        authenticate: Authenticate,
        group: asyncio.TaskGroup,
        connections: set[Connection],
        quiet: Callable[[], None],
    ) -> None:
        self._methods = methods
        self._authenticate = authenticate
        self._group = group
        self._connections = connections
        self._quiet = quiet
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._h2 = H2Connection(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
            )
        )
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: CALLS,
                SettingCodes.MAX_FRAME_SIZE: 1 << 18,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST,
            },
        )
        self._h2.max_inbound_frame_size = 1 << 18
        self._streams: dict[int, Stream] = {}
        self._paused = False
        self._leaving = False
        self._last = 0
        self._flushing = False

    # ---- the loop's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)
        tls = cast("ssl.SSLObject | None", transport.get_extra_info("ssl_object"))
        if tls is not None and tls.selected_alpn_protocol() not in (None, "h2"):
            transport.close()
            return
        sock = cast("socket.socket", transport.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65_535)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        for stream in list(self._streams.values()):
            self._end(stream)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._let_write()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._h2.receive_data(data):
                self._handle(event)
        except H2Error as error:
            log.info("connection.broken", peer=self.peer, reason=str(error) or type(error).__name__)
            self._flush()
            if self._transport is not None:
                self._transport.close()
            return
        self._flush()

    # ---- HTTP/2

    @property
    def peer(self) -> str:
        address = self._transport and self._transport.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else ""

    def _handle(self, event: Event) -> None:
        match event:
            case DataReceived():
                self._on_data(event)
            case RequestReceived():
                self._on_request(event.stream_id, event.headers or [])
            case StreamEnded():
                stream = self._streams.get(event.stream_id or 0)
                if stream is not None:
                    stream.half_closed = True
                    stream.wake()
            case StreamReset():
                stream = self._streams.get(event.stream_id or 0)
                if stream is not None:
                    self._end(stream)
            case ConnectionTerminated():
                if self._transport is not None:  # h2 sends nothing more on such a connection: nobody would be answered
                    self._transport.close()
            case _:
                self._let_write()  # windows and settings decide who may write

    def _on_request(self, number: int, fields: Any) -> None:
        headers = {
            bytes(name).decode("ascii", "replace"): bytes(value).decode("utf-8", "replace") for name, value in fields
        }
        stream = Stream(number)
        self._last = max(self._last, number)
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._h2.send_headers(number, [(b":status", b"415")], end_stream=True)
            return
        self._streams[number] = stream
        if self._leaving:
            self._finish(stream, _LEAVING)
            return
        stream.task = self._group.create_task(self._serve(stream, headers))

    def _on_data(self, event: DataReceived) -> None:
        number, size = event.stream_id, event.flow_controlled_length or 0
        stream = self._streams.get(number)
        if stream is None or stream.failure is not None:
            self._acknowledge(number, size)
            return
        stream.feed(event.data or b"")
        stream.unread += size
        if not stream.messages and stream.failure is None:
            # Part of a message that may be larger than the window: it must be let in to become whole.
            self._taken(stream)
        stream.wake()

    def _taken(self, stream: Stream) -> None:
        """The handler has what came: the client may send as much again."""
        size, stream.unread = stream.unread, 0
        if size:
            self._acknowledge(stream.number, size)

    def _acknowledge(self, number: int, size: int) -> None:
        if size and self._transport is not None:
            try:
                self._h2.acknowledge_received_data(size, number)
            except H2Error:
                return  # the call ended meanwhile; h2 gave the connection its share back
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is not None:
            data = self._h2.data_to_send()
            if data:
                self._transport.write(data)

    def _let_write(self) -> None:
        for stream in self._streams.values():
            if stream.writable is not None and not stream.writable.done():
                stream.writable.set_result(None)

    # ---- calls

    async def _serve(self, stream: Stream, headers: dict[str, str]) -> None:
        outcome: Refusal | None = None
        try:
            path = headers.get(":path", "")
            method = self._methods.get(path)
            if method is None:
                raise Refusal(Status.UNIMPLEMENTED, f"{path} is not supported by the Tidings server")
            stream.endless = method.endless
            call = Call(headers, self.peer, await self._authenticate(headers))
            seconds = seconds_of(headers.get("grpc-timeout", ""))
            if seconds is not None and seconds <= NO_TIME:
                await asyncio.sleep(LATENESS)
                raise _too_late()
            try:
                async with asyncio.timeout(seconds):
                    await self._answer(stream, method, call)
                if stream.cut_short:
                    raise _LEAVING
            except TimeoutError:
                raise _too_late() from None
        except Exception as error:
            outcome = refusal_of(error, headers.get(":path", ""))
        finally:
            self._finish(stream, outcome)

    async def _answer(self, stream: Stream, method: Method, call: Call) -> None:
        requests: Any = self._requests(stream, method)
        if not method.requests_stream:
            async for first in requests:
                requests = first
                break
            else:
                raise stream.failure or thrown()
        if method.unary is not None:
            answer = await method.unary(requests, call)
            await self._send(stream, [answer if isinstance(answer, bytes) else packed(answer)])
        elif method.streaming is not None:

            async def send(batch: list[bytes]) -> None:
                await self._send(stream, batch)

            await method.streaming(requests, call, send)

    async def _requests(self, stream: Stream, method: Method) -> AsyncIterator[Any]:
        parse = method.request.FromString
        while True:
            while stream.messages:
                message = stream.messages.popleft()
                if not stream.messages:
                    self._taken(stream)
                try:
                    request = parse(message)
                except Exception:  # protobuf's own DecodeError, which each of its implementations has elsewhere
                    raise Refusal(Status.INTERNAL, "Failed to deserialize message") from None
                yield request
            if stream.failure is not None:
                raise stream.failure
            if stream.half_closed:
                if stream.cut_short and method.unary is not None:
                    raise _LEAVING  # a part of what it asks for is not to be done
                return
            stream.waiter = self._loop.create_future()
            try:
                await stream.waiter
            finally:
                stream.waiter = None

    async def _send(self, stream: Stream, batch: list[bytes]) -> None:
        """Return when the batch has left for the socket. Waits for the client's windows and for the socket."""
        try:
            await self._write(stream, batch)
        except H2Error as error:
            # A task of the handler may come here before it hears that the call was cancelled.
            raise Gone from error

    async def _write(self, stream: Stream, batch: list[bytes]) -> None:
        frames = bytearray()
        for message in batch:
            frames += _PREFIX.pack(0, len(message))
            frames += message
        if not stream.headers_sent:
            stream.headers_sent = True
            self._h2.send_headers(stream.number, HEADERS)
        batch.clear()  # a client that does not read on keeps this once, not twice
        at, size, flushed = 0, len(frames), 0
        while at < size:
            room = 0 if self._paused else self._room(stream.number)
            if room <= 0:
                self._flush()
                stream.writable = self._loop.create_future()
                try:
                    await stream.writable
                finally:
                    stream.writable = None
                continue
            self._h2.send_data(stream.number, bytes(frames[at : at + room]))
            at += room
            if at - flushed >= FLUSH:
                flushed = at
                self._flush()
        self._schedule_flush()

    def _room(self, number: int) -> int:
        return int(min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size))

    def _finish(self, stream: Stream, outcome: Refusal | None) -> None:
        """Send the status, unless the call is over already."""
        if self._streams.pop(stream.number, None) is None or self._transport is None:
            return
        trailers = [*(() if stream.headers_sent else HEADERS), *trailers_of(outcome)]
        try:
            self._h2.send_headers(stream.number, trailers, end_stream=True)
            if not stream.half_closed or stream.cut_short:
                self._h2.reset_stream(stream.number, ErrorCodes.NO_ERROR)
            self._acknowledge(stream.number, stream.unread)
        except H2Error as error:
            log.debug("call.unanswered", peer=self.peer, reason=str(error))
        self._schedule_flush()
        if self._leaving and not self.busy:
            self._quiet()

    def _end(self, stream: Stream) -> None:
        """The client, or the connection, has ended the call."""
        self._streams.pop(stream.number, None)
        if stream.task is not None:
            stream.task.cancel()
        self._acknowledge(stream.number, stream.unread)

    # ---- leaving

    def leave(self) -> None:
        """Take no more calls, and tell the client; calls that have begun go on with the requests that have come."""
        self._leaving = True
        for stream in self._streams.values():
            if not stream.half_closed:
                stream.half_closed = stream.cut_short = True
                stream.wake()
        if self._transport is not None:
            self._flush()
            # By hand: h2 would regard the connection as closed, and send nothing more on it.
            self._transport.write(GoAwayFrame(0, last_stream_id=self._last, error_code=0).serialize())

    @property
    def busy(self) -> bool:
        """There are calls that will end by themselves."""
        return any(not stream.endless for stream in self._streams.values())

    def drop(self, refusal: Refusal) -> None:
        """End every call that is still open, and the connection."""
        for stream in list(self._streams.values()):
            self._finish(stream, refusal)
            if stream.task is not None:
                stream.task.cancel()
        self._close()

    def _close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()


def _too_late() -> Refusal:
    return Refusal(Status.DEADLINE_EXCEEDED, "Deadline Exceeded")


_LEAVING: Final = Refusal(Status.UNAVAILABLE, "Server Is Not Ready")
