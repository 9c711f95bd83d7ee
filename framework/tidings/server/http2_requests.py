"""Bytes of requests as they come on a connection: counted, let in where there is room, acknowledged when taken.

It knows nothing of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from tidings.server.budgets import Allowance
from tidings.server.frames import BLOCK
from tidings.server.http2_stream import WINDOW, Stream
from tidings.server.refusals import exhausted

__all__ = ["Requests", "server_side"]

FIRST_WINDOW: Final = 65_535
"""Bytes that all calls of a connection may send together until one had the right credentials: HTTP/2's default."""

FRAME: Final = 128 * 1024
"""Bytes of a frame from the client."""
OVER: Final = 2
"""How many times the announced number of calls h2 lets in: what is above the number is refused call by call."""


class _Announced(Settings):
    """h2's settings. h2 ends a connection that has one call too many; here such a call is refused by itself."""

    @property  # type: ignore[misc]  # nothing sets it
    def max_concurrent_streams(self) -> int:
        return OVER * super().max_concurrent_streams


def server_side(calls: int) -> H2Connection:
    """Return the server's side of a connection with so many calls at once."""
    connection = H2Connection(
        H2Configuration(
            client_side=False,
            header_encoding=None,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
    )
    connection.local_settings = _Announced(
        client=False,
        initial_values={
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_CONCURRENT_STREAMS: calls,
            SettingCodes.MAX_FRAME_SIZE: FRAME,
            SettingCodes.MAX_HEADER_LIST_SIZE: BLOCK,
        },
    )
    connection.max_inbound_frame_size = FRAME
    connection.decoder.max_header_list_size = BLOCK
    return connection


class Requests:
    """The requests of one connection."""

    def __init__(
        self, h2: H2Connection, allowance: Allowance, relieve: Callable[[], None], answer: Callable[[], None]
    ) -> None:
        self._h2 = h2
        self._allowance = allowance
        self._relieve_all = relieve
        self._answer = answer
        """Sends what h2 has to send, soon."""
        self._wide = False

    def trust(self) -> None:
        """Let the connection send as much as its calls may together: one call does not stop the others then."""
        if not self._wide and self._allowance.trusted:
            self._wide = True
            self._h2.increment_flow_control_window((self._allowance.limits.streams + 1) * WINDOW - FIRST_WINDOW)
            self._answer()

    def came(self, event: DataReceived, stream: Stream | None, now: float) -> None:
        """A frame with data has come. Its call may be over."""
        size, data = event.flow_controlled_length or 0, event.data or b""
        if stream is None or stream.failure is not None:
            self._acknowledge(event.stream_id or 0, size)
            return
        stream.feed(data, now)
        stream.unread += size
        stream.charge.hold(len(data))
        if stream.failure is None and stream.charge.excess():
            self._relieve(stream)
        if not stream.messages and stream.failure is None and stream.missing > WINDOW:
            # Part of a message that is larger than the window: it must be let in to become whole.
            self._allowance.large.ask(stream, stream.missing, lambda: self._let_in(stream))
            if stream.let_in:
                self._taken(stream)
        if stream.buffer and not self._open(stream):
            stream.withhold(now)
        stream.wake()

    def _open(self, stream: Stream) -> bool:
        """Whether the client may send something of the call's requests."""
        try:
            return self._h2.remote_flow_control_window(stream.number) > 0
        except H2Error:
            return True  # the call ended meanwhile

    def _let_in(self, stream: Stream) -> None:
        stream.let_in = True
        if not stream.over:
            self._taken(stream)

    def _relieve(self, stream: Stream) -> None:
        """Too many bytes wait: end readers that are too slow, and where that is not enough, refuse this request."""
        self._relieve_all()
        if budget := stream.charge.excess():
            stream.refuse(exhausted(f"More bytes wait than the server's {budget}: send less at once."))

    def _taken(self, stream: Stream) -> None:
        """The handler has what came: the client may send as much again."""
        size, stream.unread = stream.unread, 0
        self._acknowledge(stream.number, size)
        if stream.withheld is not None and self._open(stream):
            stream.let_go_on(asyncio.get_running_loop().time())

    def have_read(self, stream: Stream) -> None:
        """All messages that were whole are with the handler."""
        self._taken(stream)
        kept = stream.kept()
        stream.charge.hold(kept - stream.incoming)
        stream.incoming = kept
        if stream.let_in or not stream.buffer:
            stream.let_in = False
            self._allowance.large.give_back(stream)

    def over(self, stream: Stream) -> None:
        """The call is over: what it held is free."""
        stream.over = True
        stream.charge.clear()
        self._allowance.large.give_back(stream)

    def forget(self, stream: Stream) -> None:
        """Acknowledge what nobody will read any more."""
        self._acknowledge(stream.number, stream.unread)

    def _acknowledge(self, number: int, size: int) -> None:
        if size:
            try:
                self._h2.acknowledge_received_data(size, number)
            except H2Error:
                return  # the call ended meanwhile; h2 gave the connection its share back
            self._answer()
