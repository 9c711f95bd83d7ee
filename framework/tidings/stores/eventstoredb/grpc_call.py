"""One gRPC call: its messages, its window, what its status means. It knows no frames of HTTP/2, and no events."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, Protocol, Self
from urllib.parse import unquote

from h2.errors import ErrorCodes

__all__ = [
    "MESSAGE_LIMIT",
    "WINDOW",
    "Call",
    "CallFailed",
    "CertificateRefused",
    "ConnectionLost",
    "Status",
    "TlsWanted",
]

WINDOW: Final = 1 << 20
"""Bytes of one call that may have come and not been read."""
MESSAGE_LIMIT: Final = 17 * 1024 * 1024
"""Bytes of one message; a longer one ends its call."""

_PREFIX: Final = struct.Struct(">BI")


class Status(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# gRPC over HTTP/2, "Errors" and "HTTP2 Transport Mapping".
_BY_HTTP: Final = {
    "400": Status.INTERNAL,
    "401": Status.UNAUTHENTICATED,
    "403": Status.PERMISSION_DENIED,
    "404": Status.UNIMPLEMENTED,
    "429": Status.UNAVAILABLE,
    "502": Status.UNAVAILABLE,
    "503": Status.UNAVAILABLE,
    "504": Status.UNAVAILABLE,
}
_BY_RESET: Final = {
    ErrorCodes.REFUSED_STREAM: Status.UNAVAILABLE,
    ErrorCodes.CANCEL: Status.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: Status.PERMISSION_DENIED,
}


class CallFailed(Exception):
    """One call ended with another status than OK; the connection lives on. `trailers` have lower-case names."""

    def __init__(self, status: Status, details: str, trailers: dict[str, str] | None = None) -> None:
        self.status, self.details, self.trailers = status, details, trailers or {}
        super().__init__(f"{status.name}: {details}" if details else status.name)


class ConnectionLost(Exception):
    """The connection could not be made, or is gone: what its calls had asked for may or may not have happened."""


class CertificateRefused(ConnectionLost):
    """The server's certificate is not one that this side trusts for that name."""


class TlsWanted(ConnectionLost):
    """The other side speaks TLS, and this one was told not to."""


class Carrier(Protocol):
    """What a call needs of its connection."""

    def sending(self, call: Call) -> None:
        """The call has something to send."""
        ...

    def have_read(self, call: Call, size: int) -> None:
        """The call's reader took so many bytes: the other side may send as many again."""
        ...

    def forget(self, call: Call, code: ErrorCodes) -> None:
        """This side has ended the call."""
        ...


class Call:
    """One call: messages to send, messages that come, and a status. Use it in a `with` block, which ends it."""

    def __init__(self, connection: Carrier, number: int) -> None:
        self._connection = connection
        self.number = number
        self._input = bytearray()
        self._unread = 0
        self.output = bytearray()
        """What waits for the other side's window."""
        self.ending = self.ended = False
        """This side will send, has sent, its last message."""
        self._headers: dict[str, str] = {}
        self._outcome: CallFailed | ConnectionLost | None = None
        self._over = False
        self._waiter: asyncio.Future[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def over(self) -> bool:
        """Its status is known, or it was cancelled."""
        return self._over

    def send(self, *messages: bytes, end: bool = False) -> None:
        """Hand over messages; they leave with this turn of the loop, as far as the other side's window allows."""
        if self._over:
            return
        for message in messages:
            self.output += _PREFIX.pack(0, len(message))
            self.output += message
        self.ending = self.ending or end
        self._connection.sending(self)

    async def receive(self) -> list[bytes]:
        """The messages that have come, at least one; an empty list is the end of a call that went well.

        Raises `CallFailed` and `ConnectionLost`, behind the last message. One task at a time may wait here.
        """
        while True:
            messages = self._split()
            if messages:
                return messages
            if self._outcome is not None:
                raise self._outcome
            if self._over:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def cancel(self) -> None:
        """End the call from this side; what comes after that is dropped. Harmless when it is over."""
        if not self._over:
            self._connection.forget(self, ErrorCodes.CANCEL)
            self.finish(CallFailed(Status.CANCELLED, "the call was ended on this side"))

    def expire(self, seconds: float) -> None:
        """The deadline has come."""
        if not self._over:
            self._connection.forget(self, ErrorCodes.CANCEL)
            self.finish(CallFailed(Status.DEADLINE_EXCEEDED, f"no answer within {seconds:g} s"))

    def finish(self, outcome: CallFailed | ConnectionLost | None) -> None:
        """The call is over: well, with None."""
        if self._over:
            return
        self._over, self._outcome = True, outcome
        self.output.clear()
        if self.deadline is not None:
            self.deadline.cancel()
        self._wake()

    def on_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Headers or trailers; a call that fails at once has both in one."""
        for name, value in headers:
            self._headers[name.decode("ascii", "replace")] = value.decode("utf-8", "replace")

    def on_data(self, data: bytes, size: int) -> None:
        self._input += data
        self._unread += size
        if self._waiter is not None:
            self._wake()

    def on_end(self) -> None:
        """The other side has said everything: what its status means."""
        headers = self._headers
        code, http = headers.get("grpc-status"), headers.get(":status", "")
        if code is not None:
            number = int(code) if code.isascii() and code.isdigit() else -1
            status = Status(number) if number in Status._value2member_map_ else Status.UNKNOWN
            details = unquote(headers.get("grpc-message", ""))
        elif http != "200":
            status, details = _BY_HTTP.get(http, Status.UNKNOWN), f"HTTP status {http}: is this a gRPC server?"
        elif not headers.get("content-type", "").startswith("application/grpc"):
            status, details = Status.UNKNOWN, f"no gRPC answer, but {headers.get('content-type', 'untyped')!r}"
        else:
            status, details = Status.INTERNAL, "the call ended without a status"
        if status is Status.OK and self._input and not self._whole():
            status, details = Status.INTERNAL, "the call ended in the middle of a message"
        self.finish(None if status is Status.OK else CallFailed(status, details, headers))

    def on_reset(self, code: int) -> None:
        name = ErrorCodes(code).name if code in ErrorCodes._value2member_map_ else str(code)
        known = _BY_RESET.get(ErrorCodes(code), Status.INTERNAL) if name != str(code) else Status.INTERNAL
        self.finish(CallFailed(known, f"the server reset the call ({name})"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _whole(self) -> bool:
        """What is left unread ends with a whole message."""
        at, end = 0, len(self._input)
        while at + 5 <= end:
            at += 5 + int.from_bytes(self._input[at + 1 : at + 5], "big")
        return at == end

    def _split(self) -> list[bytes]:
        """Whole messages that have come. What is then left is part of one, so that all of it may count as read."""
        messages: list[bytes] = []
        buffer, at = self._input, 0
        end = len(buffer)
        while end - at >= 5:
            flag, size = _PREFIX.unpack_from(buffer, at)
            if flag or size > MESSAGE_LIMIT:
                what = "a compressed message" if flag else f"a message of {size} bytes, over {MESSAGE_LIMIT}"
                self._connection.forget(self, ErrorCodes.CANCEL)
                self._over = False  # whatever its status was, it is not what counts
                self.finish(CallFailed(Status.INTERNAL if flag else Status.RESOURCE_EXHAUSTED, f"it sent {what}"))
                end = at
                break
            stop = at + 5 + size
            if stop > end:
                break
            messages.append(bytes(buffer[at + 5 : stop]))
            at = stop
        if at:
            del buffer[:at]
        if self._unread >= WINDOW // 2:
            self._connection.have_read(self, self._unread)
            self._unread = 0
        return messages
