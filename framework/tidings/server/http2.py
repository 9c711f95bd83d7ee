"""gRPC over HTTP/2 on h2, the server's side: connections, frames, flow control. It knows nothing of events.

Why not grpc.aio: it pays 50 to 150 µs for every message that is sent, while here one DATA frame carries many.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
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
    TrailersReceived,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from tidings.server.budgets import Allowance, Charge
from tidings.server.calls import Method
from tidings.server.connections import Connections
from tidings.server.http2_serving import FLUSH, LEAVING, Authenticate, Serving
from tidings.server.http2_stream import HEADERS, Stream, trailers_of
from tidings.server.refusals import Refusal, exhausted, shown

__all__ = ["Connection"]

log = structlog.get_logger(__name__)

WINDOW: Final = 256 * 1024
"""Bytes of requests that a call may send ahead of its handler. A larger request asks for room first."""
FRAME: Final = 128 * 1024
"""Bytes of a frame from the client."""
HEADER_LIST: Final = 16 * 1024
"""Bytes of a call's metadata."""
SLICE: Final = 8 * 1024
"""Bytes of what has come that are looked at in one turn of the loop, so that others have theirs."""
OVER: Final = 2
"""How many times the announced number of calls h2 lets in: what is above the number is refused call by call."""
UNREAD: Final = 1024 * 1024
"""Bytes of small answers (to pings, to settings) that a client may leave unread."""


class _Announced(Settings):
    """h2's settings. h2 ends a connection that has one call too many; here such a call is refused by itself."""

    @property  # type: ignore[misc]  # nothing sets it
    def max_concurrent_streams(self) -> int:
        return OVER * super().max_concurrent_streams


class Connection(asyncio.Protocol):
    """One client's connection. Its calls are tasks of the server's group; they end with it."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        authenticate: Authenticate,
        group: asyncio.TaskGroup,
        connections: Connections,
        quiet: Callable[[], None],
    ) -> None:
        self._serving = Serving(self, methods, authenticate)
        self._group = group
        self._connections = connections
        self._quiet = quiet
        self.allowance = Allowance(connections.treasury)
        self._calls = self.allowance.limits.streams
        """Calls that it may have open."""
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
        self._h2.local_settings = _Announced(
            client=False,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: self._calls,
                SettingCodes.MAX_FRAME_SIZE: FRAME,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST,
            },
        )
        self._h2.max_inbound_frame_size = FRAME
        self._h2.decoder.max_header_list_size = HEADER_LIST
        self._streams: dict[int, Stream] = {}
        self._inbox = bytearray()
        """What has come and was not looked at yet."""
        self.since = self._loop.time()
        """When it connected, or when its last call ended."""
        self._greeted = False
        self._ended = False
        self._paused = False
        self._leaving = False
        self._last = 0
        self._flushing = False

    # ---- the loop's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._connections.admit(self):
            self._abort_with("too many connections")
            return
        tls = cast("ssl.SSLObject | None", transport.get_extra_info("ssl_object"))
        if tls is not None and tls.selected_alpn_protocol() not in (None, "h2"):
            transport.close()
            return
        sock = cast("socket.socket", transport.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._h2.initiate_connection()
        # Room for the windows of all calls: what one call leaves there does not stop the others.
        self._h2.increment_flow_control_window((self._calls + 1) * WINDOW - 65_535)
        self.flush()

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
        waiting = bool(self._inbox)
        self._inbox += data
        if not waiting:
            self._look()

    def _look(self) -> None:
        """Look at a slice of what has come, and at the rest after the others' turns."""
        if self._transport is None or self._transport.is_closing():
            self._inbox.clear()
            return
        piece = bytes(self._inbox[:SLICE])
        del self._inbox[:SLICE]
        try:
            for event in self._h2.receive_data(piece):
                self._handle(event)
                if self._ended:
                    return
        except H2Error as error:
            log.info("connection.broken", peer=self.peer, reason=shown(str(error) or type(error).__name__))
            self._inbox.clear()
            self._close()
            return
        self.flush()
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > UNREAD + FLUSH:
            self.end_for("its answers are not read")
        elif self._inbox:
            self._transport.pause_reading()
            self._loop.call_soon(self._look)
        else:
            self._transport.resume_reading()

    def end_for(self, reason: str) -> None:
        """The client has used up a budget of its connection: say so, and end it with all of its calls."""
        self._connections.treasury.refused[reason] += 1
        log.info("connection.ended", peer=self.peer, reason=reason)
        for stream in list(self._streams.values()):
            self._end(stream)
        self._abort_with(reason)

    def _abort_with(self, reason: str) -> None:
        transport, self._ended = self._transport, True
        if transport is None:
            return
        self._inbox.clear()
        self.flush()
        if not transport.is_closing():
            transport.write(
                GoAwayFrame(
                    0,
                    last_stream_id=self._last,
                    error_code=ErrorCodes.ENHANCE_YOUR_CALM,
                    additional_data=reason.encode(),
                ).serialize()
            )
        if transport.get_write_buffer_size() > FLUSH:
            transport.abort()  # it does not read: what waits for it would wait for ever
        else:
            transport.close()

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
                self._greeted = True
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
                    if not stream.headers_sent and not self.allowance.resets.take():
                        self.end_for("too many calls were given up before they were answered")
            case TrailersReceived():
                pass
            case ConnectionTerminated():
                if self._transport is not None:  # h2 sends nothing more on such a connection: nobody would be answered
                    self._transport.close()
            case _:
                self._greeted = True
                if not self.allowance.frames.take():
                    self.end_for("too many frames without data")
                    return
                self._let_write()  # windows and settings decide who may write

    def _on_request(self, number: int, fields: Any) -> None:
        headers = {
            bytes(name).decode("ascii", "replace"): bytes(value).decode("utf-8", "replace") for name, value in fields
        }
        self._last = max(self._last, number)
        if len(self._streams) >= self._calls:
            self._h2.reset_stream(number, ErrorCodes.REFUSED_STREAM)
            if not self.allowance.frames.take():
                self.end_for("too many calls at once")
            return
        stream = Stream(number, Charge(self.allowance), self._loop.time())
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._h2.send_headers(number, [(b":status", b"415")], end_stream=True)
            return
        self._streams[number] = stream
        if self._leaving:
            self.finish(stream, LEAVING)
            return
        stream.task = self._group.create_task(self._serving.serve(stream, headers))

    def _on_data(self, event: DataReceived) -> None:
        number, size, data = event.stream_id, event.flow_controlled_length or 0, event.data or b""
        stream = self._streams.get(number)
        if not data and event.stream_ended is None and not self.allowance.frames.take():
            self.end_for("too many frames without data")
            return
        if stream is None or stream.failure is not None:
            self._acknowledge(number, size)
            return
        stream.feed(data, self._loop.time())
        stream.unread += size
        stream.charge.hold(len(data))
        if stream.failure is None and stream.charge.excess():
            self._relieve(stream)
        if not stream.messages and stream.failure is None and stream.missing > WINDOW:
            # Part of a message that is larger than the window: it must be let in to become whole.
            self.allowance.large.ask(stream, stream.missing, lambda: self._let_in(stream))
            if stream.let_in:
                self._taken(stream)
        stream.wake()

    def _let_in(self, stream: Stream) -> None:
        stream.let_in = True
        if stream.number in self._streams:
            self._taken(stream)

    def _relieve(self, stream: Stream) -> None:
        """Too many bytes wait: end readers that have stalled, and where that is not enough, refuse this request."""
        self._connections.relieve()
        if budget := stream.charge.excess():
            stream.refuse(exhausted(f"More bytes wait than the server's {budget}: send less at once."))

    def _taken(self, stream: Stream) -> None:
        """The handler has what came: the client may send as much again."""
        size, stream.unread = stream.unread, 0
        if size:
            self._acknowledge(stream.number, size)

    def have_read(self, stream: Stream) -> None:
        """All messages that were whole are with the handler."""
        self._taken(stream)
        stream.charge.hold(stream.kept() - stream.incoming)
        stream.incoming = stream.kept()
        if stream.let_in or not stream.buffer:
            stream.let_in = False
            self.allowance.large.give_back(stream)

    def _acknowledge(self, number: int, size: int) -> None:
        if size and self._transport is not None:
            try:
                self._h2.acknowledge_received_data(size, number)
            except H2Error:
                return  # the call ended meanwhile; h2 gave the connection its share back
            self.schedule_flush()

    def schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._transport is not None:
            data = self._h2.data_to_send()
            if data:
                self._transport.write(data)

    def _let_write(self) -> None:
        for stream in self._streams.values():
            if stream.writable is not None and not stream.writable.done():
                stream.writable.set_result(None)

    # ---- for the calls

    def begin(self, stream: Stream) -> None:
        """Send the headers of the answer."""
        if not stream.headers_sent:
            stream.headers_sent = True
            self._h2.send_headers(stream.number, HEADERS)

    def write(self, stream: Stream, data: bytes) -> None:
        """Send what there is room for."""
        self._h2.send_data(stream.number, data)
        self.allowance.frames.give(4)  # the client answers with windows

    def room(self, stream: Stream) -> int:
        """Bytes that the client's windows and the socket let the call send now."""
        if self._paused:
            return 0
        return int(min(self._h2.local_flow_control_window(stream.number), self._h2.max_outbound_frame_size))

    def relieve(self) -> None:
        """Some budget of bytes is used up."""
        self._connections.relieve()

    def finish(self, stream: Stream, outcome: Refusal | None) -> None:
        """Send the status, unless the call is over already."""
        stream.charge.clear()
        self.allowance.large.give_back(stream)
        if self._streams.pop(stream.number, None) is None or self._transport is None:
            return
        self.since = self._loop.time()
        trailers = [*(() if stream.headers_sent else HEADERS), *trailers_of(outcome)]
        try:
            self._h2.send_headers(stream.number, trailers, end_stream=True)
            if not stream.half_closed or stream.cut_short:
                self._h2.reset_stream(stream.number, ErrorCodes.NO_ERROR)
            self._acknowledge(stream.number, stream.unread)
        except H2Error as error:
            log.debug("call.unanswered", peer=self.peer, reason=str(error))
        self.schedule_flush()
        if self._leaving and not self.busy:
            self._quiet()

    def _end(self, stream: Stream) -> None:
        """The client, or the connection, has ended the call."""
        stream.charge.clear()
        self._streams.pop(stream.number, None)
        self.since = self._loop.time()
        self.allowance.large.give_back(stream)
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
            self.flush()
            # By hand: h2 would regard the connection as closed, and send nothing more on it.
            self._transport.write(GoAwayFrame(0, last_stream_id=self._last, error_code=0).serialize())

    # ---- clients that are slow

    @property
    def idle(self) -> bool:
        """Whether it has no calls."""
        return not self._streams

    @property
    def streams(self) -> Iterable[Stream]:
        """Its calls."""
        return self._streams.values()

    def look_for_slow(self, now: float) -> None:
        """End what takes too long to arrive."""
        limits = self.allowance.limits
        if not self._greeted and now - self.since > limits.handshake_seconds:
            self.end_for("no request came in time")
        for stream in list(self._streams.values()):
            if stream.failure is None and stream.arriving and now - stream.began > limits.request_seconds:
                stream.refuse(exhausted(f"The request did not arrive within {limits.request_seconds:g} s."))

    @property
    def busy(self) -> bool:
        """There are calls that will end by themselves."""
        return any(not stream.endless for stream in self._streams.values())

    def drop(self, refusal: Refusal) -> None:
        """End every call that is still open, and the connection."""
        for stream in list(self._streams.values()):
            self.finish(stream, refusal)
            if stream.task is not None:
                stream.task.cancel()
        self._close()

    def _close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()
