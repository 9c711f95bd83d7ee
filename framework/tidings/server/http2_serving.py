"""A call from its first request to its status: authentication, deadline, handler, answers. It knows no frames."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import structlog
from h2.exceptions import H2Error

from tidings.server.budgets import Allowance
from tidings.server.calls import PUBLIC_LIMIT, Call, Method
from tidings.server.compression import Compressed, unpacked
from tidings.server.http2_stream import Gone, Stream, refusal_of, seconds_of
from tidings.server.protocol import packed
from tidings.server.refusals import Refusal, Status, let_go, shown, thrown, unimplemented
from tidings.server.weight import LIGHT, hold_parsed, malformed

__all__ = ["FLUSH", "LEAVING", "Authenticate", "Serving"]

log = structlog.get_logger(__name__)

FLUSH: Final = 64 * 1024
"""Bytes that are handed to the socket at once."""
Authenticate = Callable[[Mapping[str, str], Allowance, bool], Awaitable[str]]
"""From a call's metadata, and whether its method is public, to the user's name; raises `Refusal`."""

_PREFIX: Final = struct.Struct(">BI")
"""What comes before each message: whether it is compressed, and its length (gRPC over HTTP/2, "Requests")."""

NO_TIME: Final = 1e-3
"""Seconds. A call that is given no more is not begun: EventStoreDB has never answered by then, and clients round a
timeout of 0 up to this."""
LATENESS: Final = 0.1
"""Seconds until such a call is refused. The client's own clock ends it before: grpc's asyncio client takes a refusal
that comes while it is still sending for an internal error."""


LEAVING: Final = Refusal(Status.UNAVAILABLE, "Server Is Not Ready")


class Line(Protocol):
    """A connection as its calls see it."""

    allowance: Allowance

    @property
    def peer(self) -> str: ...

    def begin(self, stream: Stream) -> None: ...

    def write(self, stream: Stream, data: bytes) -> None: ...

    def room(self, stream: Stream) -> int: ...

    def flush(self) -> None: ...

    def schedule_flush(self) -> None: ...

    def have_read(self, stream: Stream) -> None: ...

    def relieve(self) -> None: ...

    def trust(self) -> None: ...

    def finish(self, stream: Stream, outcome: Refusal | None) -> None: ...

    def end_for(self, reason: str) -> None: ...


class Serving:
    """The calls of one connection."""

    def __init__(self, line: Line, methods: Mapping[str, Method], authenticate: Authenticate) -> None:
        self._line = line
        self._methods = methods
        self._authenticate = authenticate

    def longest(self, path: str) -> int:
        """Return the bytes of the longest request of a method."""
        method = self._methods.get(path)
        return PUBLIC_LIMIT if method is None else method.longest

    async def serve(self, stream: Stream, headers: dict[str, str]) -> None:
        """Answer a call. A fault here ends the call, and not the server."""
        try:
            await self._serve(stream, headers)
        except Exception:
            log.exception("call.not_ended", method=shown(headers.get(":path", "")))

    async def _serve(self, stream: Stream, headers: dict[str, str]) -> None:
        outcome: Refusal | None = None
        try:
            path = headers.get(":path", "")
            method = self._methods.get(path)
            if method is None:
                raise unimplemented(path)
            stream.endless = method.endless
            user = await self._authenticate(headers, self._line.allowance, method.public)
            stream.charge.of(user)
            self._line.trust()
            call = Call(headers, self._line.peer, user, stream.charge)
            seconds = seconds_of(headers.get("grpc-timeout", ""))
            if seconds is not None and seconds <= NO_TIME:
                await asyncio.sleep(LATENESS)
                raise _too_late()
            try:
                async with asyncio.timeout(seconds):
                    await self._answer(stream, method, call)
                if stream.cut_short:
                    raise LEAVING
            except TimeoutError:
                raise _too_late() from None
        except asyncio.CancelledError:
            outcome = LEAVING  # by the group of all calls: nobody may take half an answer for a whole one
            raise
        except Exception as error:
            outcome = refusal_of(error, headers.get(":path", ""))
            let_go(error)
        finally:
            self._line.finish(stream, outcome)
            if self._line.allowance.failed_logins >= self._line.allowance.limits.failed_logins:
                self._line.end_for("too many wrong passwords")

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
                message, apart = stream.messages.popleft(), 0
                stream.handling = len(message)  # until the handler asks for the next one
                if isinstance(message, Compressed):
                    message = await unpacked(message, stream.encoding, method.longest, stream.charge)
                    apart = len(message)
                if not stream.messages:
                    self._line.have_read(stream)
                if len(message) > LIGHT:
                    apart += await hold_parsed(message, method.request, stream.charge)
                try:
                    request = parse(message)
                except Exception:  # protobuf's own DecodeError, which each of its implementations has elsewhere
                    raise malformed() from None
                yield request
                stream.charge.hold(-apart)
            if stream.handling:
                stream.handling = 0
                self._line.have_read(stream)
            if stream.failure is not None:
                raise stream.failure
            if stream.half_closed:
                if stream.cut_short and method.unary is not None:
                    raise LEAVING  # a part of what it asks for is not to be done
                return
            stream.waiter = asyncio.get_running_loop().create_future()
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
        self._line.begin(stream)
        batch.clear()  # a client that does not read on keeps this once, not twice
        loop = asyncio.get_running_loop()
        at, size, flushed = 0, len(frames), 0
        charged = 0
        try:
            while at < size:
                if stream.refused is not None:
                    raise stream.refused
                room = self._line.room(stream)
                if room <= 0:
                    self._line.flush()
                    stream.charge.hold(size - charged)
                    charged = size
                    if stream.charge.excess():
                        self._line.relieve()
                    await self._writable(stream)
                    continue
                self._line.write(stream, bytes(frames[at : at + room]))
                at += room
                if stream.pace.waits:
                    stream.pace.took(room, loop.time())
                if at - flushed >= FLUSH:
                    flushed = at
                    self._line.flush()
        finally:
            stream.charge.hold(-charged)
            if stream.pace.waits:
                stream.pace.rest(loop.time())
        self._line.schedule_flush()

    async def _writable(self, stream: Stream) -> None:
        """Wait until the client's windows or the socket have changed."""
        loop = asyncio.get_running_loop()
        stream.pace.wait(loop.time())
        stream.writable = loop.create_future()
        try:
            await stream.writable
        finally:
            stream.writable = None


def _too_late() -> Refusal:
    return Refusal(Status.DEADLINE_EXCEEDED, "Deadline Exceeded")
