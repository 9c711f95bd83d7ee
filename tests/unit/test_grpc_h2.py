"""The client's side of gRPC, against a peer that speaks HTTP/2 frame by frame and can misbehave in each of them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived, StreamReset
from h2.settings import SettingCodes, Settings

from tidings.stores.eventstoredb.grpc import Address, Connection
from tidings.stores.eventstoredb.grpc_call import MESSAGE_LIMIT, WINDOW, CallFailed, ConnectionLost, Status

PATIENCE = 10.0
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


class Peer(asyncio.Protocol):
    """A server with one connection. By itself it only acknowledges settings and answers pings."""

    def __init__(self, settings: dict[SettingCodes, int]) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = Settings(client=False, initial_values=settings)
        self.events: list[Event] = []
        self.deaf = False
        """Read and do nothing, like a process that was stopped."""
        self.transport: asyncio.Transport | None = None
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        if not self.deaf:
            self.events += self.h2.receive_data(data)
            self.flush()
            self._changed.set()

    def flush(self) -> None:
        assert self.transport is not None
        self.transport.write(self.h2.data_to_send())

    async def seen(self, kind: type[Event], count: int = 1) -> list[Any]:
        """Wait for events of this kind."""
        async with asyncio.timeout(PATIENCE):
            while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
                self._changed.clear()
                await self._changed.wait()
        return found

    async def request(self, count: int = 1) -> int:
        """Return the stream id of the `count`-th call."""
        return int((await self.seen(RequestReceived, count))[count - 1].stream_id)

    @property
    def taken(self) -> int:
        """Return the bytes of all messages so far."""
        return sum(len(event.data or b"") for event in self.events if isinstance(event, DataReceived))

    async def took(self, size: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.taken < size:
                self._changed.clear()
                await self._changed.wait()

    def answer(self, number: int, *messages: bytes, end: bool = True) -> None:
        self.h2.send_headers(number, HEADERS)
        self.h2.send_data(number, framed(*messages))
        if end:
            self.h2.send_headers(number, OK, end_stream=True)
        self.flush()


@asynccontextmanager
async def met(
    settings: dict[SettingCodes, int] | None = None, **options: float
) -> AsyncIterator[tuple[Connection, Peer]]:
    """Yield a connection and its peer."""
    peers: list[Peer] = []

    def peer() -> Peer:
        peers.append(Peer(settings or {}))
        return peers[-1]

    server = await asyncio.get_running_loop().create_server(peer, "127.0.0.1", 0)
    try:
        connection = await Connection.open(Address("127.0.0.1", server.sockets[0].getsockname()[1]), **options)
        try:
            async with asyncio.timeout(PATIENCE):
                yield connection, peers[0]
        finally:
            await connection.close()
    finally:
        server.close()
        for each in peers:
            if each.transport is not None:
                each.transport.abort()


async def everything(call: Any) -> list[bytes]:
    got: list[bytes] = []
    while messages := await call.receive():
        got += messages
    return got


class TestMessages:
    async def test_a_message_cut_anywhere_comes_whole(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            call.send(b"", end=True)
            number = await peer.request()
            peer.h2.send_headers(number, HEADERS)
            for byte in framed(b"one", b"", b"three"):
                peer.h2.send_data(number, bytes([byte]))
                peer.flush()
                await asyncio.sleep(0)
            peer.h2.send_headers(number, OK, end_stream=True)
            peer.flush()
            assert await everything(call) == [b"one", b"", b"three"]

    async def test_data_is_never_made_into_text_for_a_log_that_is_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            call.send(b"", end=True)
            number = await peer.request()
            printed: list[int] = []

            def printing(data: bytes | None) -> str:
                printed.append(len(data or b""))
                return ""

            monkeypatch.setattr("hyperframe.frame._raw_data_repr", printing)
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, framed(b"a" * 5_000))
            peer.h2.send_headers(number, OK, end_stream=True)
            peer.flush()
            assert await everything(call) == [b"a" * 5_000]
            assert 5_005 not in printed

    async def test_frames_cut_anywhere_come_whole(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            call.send(b"", end=True)
            number = await peer.request()
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, framed(b"a" * 100, b"b"))
            peer.h2.send_headers(number, OK, end_stream=True)
            assert peer.transport is not None
            for byte in peer.h2.data_to_send():
                peer.transport.write(bytes([byte]))
                await asyncio.sleep(0)
            assert await everything(call) == [b"a" * 100, b"b"]

    async def test_many_messages_of_one_frame_come_together(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            peer.answer(await peer.request(), *[b"%d" % n for n in range(500)])
            assert await call.receive() == [b"%d" % n for n in range(500)]
            assert await call.receive() == []

    async def test_what_is_sent_arrives_in_order_and_ends(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m", [("name", "value")])
            call.send(b"one", b"two")
            call.send(b"three", end=True)
            await peer.took(len(framed(b"one", b"two", b"three")))
            [request] = await peer.seen(RequestReceived)
            headers = dict(request.headers)
            assert headers[":path"] == "/s/m"
            assert headers["te"] == "trailers"
            assert headers["name"] == "value"
            assert b"".join(event.data for event in await peer.seen(DataReceived)) == framed(b"one", b"two", b"three")

    async def test_a_message_over_the_limit_ends_its_call_alone(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            other = await connection.call("/s/m")
            number = await peer.request()
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, struct.pack(">BI", 0, MESSAGE_LIMIT + 1))
            peer.flush()
            with pytest.raises(CallFailed, match="over") as failed:
                await call.receive()
            assert failed.value.status is Status.RESOURCE_EXHAUSTED
            peer.answer(await peer.request(2), b"fine")
            assert await everything(other) == [b"fine"]

    async def test_a_compressed_message_is_refused(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            number = await peer.request()
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, b"\x01\x00\x00\x00\x01x")
            peer.flush()
            with pytest.raises(CallFailed, match="compressed"):
                await call.receive()


class TestStatus:
    async def test_a_failure_without_messages_has_status_text_and_trailers(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            trailers = [
                ("grpc-status", "9"),
                ("grpc-message", "is%20deleted %E2%9C%93"),
                ("exception", "stream-deleted"),
            ]
            peer.h2.send_headers(await peer.request(), HEADERS + trailers, end_stream=True)
            peer.flush()
            with pytest.raises(CallFailed) as failed:
                await call.receive()
            assert failed.value.status is Status.FAILED_PRECONDITION
            assert failed.value.details == "is deleted ✓"
            assert failed.value.trailers["exception"] == "stream-deleted"

    async def test_messages_come_before_the_failure_behind_them(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            number = await peer.request()
            peer.answer(number, b"one", end=False)
            peer.h2.send_headers(number, [("grpc-status", "14")], end_stream=True)
            peer.flush()
            await asyncio.sleep(0)
            assert await call.receive() == [b"one"]
            with pytest.raises(CallFailed) as failed:
                await call.receive()
            assert failed.value.status is Status.UNAVAILABLE

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ([(":status", "503")], Status.UNAVAILABLE),
            ([(":status", "401")], Status.UNAUTHENTICATED),
            ([(":status", "302")], Status.UNKNOWN),
            ([(":status", "200"), ("content-type", "text/html")], Status.UNKNOWN),
            ([*HEADERS, ("grpc-status", "99")], Status.UNKNOWN),
            ([*HEADERS, ("grpc-status", "x")], Status.UNKNOWN),
            (HEADERS, Status.INTERNAL),
        ],
    )
    async def test_an_answer_that_is_no_grpc_fails_with_a_status(
        self, headers: list[tuple[str, str]], status: Status
    ) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            peer.h2.send_headers(await peer.request(), headers, end_stream=True)
            peer.flush()
            with pytest.raises(CallFailed) as failed:
                await call.receive()
            assert failed.value.status is status

    async def test_an_end_within_a_message_is_a_failure(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            number = await peer.request()
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, framed(b"whole") + framed(b"broken")[:-1])
            peer.h2.send_headers(number, OK, end_stream=True)
            peer.flush()
            with pytest.raises(CallFailed, match="middle of a message"):
                await everything(call)

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            (ErrorCodes.REFUSED_STREAM, Status.UNAVAILABLE),
            (ErrorCodes.CANCEL, Status.CANCELLED),
            (ErrorCodes.ENHANCE_YOUR_CALM, Status.RESOURCE_EXHAUSTED),
            (ErrorCodes.PROTOCOL_ERROR, Status.INTERNAL),
        ],
    )
    async def test_a_reset_call_fails_alone(self, code: ErrorCodes, status: Status) -> None:
        async with met() as (connection, peer):
            call, other = await connection.call("/s/m"), await connection.call("/s/m")
            peer.h2.reset_stream(await peer.request(), code)
            peer.flush()
            with pytest.raises(CallFailed, match=code.name) as failed:
                await call.receive()
            assert failed.value.status is status
            peer.answer(await peer.request(2), b"fine")
            assert await everything(other) == [b"fine"]

    async def test_a_deadline_is_told_to_the_server_and_kept_here(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m", timeout=0.05)
            with pytest.raises(CallFailed) as failed:
                await call.receive()
            assert failed.value.status is Status.DEADLINE_EXCEEDED
            [request] = await peer.seen(RequestReceived)
            assert dict(request.headers)["grpc-timeout"] == "50m"
            [reset] = await peer.seen(StreamReset)
            assert reset.error_code == ErrorCodes.CANCEL

    async def test_a_call_that_is_left_is_cancelled_at_the_server(self) -> None:
        async with met() as (connection, peer):
            with await connection.call("/s/m"):
                number = await peer.request()
                peer.answer(number, b"more", end=False)
            [reset] = await peer.seen(StreamReset)
            assert (reset.stream_id, reset.error_code) == (number, ErrorCodes.CANCEL)


class TestFlowControl:
    async def test_no_more_is_sent_than_the_server_takes(self) -> None:
        message = b"x" * 200_000
        async with met({SettingCodes.INITIAL_WINDOW_SIZE: 10_000}) as (connection, peer):
            call = await connection.call("/s/m")
            call.send(message, end=True)
            number, given = await peer.request(), 10_000
            while given < len(message) + 5:
                await peer.took(given)
                assert peer.taken == given
                peer.h2.increment_flow_control_window(10_000, number)
                peer.h2.increment_flow_control_window(10_000)
                peer.flush()
                given += 10_000
            await peer.took(len(message) + 5)
            assert b"".join(event.data for event in await peer.seen(DataReceived)) == framed(message)

    async def test_a_reader_that_does_not_read_stops_its_own_call_at_its_window(self) -> None:
        message = b"x" * 10_000
        async with met() as (connection, peer):
            idle, other = await connection.call("/s/idle"), await connection.call("/s/other")
            number, second = await peer.request(), await peer.request(2)
            peer.h2.send_headers(number, HEADERS)
            sent, data = 0, framed(*[message] * (WINDOW // len(message) + 1))
            while (room := peer.h2.local_flow_control_window(number)) > 0:
                size = min(room, peer.h2.max_outbound_frame_size)
                peer.h2.send_data(number, data[sent : sent + size])
                sent += size
                peer.flush()
            assert sent == WINDOW  # the peer may send no more
            peer.answer(second, b"still served")
            assert await everything(other) == [b"still served"]
            assert peer.h2.local_flow_control_window(number) == 0
            read = 0
            while read < WINDOW // 2:
                read += sum(len(got) + 5 for got in await idle.receive())

            async with asyncio.timeout(PATIENCE):
                while peer.h2.local_flow_control_window(number) < WINDOW // 2:
                    await asyncio.sleep(0.01)

    async def test_a_message_larger_than_the_window_comes_through(self) -> None:
        message = bytes(range(256)) * (3 * WINDOW // 256)
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            number = await peer.request()

            async def send() -> None:
                peer.h2.send_headers(number, HEADERS)
                left = framed(message)
                while left:
                    size = min(peer.h2.local_flow_control_window(number), peer.h2.max_outbound_frame_size)
                    if size:
                        peer.h2.send_data(number, left[:size])
                        left = left[size:]
                        peer.flush()
                    await asyncio.sleep(0)
                peer.h2.send_headers(number, OK, end_stream=True)
                peer.flush()

            sending = asyncio.ensure_future(send())
            assert await everything(call) == [message]
            await sending

    async def test_calls_beyond_what_the_server_allows_wait_their_turn(self) -> None:
        async with met({SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as (connection, peer):
            first, second = await connection.call("/s/1"), await connection.call("/s/2")
            waiting = [asyncio.ensure_future(connection.call(f"/s/{n}")) for n in (3, 4, 5)]
            number = await peer.request()
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in waiting)
            waiting[0].cancel()  # it loses its place, and nobody else does
            peer.answer(number, b"done")
            assert await everything(first) == [b"done"]
            peer.h2.reset_stream(await peer.request(2))
            peer.flush()
            with pytest.raises(CallFailed):
                await second.receive()
            third, fourth = await waiting[1], await waiting[2]
            paths = [dict(event.headers)[":path"] for event in await peer.seen(RequestReceived, 4)]
            assert paths == ["/s/1", "/s/2", "/s/4", "/s/5"]
            third.cancel()
            fourth.cancel()


class TestEnds:
    async def test_going_away_lets_begun_calls_finish_and_takes_no_new_one(self) -> None:
        async with met() as (connection, peer):
            begun, late = await connection.call("/s/begun"), await connection.call("/s/late")
            number = await peer.request()
            await peer.request(2)
            begun.send(b"more")
            peer.h2.close_connection(last_stream_id=number)
            data = peer.h2.data_to_send()  # GOAWAY, and more behind it in the same read
            peer.h2.state_machine.state = type(peer.h2.state_machine.state).SERVER_OPEN
            peer.h2.send_headers(number, HEADERS)
            peer.h2.send_data(number, framed(b"last words"))
            peer.h2.send_headers(number, OK, end_stream=True)
            assert peer.transport is not None
            peer.transport.write(data + peer.h2.data_to_send())
            assert await everything(begun) == [b"last words"]
            with pytest.raises(CallFailed, match="not begun") as refused:
                await late.receive()
            assert refused.value.status is Status.UNAVAILABLE
            assert connection.leaving
            with pytest.raises(ConnectionLost, match="no more calls"):
                await connection.call("/s/new")

    async def test_going_away_in_anger_ends_every_call_and_says_why(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            await peer.request()
            peer.h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM, additional_data=b"too_many_pings", last_stream_id=1)
            peer.flush()
            with pytest.raises(ConnectionLost, match="ENHANCE_YOUR_CALM too_many_pings"):
                await call.receive()
            with pytest.raises(ConnectionLost):
                await connection.call("/s/new")

    async def test_a_cut_connection_ends_every_call(self) -> None:
        async with met({SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as (connection, peer):
            call = await connection.call("/s/m")
            waiting = asyncio.ensure_future(connection.call("/s/waiting"))
            await peer.request()
            assert peer.transport is not None
            peer.transport.abort()
            with pytest.raises(ConnectionLost, match="broke"):
                await call.receive()
            with pytest.raises(ConnectionLost):
                await waiting

    async def test_closing_says_goodbye_and_ends_what_waits(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            await peer.request()
            receiving = asyncio.ensure_future(call.receive())
            await asyncio.sleep(0)
            await connection.close()
            with pytest.raises(ConnectionLost, match="closed"):
                await receiving
            await connection.close()
            assert any(type(event).__name__ == "ConnectionTerminated" for event in peer.events)

    async def test_bytes_that_are_no_http2_end_the_connection(self) -> None:
        async with met() as (connection, peer):
            call = await connection.call("/s/m")
            await peer.request()
            assert peer.transport is not None
            peer.transport.write(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x")  # DATA of no stream
            with pytest.raises(ConnectionLost, match="no HTTP/2"):
                await call.receive()

    async def test_a_silent_server_is_given_up(self) -> None:
        async with met(interval=0.05, patience=0.05) as (connection, peer):
            call = await connection.call("/s/m")
            await peer.request()
            peer.deaf = True
            with pytest.raises(ConnectionLost, match="nothing was heard"):
                await call.receive()

    async def test_a_quiet_server_that_answers_pings_is_not(self) -> None:
        async with met(interval=0.05, patience=0.05) as (connection, peer):
            call = await connection.call("/s/m")
            number = await peer.request()
            pings = await peer.seen(ping_received(), 4)
            assert len(pings) >= 4
            peer.answer(number, b"at last")
            assert await everything(call) == [b"at last"]

    async def test_nobody_is_asked_while_nothing_is_expected(self) -> None:
        async with met(interval=0.02, patience=0.02) as (connection, peer):
            peer.deaf = True
            await asyncio.sleep(0.2)
            assert connection.lost is None


def ping_received() -> type[Event]:
    from h2.events import PingReceived

    return PingReceived


class TestConnecting:
    async def test_a_port_where_nobody_listens_is_lost_at_once(self) -> None:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionLost, match="Connect call failed"):
            await Connection.open(Address("127.0.0.1", port))

    @pytest.mark.parametrize(
        ("does", "says"),
        [
            (lambda transport: None, "did not answer"),
            (lambda transport: transport.write(b"220 mail.example ESMTP\r\n" * 9), "not speak HTTP/2"),
            (lambda transport: transport.close(), "broke"),
        ],
        ids=["silent", "another protocol", "closes"],
    )
    async def test_a_peer_that_is_no_http2_server_is_lost(
        self, does: Callable[[asyncio.Transport], None], says: str
    ) -> None:
        transports: list[asyncio.Transport] = []

        class Strange(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                transports.append(transport)
                does(transport)

        server = await asyncio.get_running_loop().create_server(Strange, "127.0.0.1", 0)
        with pytest.raises(ConnectionLost, match=says):
            await Connection.open(Address("127.0.0.1", server.sockets[0].getsockname()[1]), timeout=0.3)
        server.close()
        for transport in transports:
            transport.abort()

    async def test_giving_up_to_wait_leaves_no_connection_behind(self) -> None:
        came, left = asyncio.Event(), asyncio.Event()

        class Silent(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                came.set()

            def connection_lost(self, exc: Exception | None) -> None:
                left.set()

        server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
        opening = asyncio.ensure_future(Connection.open(Address("127.0.0.1", server.sockets[0].getsockname()[1])))
        async with asyncio.timeout(PATIENCE):
            await came.wait()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await left.wait()
        server.close()
