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
from hyperframe.frame import GoAwayFrame

from tidings.server.budgets import CALL, Allowance, Charge
from tidings.server.calls import Method
from tidings.server.connections import Connections
from tidings.server.frames import Frames
from tidings.server.http1 import Answer, Site, spoken
from tidings.server.http2_requests import Requests, server_side
from tidings.server.http2_serving import FLUSH, LEAVING, Authenticate, Serving
from tidings.server.http2_stream import HEADERS, Stream, trailers_of
from tidings.server.pace import Pace
from tidings.server.refusals import Refusal, shown

__all__ = ["Connection"]

log = structlog.get_logger(__name__)

SLICE: Final = 8 * 1024
"""Bytes of what has come that are looked at in one turn of the loop, so that others have theirs."""
LINGER: Final = 5.0
"""Seconds in which a client whose connection is ended may read why."""
UNREAD: Final = 1024 * 1024
"""Bytes of small answers (to pings, to settings) that a client may leave unread."""


class Connection(asyncio.Protocol):
    """One client's connection. Its calls are tasks of the server's group; they end with it."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        authenticate: Authenticate,
        group: asyncio.TaskGroup,
        connections: Connections,
        quiet: Callable[[], None],
        site: Site,
    ) -> None:
        self._serving = Serving(self, methods, authenticate)
        self._group = group
        self._connections = connections
        self._quiet = quiet
        self._site = site
        self._begun = False
        """It speaks HTTP/2: until its first bytes have come, it may speak HTTP/1."""
        self.allowance = Allowance(connections.treasury)
        self._calls = self.allowance.limits.streams
        """Calls that it may have open."""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.peer = ""
        self._h2 = server_side(self._calls)
        self._requests = Requests(self._h2, self.allowance, connections.relieve, self.schedule_flush)
        self._frames = Frames()
        self._counted = 0
        """Frames that were whole when the one began to arrive that has not."""
        self._arriving_since = 0.0
        self._pace = Pace(self.allowance.limits.slowest_reader, self.allowance.limits.stalled_seconds)
        """The pace at which the client takes what was handed to its socket."""
        self._unsent = 0
        """Bytes that the socket has not taken."""
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
        address = transport.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else ""
        if not self._connections.admit(self):
            self._abort_with("too many connections")
            return
        tls = cast("ssl.SSLObject | None", transport.get_extra_info("ssl_object"))
        if tls is not None and tls.selected_alpn_protocol() not in (None, "h2", "http/1.1"):
            transport.close()
            return
        sock = cast("socket.socket", transport.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        for stream in list(self._streams.values()):
            self._end(stream)
        self.allowance.line.clear()

    def pause_writing(self) -> None:
        self._paused = True
        self._pace.wait(self._loop.time())

    def resume_writing(self) -> None:
        self._paused = False
        self._pace.rest(self._loop.time())
        self._count()
        self._let_write()

    def data_received(self, data: bytes) -> None:
        waiting = bool(self._inbox)
        self._inbox += data
        if not waiting or not self._begun:
            self._look()

    def _look(self) -> None:
        """Look at a slice of what has come, and at the rest after the others' turns."""
        if self._is_closing():
            self._inbox.clear()
            return
        if not self._begun and not self._begin():
            return
        piece = bytes(self._inbox[:SLICE])
        del self._inbox[:SLICE]
        if not self._frames.feed(piece):
            self.end_for("the headers of a call are too long")
            return
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
            return
        self._count()
        if self.allowance.line.bytes and self.allowance.line.excess():
            self._connections.relieve()
            if self.allowance.line.excess():
                self.end_for("more of its bytes wait than the server has room for")
                return
        if self._inbox:
            self._transport.pause_reading()
            self._loop.call_soon(self._look)
        else:
            self._transport.resume_reading()

    def _begin(self) -> bool:
        """Return whether it speaks HTTP/2. Answer it if it speaks HTTP/1, which is all that it may say then."""
        kind = spoken(self._inbox)
        if kind is False:
            self._begun = True
            self._h2.initiate_connection()
            self._requests.trust()
            self.flush()
            return True
        answer = self._site.respond(self._inbox) if kind else None
        if answer is not None and self._transport is not None:
            self._inbox.clear()
            self._transport.write(answer)
            self._transport.close()
        self._count()
        return False

    def _count(self) -> None:
        """Charge what lies here: bytes that are no request yet, and answers that the client has not taken."""
        frames = self._frames
        if frames.done != self._counted or not frames.unfinished:
            self._counted, self._arriving_since = frames.done, self._loop.time()
        unsent = 0 if self._is_closing() else cast("asyncio.Transport", self._transport).get_write_buffer_size()
        if unsent < self._unsent and self._pace.waits:
            self._pace.took(self._unsent - unsent, self._loop.time())
        self._unsent = unsent
        line = self.allowance.line
        line.hold(len(self._inbox) + frames.unfinished + unsent - line.bytes)

    def end_for(self, reason: str) -> None:
        """The client has used up a budget of its connection: say so once, and end it with all of its calls."""
        if self._ended:
            return
        self._connections.treasury.refused[reason] += 1
        log.info("connection.ended", peer=self.peer, reason=reason)
        for stream in list(self._streams.values()):
            self._end(stream)
        self._abort_with(reason)

    def _abort_with(self, reason: str) -> None:
        transport, self._ended = self._transport, True
        self._inbox.clear()
        if transport is None or self._is_closing():
            return
        self.flush()
        calm, said = ErrorCodes.ENHANCE_YOUR_CALM, reason.encode()
        frame = GoAwayFrame(0, last_stream_id=self._last, error_code=calm, additional_data=said)
        transport.write(frame.serialize())
        if transport.get_write_buffer_size() > FLUSH:
            transport.abort()  # it does not read: what waits for it would wait for ever
        else:
            transport.close()
            self._loop.call_later(LINGER, transport.abort)

    def _is_closing(self) -> bool:
        """Nothing may be asked of such a transport: one with TLS fails."""
        return self._transport is None or self._transport.is_closing()

    # ---- HTTP/2

    def _handle(self, event: Event) -> None:
        match event:
            case DataReceived():
                if not event.data and event.stream_ended is None and not self.allowance.frames.take():
                    self.end_for("too many frames without data")
                    return
                self._requests.came(event, self._streams.get(event.stream_id or 0), self._loop.time())
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
                self._close()  # h2 sends nothing more on such a connection: nobody would be answered
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
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._answer_plainly(number, headers)
            return
        charge = Charge(self.allowance)
        stream = Stream(number, charge, self._loop.time(), self._serving.longest(headers.get(":path", "")))
        stream.encoding = headers.get("grpc-encoding", "")
        self._streams[number] = stream
        if self._leaving:
            self.finish(stream, LEAVING)
            return
        charge.hold(CALL + sum(len(name) + len(value) for name, value in headers.items()))
        if charge.excess():
            self._connections.relieve()
            if budget := charge.excess():
                refusal = self._connections.treasury.refusal("calls", f"More bytes wait than the server's {budget}.")
                self.finish(stream, refusal)
                return
        stream.task = self._group.create_task(self._serving.serve(stream, headers))

    def _answer_plainly(self, number: int, headers: dict[str, str]) -> None:
        method = headers.get(":method", "")
        known = method in ("GET", "HEAD")
        answer = self._site.answer(method, headers.get(":path", "")) if known else Answer(415)
        body = b"" if method == "HEAD" else answer.body
        self._h2.send_headers(number, [(b":status", b"%d" % answer.status)], end_stream=not body)
        if body:
            self._h2.send_data(number, body, end_stream=True)

    def have_read(self, stream: Stream) -> None:
        """All messages that were whole are with the handler."""
        self._requests.have_read(stream)

    def trust(self) -> None:
        """Somebody has called with the right credentials, or without any."""
        self._requests.trust()

    def schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._transport is not None and not self._transport.is_closing():
            data = self._h2.data_to_send()
            if data:
                self._transport.write(data)
                if self._transport.get_write_buffer_size():
                    self._count()

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
        self._requests.over(stream)
        if self._streams.pop(stream.number, None) is None or self._transport is None:
            return
        self.since = self._loop.time()
        trailers = [*(() if stream.headers_sent else HEADERS), *trailers_of(outcome)]
        try:
            self._h2.send_headers(stream.number, trailers, end_stream=True)
            if not stream.half_closed or stream.cut_short:
                self._h2.reset_stream(stream.number, ErrorCodes.NO_ERROR)
            self._requests.forget(stream)
        except H2Error as error:
            log.debug("call.unanswered", peer=self.peer, reason=str(error))
        self.schedule_flush()
        if self._leaving and not self.busy:
            self._quiet()

    def _end(self, stream: Stream) -> None:
        """The client, or the connection, has ended the call."""
        self._requests.over(stream)
        self._streams.pop(stream.number, None)
        self.since = self._loop.time()
        if stream.task is not None:
            stream.task.cancel()
        if self._transport is not None:
            self._requests.forget(stream)

    # ---- leaving

    def leave(self) -> None:
        """Take no more calls, and tell the client; calls that have begun go on with the requests that have come."""
        self._leaving = True
        for stream in self._streams.values():
            if not stream.half_closed:
                stream.half_closed = stream.cut_short = True
                stream.wake()
        if self._begun and self._transport is not None and not self._transport.is_closing():
            self.flush()
            # By hand: h2 would regard the connection as closed, and send nothing more on it.
            self._transport.write(GoAwayFrame(0, last_stream_id=self._last, error_code=0).serialize())

    # ---- clients that are slow

    @property
    def idle(self) -> bool:
        """Whether it has no calls."""
        return not self._streams

    def late(self, now: float) -> float:
        """Return the seconds for which the client has taken too slowly what was handed to its socket; 0 or less if it
        has not."""
        self._count()
        return self._pace.late(now)

    @property
    def streams(self) -> Iterable[Stream]:
        """Its calls."""
        return self._streams.values()

    def look_for_slow(self, now: float) -> None:
        """End what takes too long to arrive."""
        limits = self.allowance.limits
        if not self._greeted and now - self.since > limits.handshake_seconds:
            self.end_for("no request came in time")
        elif self._frames.unfinished and now - self._arriving_since > limits.request_seconds:
            self.end_for("a frame did not arrive in time")
        for stream in list(self._streams.values()):
            if (refusal := stream.overdue(now, limits.request_seconds)) is not None:
                stream.refuse(refusal)

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
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
