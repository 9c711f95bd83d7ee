"""gRPC over HTTP/2 on h2, the client's side: calls, messages, flow control, deadlines. Knows nothing of events, and
never reconnects.

Why not grpc.aio for the hot calls: it pays 50 to 150 µs for each message, while here one DATA frame carries many.
A reader that does not read stops its own call at `WINDOW` bytes, and no other call of the connection.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple, cast

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error, NoAvailableStreamIDError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, Frame, GoAwayFrame

from tidings.stores.eventstoredb.grpc_call import (
    WINDOW,
    Call,
    CallFailed,
    CertificateRefused,
    ConnectionLost,
    Status,
)

__all__ = ["Address", "Connection", "speaks_tls"]

_FRAME: Final = 1 << 18
_CONNECTION_WINDOW: Final = (1 << 31) - 1
"""Calls limit themselves; a limit for all of them would let one that is not read stop the others."""
_REPLENISH: Final = 1 << 24
TLS_SECONDS: Final = 2.0
"""Seconds that a server which ended a connection without TLS may take to answer a TLS handshake."""
_SETTINGS: Final = 4
"""The type of the frame that a server begins with (RFC 9113, section 3.4)."""

Metadata = Sequence[tuple[str, str]]


class Address(NamedTuple):
    """Where to connect; with `tls` by TLS, which must agree on HTTP/2 (ALPN), else in the clear at once."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def speaks_tls(address: Address) -> bool:
    """Say whether a TLS handshake is answered there within `TLS_SECONDS`. Nothing else is sent."""
    try:
        async with asyncio.timeout(TLS_SECONDS):
            _, writer = await asyncio.open_connection(address.host, address.port, ssl=ssl.create_default_context())
    except ssl.SSLCertVerificationError:  # a certificate of its own: only TLS has one
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(TLS_SECONDS):
            await writer.wait_closed()
    return True


class _UnprintedData(DataFrame):
    """A DATA frame whose text is cheap. h2 makes the text of each frame for a log that is off, with all data in hex."""

    __repr__ = object.__repr__


class _Http2(H2Connection):
    """h2 with two things changed: the calls below a GOAWAY's number go on, which RFC 9113, section 6.8, allows, and h2
    does not; and DATA frames are not printed."""

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        self._frame_dispatch_table[_UnprintedData] = self._frame_dispatch_table[DataFrame]

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if type(frame) is DataFrame:
            frame.__class__ = _UnprintedData
        return super()._receive_frame(frame)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        held = self._data_to_send
        frames, events = super()._receive_goaway_frame(frame)
        self._data_to_send = held
        self.state_machine.state = ConnectionState.CLIENT_OPEN
        return frames, events


class Connection(asyncio.Protocol):
    """An HTTP/2 connection. It ends once, with everything that waits on it; make another then."""

    def __init__(self, address: Address, interval: float, patience: float) -> None:
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._h2 = _Http2(H2Configuration(client_side=True, validate_inbound_headers=False))
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_FRAME_SIZE: _FRAME,
                SettingCodes.MAX_HEADER_LIST_SIZE: 1 << 16,
            },
        )
        self._h2.max_inbound_frame_size = _FRAME
        self._calls: dict[int, Call] = {}
        self._sending: dict[int, Call] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._flushing = self._paused = False
        self._received = 0
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._interval, self._patience = interval, patience
        self._heard = False
        self._silent = 0
        self._timer: asyncio.TimerHandle | None = None
        self.lost: ConnectionLost | None = None
        """Why this connection is of no more use; None while it lives."""
        self.leaving = False
        """The server takes no more calls here; those that it has taken go on."""

    @property
    def peer(self) -> str:
        """Host and port of the other side."""
        return str(self._address)

    @classmethod
    async def open(
        cls, address: Address, *, timeout: float = 10.0, interval: float = 10.0, patience: float = 10.0
    ) -> Connection:
        """Connect within `timeout` seconds. Raises `ConnectionLost`.

        A connection with calls on which nothing is heard for `interval` seconds is probed by PING; when nothing is
        heard for `patience` seconds more, it is lost.
        """
        connection = cls(address, interval, patience)
        try:
            async with asyncio.timeout(timeout):
                await connection._loop.create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=address.tls,
                    server_hostname=address.host if address.tls is not None else None,
                )
                # Only its settings prove that somebody lives there: a kernel accepts for a process that was stopped.
                await connection._begun
        except TimeoutError as error:
            await connection._abort("it did not answer")
            raise ConnectionLost(f"it did not answer within {timeout:g} s") from error
        except ssl.SSLCertVerificationError as error:
            await connection._abort(str(error))
            raise CertificateRefused(f"its certificate is refused: {error.verify_message}") from error
        except OSError as error:  # refused, unknown host, TLS
            await connection._abort(str(error))
            raise ConnectionLost(str(error) or type(error).__name__) from error
        except BaseException:
            await connection._abort("it was given up")
            raise
        connection._tick()
        return connection

    async def call(self, path: str, metadata: Metadata = (), *, timeout: float | None = None) -> Call:
        """Begin a call of the method at `path`; with `timeout` seconds it ends in DEADLINE_EXCEEDED after them.

        Waits while as many calls are open as the server allows. Raises `ConnectionLost`.
        """
        while self.lost is None and not self.leaving and self._full():
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._admit()  # it was this one's turn
                raise
        if self.lost is not None:
            raise self.lost
        if self.leaving:
            raise ConnectionLost("the server takes no more calls on this connection")
        try:
            number = self._h2.get_next_available_stream_id()
        except NoAvailableStreamIDError as error:
            self.leaving = True
            raise ConnectionLost("this connection has used up its calls") from error
        headers = [
            (":method", "POST"),
            (":scheme", "http" if self._address.tls is None else "https"),
            (":path", path),
            (":authority", str(self._address)),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "tidings"),
            *([] if timeout is None else [("grpc-timeout", f"{min(max(int(timeout * 1000), 1), 99_999_999)}m")]),
            *metadata,
        ]
        call = self._calls[number] = Call(self, number)
        self._h2.send_headers(number, headers)
        if timeout is not None:
            call.deadline = self._loop.call_later(timeout, call.expire, timeout)
        self._schedule()
        return call

    async def close(self, timeout: float = 3.0) -> None:
        """Say goodbye, and wait until the socket is gone, but not longer than `timeout` seconds."""
        if self.lost is None:
            self._flush()
            self._h2.close_connection()
            self._write()
            self.fail(ConnectionLost("the connection was closed"), abort=False)
        if self._transport is not None:
            self._transport.close()
            await asyncio.wait([self._gone], timeout=timeout)
        await self._abort("the connection was closed")

    def cut(self) -> None:
        """Break the connection as a network does, for tests."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: ConnectionLost, *, abort: bool = True) -> None:
        """End everything that waits on this connection with `error`."""
        if self.lost is None:
            self.lost = error
            if self._timer is not None:
                self._timer.cancel()
            if not self._begun.done():
                self._begun.set_exception(OSError(str(error)))
                self._begun.exception()  # it may be that nobody waits any more
            for call in list(self._calls.values()):
                call.finish(error)
            self._calls.clear()
            self._sending.clear()
            self._admit(everybody=True)
        if abort and self._transport is not None:
            self._transport.abort()

    async def _abort(self, reason: str) -> None:
        self.fail(ConnectionLost(reason))
        if self._transport is not None:
            await asyncio.wait([self._gone], timeout=1)

    # ---- for calls -----------------------------------------------------------------------

    def sending(self, call: Call) -> None:
        self._sending[call.number] = call
        self._schedule()

    def have_read(self, call: Call, size: int) -> None:
        if call.number in self._calls and self.lost is None:
            self._h2.increment_flow_control_window(size, call.number)
            self._schedule()

    def forget(self, call: Call, code: ErrorCodes) -> None:
        if self._calls.pop(call.number, None) is not None:
            self._sending.pop(call.number, None)
            self._reset(call.number, code)
            self._admit()

    def _reset(self, number: int, code: ErrorCodes) -> None:
        if self.lost is None:
            try:
                self._h2.reset_stream(number, code)
            except H2Error:  # both sides had ended it
                return
            self._schedule()

    def _full(self) -> bool:
        return len(self._calls) >= self._h2.remote_settings.max_concurrent_streams

    def _admit(self, *, everybody: bool = False) -> None:
        while self._waiting and (everybody or not self._full()):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everybody:
                    return

    # ---- writing -------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self.lost is None:
            if not self._paused:
                for call in list(self._sending.values()):
                    self._pump(call)
            self._write()

    def _pump(self, call: Call) -> None:
        """Send what the windows allow; the rest waits for the next WINDOW_UPDATE."""
        h2, number, output = self._h2, call.number, call.output
        sent, size = 0, len(output)
        while sent < size:
            room = min(h2.local_flow_control_window(number), h2.max_outbound_frame_size, size - sent)
            if room <= 0:
                break
            stop = sent + room
            call.ended = call.ending and stop == size
            h2.send_data(number, bytes(output[sent:stop]), end_stream=call.ended)
            sent = stop
        del output[:sent]
        if not output:
            if call.ending and not call.ended:
                call.ended = True
                h2.end_stream(number)
            del self._sending[number]

    def _write(self) -> None:
        data = self._h2.data_to_send()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _tick(self) -> None:
        """Four times in the interval: count how long nothing was heard while calls were open, and ask.

        Counting turns of this timer, not seconds, keeps a loop that was blocked itself from blaming the server.
        """
        if self.lost is not None:
            return
        turn = self._interval / 4
        self._silent = 0 if self._heard or not self._calls else self._silent + 1
        self._heard = False
        if self._silent * turn >= self._interval + self._patience:
            self.fail(ConnectionLost(f"nothing was heard for {self._interval + self._patience:g} s"))
            return
        if self._silent == 4:
            self._h2.ping(b"tidings?")
            self._write()
        self._timer = self._loop.call_later(turn, self._tick)

    # ---- the loop's callbacks ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.fail(ConnectionLost("it does not speak HTTP/2 over TLS (ALPN)"))
            return
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_CONNECTION_WINDOW - 65_535)
        self._write()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(ConnectionLost(f"the connection broke: {exc or 'the other side closed it'}"))
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self.lost is not None:
            return
        if not self._begun.done() and len(data) > 3 and data[3] != _SETTINGS:
            self.fail(ConnectionLost("it does not speak HTTP/2"))
            return
        try:
            for event in self._h2.receive_data(data):
                self._on_event(event)
                if self.lost is not None:
                    return
        except (H2Error, ValueError, IndexError) as error:
            self._write()  # h2 says goodbye by itself
            self.fail(ConnectionLost(f"it sends what is no HTTP/2: {type(error).__name__} {error}"))
            return
        self._schedule()

    def _on_event(self, event: Event) -> None:
        match event:
            case DataReceived():
                size = event.flow_controlled_length or 0
                self._received += size
                if self._received >= _REPLENISH:
                    self._h2.increment_flow_control_window(self._received)
                    self._received = 0
                call = self._calls.get(event.stream_id or 0)
                if call is not None:
                    call.on_data(event.data or b"", size)
            case ResponseReceived() | TrailersReceived():
                call = self._calls.get(event.stream_id or 0)
                if call is not None:
                    call.on_headers(cast("Iterable[tuple[bytes, bytes]]", event.headers or ()))
            case StreamEnded():
                self._end(event.stream_id or 0, None)
            case StreamReset():
                self._end(event.stream_id or 0, int(event.error_code or 0))
            case WindowUpdated():
                self._schedule()
            case RemoteSettingsChanged():
                if not self._begun.done():
                    self._begun.set_result(None)
                self._admit()
            case ConnectionTerminated():
                self._on_goaway(event)

    def _end(self, number: int, reset: int | None) -> None:
        call = self._calls.pop(number, None)
        if call is None:
            return
        self._sending.pop(number, None)
        if reset is not None:
            call.on_reset(reset)
        else:
            if not call.ended:  # an early status: nothing more that this side sends would be heard
                self._reset(number, ErrorCodes.NO_ERROR)
            call.on_end()
        self._admit()

    def _on_goaway(self, event: ConnectionTerminated) -> None:
        """The server leaves. Calls that it did not take end now; without an error the others may be finished."""
        reason = (event.additional_data or b"").decode("utf-8", "replace")
        code = int(event.error_code or 0)
        self.leaving = True
        if code:
            name = ErrorCodes(code).name if code in ErrorCodes._value2member_map_ else str(code)
            self.fail(ConnectionLost(f"the server ended the connection: {name} {reason}".rstrip()))
            return
        refused = CallFailed(
            Status.UNAVAILABLE, f"the server is going away and has not begun the call {reason}".rstrip()
        )
        for number, call in list(self._calls.items()):
            if number > (event.last_stream_id or 0):
                del self._calls[number]
                self._sending.pop(number, None)
                call.finish(refused)
        self._admit(everybody=True)
