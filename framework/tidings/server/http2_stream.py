"""One gRPC call as its connection sees it: messages cut from its bytes, and what waits for it. It touches no socket."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final
from urllib.parse import quote

import structlog

from tidings.errors import StoreError
from tidings.server.budgets import Charge
from tidings.server.calls import FRAME_LIMIT
from tidings.server.refusals import Refusal, Status, of_store_error, shown, thrown
from tidings.server.wire import Malformed

__all__ = ["HEADERS", "Gone", "Stream", "refusal_of", "seconds_of", "trailers_of"]

log = structlog.get_logger(__name__)

_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def seconds_of(timeout: str) -> float | None:
    """gRPC's timeout header; None for one that cannot be read, which is then ignored."""
    digits, unit = timeout[:-1], timeout[-1:]
    if unit not in _UNITS or not digits.isascii() or not digits.isdigit() or len(digits) > 8:
        return None
    return int(digits) * _UNITS[unit]


class Stream:
    """One call as the connection sees it: what came of its requests, and what waits for it."""

    def __init__(self, number: int, charge: Charge, began: float) -> None:
        self.number = number
        self.charge = charge
        self.began = began
        """When its first request, or the one that is arriving, began to arrive."""
        self.let_in = False
        """There is room for the whole of the request that is arriving."""
        self.incoming = 0
        """Bytes of requests that are charged."""
        self.stalled = 0.0
        """Since when the client has not read what waits for it; 0 while it reads."""
        self._heard = False
        self.buffer = bytearray()
        self.messages: deque[bytes] = deque()
        self.unread = 0
        """Bytes that the client may not send again until the handler has taken them."""
        self.half_closed = False
        self.cut_short = False
        """The server leaves, and takes no more requests although the client may have some."""
        self.endless = False
        self.headers_sent = False
        self.failure: Refusal | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.writable: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def arriving(self) -> bool:
        """It waits for the rest of a request, or for its first one."""
        return bool(self.buffer) or not (self._heard or self.half_closed)

    @property
    def missing(self) -> int:
        """Bytes of the request that is arriving, with those that have come; 0 while that is not known."""
        return 5 + int.from_bytes(self.buffer[1:5]) if len(self.buffer) >= 5 else 0

    def kept(self) -> int:
        """Bytes of requests that wait here."""
        return len(self.buffer) + sum(map(len, self.messages))

    def refuse(self, refusal: Refusal) -> None:
        """End it with this answer, whatever it waits for."""
        self.failure = refusal
        self.buffer.clear()
        self.wake()
        if self.writable is not None and not self.writable.done():
            self.writable.set_result(None)

    def feed(self, data: bytes, now: float) -> None:
        buffer = self.buffer
        if not buffer:
            self.began = now
        self.incoming += len(data)
        buffer += data
        at = 0
        while len(buffer) - at >= 5 and self.failure is None:
            size = int.from_bytes(buffer[at + 1 : at + 5])
            if size > FRAME_LIMIT:
                details = f"Received message larger than max ({size} vs. {FRAME_LIMIT})"
                self.failure = Refusal(Status.RESOURCE_EXHAUSTED, details)
            elif buffer[at]:
                self.failure = Refusal(
                    Status.UNIMPLEMENTED, "compressed messages are not supported: send them as they are"
                )
            elif len(buffer) - at < 5 + size:
                break
            else:
                self.messages.append(bytes(buffer[at + 5 : at + 5 + size]))
                self._heard, self.began = True, now
                at += 5 + size
        del buffer[:at]

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


# ---- how it ends -------------------------------------------------------------------

HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
TRAILER: Final = 8 * 1024
"""Bytes of one trailer, whatever it says."""
_MESSAGE: Final = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
_PLAIN: Final = f"%{_MESSAGE}"


class Gone(Exception):
    """The client has ended the call, or its connection: nobody hears the answer."""


def refusal_of(error: Exception, path: str) -> Refusal:
    """What the caller is told of an error in the handler. One that nobody expected is logged."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Refusal):
        return error
    if isinstance(error, StoreError):
        return of_store_error(error)
    if not isinstance(error, Malformed | Gone):
        log.error("call.failed", method=shown(path), exc_info=error)
    return thrown()


def trailers_of(outcome: Refusal | None) -> list[tuple[bytes, bytes]]:
    """The status as it travels; None: all went well."""
    if outcome is None:
        return [(b"grpc-status", b"0")]
    return [
        (b"grpc-status", b"%d" % outcome.code),
        (b"grpc-message", _escaped(outcome.details, _MESSAGE)),
        *((name.encode(), _escaped(value, _PLAIN)) for name, value in outcome.trailers),
    ]


def _escaped(text: str, safe: str) -> bytes:
    """As printable ASCII; a longer text ends with a whole escape."""
    data = quote(text[:TRAILER], safe=safe, errors="replace").encode()
    if len(data) <= TRAILER:
        return data
    cut = data[:TRAILER]
    escape = cut.rfind(b"%", -2)
    return cut if escape < 0 else cut[:escape]
