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
from tidings.server.compression import ACCEPTED, Compressed
from tidings.server.pace import Pace
from tidings.server.refusals import Refusal, Status, exhausted, of_store_error, shown, thrown
from tidings.server.wire import Malformed

__all__ = ["HEADERS", "WINDOW", "Gone", "Stream", "refusal_of", "seconds_of", "trailers_of"]

log = structlog.get_logger(__name__)

WINDOW: Final = 256 * 1024
"""Bytes of requests that a call may send ahead of its handler. A larger request asks for room first."""
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def seconds_of(timeout: str) -> float | None:
    """gRPC's timeout header; None for one that cannot be read, which is then ignored."""
    digits, unit = timeout[:-1], timeout[-1:]
    if unit not in _UNITS or not digits.isascii() or not digits.isdigit() or len(digits) > 8:
        return None
    return int(digits) * _UNITS[unit]


class Stream:
    """One call as the connection sees it: what came of its requests, and what waits for it."""

    def __init__(self, number: int, charge: Charge, began: float, longest: int = FRAME_LIMIT) -> None:
        self.number = number
        self.charge = charge
        self._longest = longest
        limits = charge.allowance.limits
        self.pace = Pace(limits.slowest_reader, limits.stalled_seconds)
        self.began = began
        """When its first request, or the one that is arriving, began to arrive; later by the time in which the client
        could send nothing of it."""
        self.withheld: float | None = None
        """Since when the client may send nothing of the request that is arriving, because what came before it waits for
        the handler, or because there is no room for all of it."""
        self.let_in = False
        """There is room for the whole of the request that is arriving."""
        self.incoming = 0
        """Bytes of requests that are charged."""
        self.handling = 0
        """Bytes of the request that the handler has."""
        self.encoding = ""
        """How the client compresses requests."""
        self._heard = False
        self.buffer = bytearray()
        self.messages: deque[bytes] = deque()
        self.unread = 0
        """Bytes that the client may not send again until the handler has taken them."""
        self.half_closed = False
        self.cut_short = False
        """The server leaves, and takes no more requests although the client may have some."""
        self.endless = False
        self.over = False
        self.headers_sent = False
        self.failure: Refusal | None = None
        """Why there are no more requests."""
        self.refused: Refusal | None = None
        """Why there are no more answers, either."""
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

    def withhold(self, now: float) -> None:
        """The client has sent all that it may for now."""
        if self.withheld is None:
            self.withheld = now

    def let_go_on(self, now: float) -> None:
        """The client may send more."""
        if self.withheld is not None:
            self.began += now - self.withheld
            self.withheld = None

    def overdue(self, now: float, seconds: float) -> Refusal | None:
        """Return why its request is refused if the client has had it in its hands for longer than that, or if it has
        waited longer for room; None otherwise. While it waits for the handler of an earlier one, no time passes."""
        if self.failure is not None or not self.arriving:
            return None
        if (now if self.withheld is None else self.withheld) - self.began > seconds:
            return exhausted(f"The request did not arrive within {seconds:g} s.")
        waits_for_room = not self.let_in and not self.messages and self.missing > WINDOW
        if self.withheld is not None and waits_for_room and now - self.withheld > seconds:
            return exhausted(f"There was no room for a request of {self.missing} bytes within {seconds:g} s.")
        return None

    def kept(self) -> int:
        """Bytes of requests that wait here."""
        return self.handling + len(self.buffer) + sum(map(len, self.messages))

    def late(self, now: float) -> float:
        """Return the seconds for which its client has taken answers too slowly; 0 or less if it has not."""
        return self.pace.late(now)

    def refuse(self, refusal: Refusal) -> None:
        """End it with this answer, whatever it waits for."""
        self.failure = self.refused = refusal
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
            if size > self._longest:
                details = f"Received message larger than max ({size} vs. {self._longest})"
                self.failure = Refusal(Status.RESOURCE_EXHAUSTED, details)
            elif buffer[at] > 1:
                self.failure = Refusal(Status.INTERNAL, "Unexpected compressed flag value in message header.")
            elif len(buffer) - at < 5 + size:
                break
            else:
                kind = Compressed if buffer[at] else bytes
                self.messages.append(kind(buffer[at + 5 : at + 5 + size]))
                self._heard, self.began = True, now
                at += 5 + size
        del buffer[:at]

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


# ---- how it ends -------------------------------------------------------------------

HEADERS: Final = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", ACCEPTED.encode()),
)
TRAILER: Final = 8 * 1024
"""Bytes of one trailer, whatever it says."""
TRAILERS: Final = 8000
"""Bytes of all trailers, for which the text is cut: above 8192, gRPC's clients refuse some answers, at random, with a
status of their own."""
ENTRY: Final = 32
"""Bytes that a trailer counts for beside its name and value (HTTP/2, section 6.5.2)."""
SHORTEST: Final = 256
"""Bytes of the text that are sent in any case."""
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
    trailers = [(name.encode(), _escaped(value, _PLAIN)) for name, value in outcome.trailers]
    left = TRAILERS - sum(len(name) + len(value) + ENTRY for name, value in trailers)
    message = _escaped(outcome.details, _MESSAGE, max(left, SHORTEST))
    return [(b"grpc-status", b"%d" % outcome.code), (b"grpc-message", message), *trailers]


def _escaped(text: str, safe: str, most: int = TRAILER) -> bytes:
    """As printable ASCII; a longer text ends with a whole escape."""
    data = quote(text[:most], safe=safe, errors="replace").encode()
    if len(data) <= most:
        return data
    cut = data[:most]
    escape = cut.rfind(b"%", -2)
    return cut if escape < 0 else cut[:escape]
