"""What a connection may leave unfinished, what it is charged for, and who makes room for whom."""

from __future__ import annotations

import asyncio
import gc
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, SettingsFrame

from tests.integration.server import STREAMS, appends, batch, connected, message, raw, serving
from tidings.server import EventStoreServer, Limits
from tidings.server.calls import Call, Method
from tidings.server.protocol import shared, streams
from tidings.stores import EventData
from tidings.stores.eventstoredb.grpc import Address, Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, ConnectionLost, Status
from tidings.stores.eventstoredb.records_messages import MESSAGES, PACKAGE

OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEALTH = "/grpc.health.v1.Health/Check"
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "x"),
    (":path", HEALTH),
    ("content-type", "application/grpc"),
]


@pytest.fixture
async def server() -> AsyncIterator[EventStoreServer]:
    async with EventStoreServer(limits=Limits(request_seconds=0.5)) as server:
        yield server


async def said(server: EventStoreServer, data: bytes) -> bytes:
    """Send this and return what the server says until it ends the connection."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(OPENING + data)
        answer = b""
        while more := await reader.read(1 << 16):
            answer += more
        writer.close()
        return answer


def head(*, ends: bool) -> HeadersFrame:
    flags = ["END_HEADERS", "END_STREAM"] if ends else ["END_HEADERS"]
    return HeadersFrame(1, data=Encoder().encode(HEADERS), flags=flags)


async def test_headers_longer_than_a_real_server_takes_end_the_connection(server: EventStoreServer) -> None:
    block = HeadersFrame(1, data=b"\0\1a\1b" * 4000).serialize() + ContinuationFrame(1, data=b"\0" * 13_000).serialize()
    assert b"the headers of a call are too long" in await said(server, block)
    assert server.treasury.refused["the headers of a call are too long"] == 1
    assert server.treasury.bytes == 0


@pytest.mark.parametrize(
    "beginning",
    [
        HeadersFrame(1, data=b"\0\1a\1b" * 4000).serialize(),
        head(ends=False).serialize() + DataFrame(1, data=b"x" * 20_000).serialize()[:-1],
        head(ends=True).serialize()[:-1],
        b"\0",
    ],
    ids=["headers", "data", "one byte", "nearly nothing"],
)
async def test_what_has_begun_and_does_not_end_ends_the_connection(server: EventStoreServer, beginning: bytes) -> None:
    assert b"a frame did not arrive in time" in await said(server, beginning)
    assert server.treasury.bytes == 0


async def test_frames_that_are_not_whole_are_charged() -> None:
    async with EventStoreServer() as server, asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(OPENING + HeadersFrame(1, data=b"\0\1a\1b" * 4000).serialize())
        while server.treasury.bytes < 20_000:
            await asyncio.sleep(0.01)
        writer.close()
        while server.treasury.bytes:
            await asyncio.sleep(0.01)


async def secured(server: EventStoreServer) -> Connection:
    context = ssl.create_default_context(cafile=server.certificate)
    context.set_alpn_protocols(["h2"])
    return await Connection.open(Address("localhost", server.port, context))


async def test_who_gives_no_credentials_is_refused_before_anything_is_read() -> None:
    async with EventStoreServer(tls=True) as server, asyncio.timeout(30):
        connection = await secured(server)
        for method in ("Append", "BatchAppend", "Read", "Delete"):
            with await connection.call(f"{STREAMS}/{method}") as call, pytest.raises(CallFailed) as caught:
                await call.receive()  # although nothing was sent
            assert caught.value.status is Status.PERMISSION_DENIED
        with pytest.raises(CallFailed) as caught:
            await raw(connection, HEALTH, b"x" * 5000)
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert await raw(connection, HEALTH, b"")
        await connection.close()


async def test_time_in_which_the_server_lets_nothing_in_is_not_the_clients() -> None:
    """A handler that waits for a slow store: what came behind it fills the call's window in the middle of a request."""
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def handler(requests: AsyncIterator[Any], call: Call, send: Any) -> None:
        sizes = []
        async for request in requests:
            sizes.append(len(request.proposed_message.data))
            began.set()
            await goes_on.wait()
        await send([repr(sizes).encode()])

    method = Method("/a/b", streams.AppendReq, requests_stream=True, streaming=handler)
    async with serving(method) as (port, all_):
        connection = await Connection.open(Address("127.0.0.1", port))
        call = await connection.call("/a/b")
        call.send(*(appends("s", b"x" * size)[1] for size in (1, 100_000, 200_000)), end=True)
        await began.wait()
        (member,) = all_
        (stream,) = member.streams
        while stream.withheld is None:
            await asyncio.sleep(0.01)
        assert stream.arriving
        hours = 7200.0
        member.look_for_slow(asyncio.get_running_loop().time() + hours)
        stream.withheld -= hours  # as if that much time had passed
        stream.began -= hours
        goes_on.set()
        assert await call.receive() == [b"[1, 100000, 200000]"]
        await connection.close()


@pytest.mark.parametrize("who", ["the client", "the server"])
async def test_a_large_request_is_refused_for_what_it_waits_for(who: str) -> None:
    async def handler(request: object, call: Call) -> bytes:
        return b""

    async with serving(Method("/a/b", streams.AppendReq, unary=handler)) as (port, all_):
        connection = await Connection.open(Address("127.0.0.1", port))
        call = await connection.call("/a/b")
        whole = struct.pack(">BI", 0, 700_000) + b"x" * 700_000
        while not (members := list(all_)):
            await asyncio.sleep(0.01)
        (member,) = members
        if who == "the server":  # others have all the room that there is for large requests
            member.allowance.large.ask("others", member.allowance.large._left, lambda: None)
        call.output += whole if who == "the server" else whole[:500_000]
        connection.sending(call)

        def has_come() -> bool:
            stream = next(iter(member.streams), None)
            if stream is None:
                return False
            return stream.withheld is not None if who == "the server" else stream.incoming == 500_000

        while not has_come():
            await asyncio.sleep(0.01)
        member.look_for_slow(asyncio.get_running_loop().time() + 3600)
        with pytest.raises(CallFailed) as caught:
            await call.receive()
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert ("did not arrive" if who == "the client" else "no room for a request of 700005 b") in str(caught.value)
        await connection.close()


async def test_a_request_counts_as_long_as_it_is_handled() -> None:
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def handler(request: object, call: Call) -> bytes:
        began.set()
        await goes_on.wait()
        return b""

    async with serving(Method("/a/b", streams.AppendReq, unary=handler)) as (port, all_):
        connection = await Connection.open(Address("127.0.0.1", port))
        call = await connection.call("/a/b")
        call.send(appends("s", b"x" * 100_000)[1], end=True)
        await began.wait()
        assert all_.treasury.bytes > 100_000
        goes_on.set()
        assert await call.receive() == [b""]
        while all_.treasury.bytes:
            await asyncio.sleep(0.01)
        await connection.close()


async def test_who_has_credentials_finds_a_connection_when_strangers_have_all_of_them() -> None:
    limits = Limits(connections=4)
    async with EventStoreServer(tls=True, limits=limits) as server, asyncio.timeout(30):
        strangers = [await secured(server) for _ in range(4)]
        calls: list[Any] = [await stranger.call(HEALTH) for stranger in strangers]  # busy: their requests do not come
        connection = await secured(server)
        credentials = [("authorization", "Basic YWRtaW46Y2hhbmdlaXQ=")]
        with await connection.call(f"{STREAMS}/Append", credentials) as call:
            call.send(*appends("s", b"x"), end=True)
            assert await call.receive()
        more = [await secured(server) for _ in range(6)]
        with await connection.call(f"{STREAMS}/Append", credentials) as call:  # it is not the one that makes room
            call.send(*appends("s", b"x"), end=True)
            assert await call.receive()
        for each in (*strangers, *more, connection):
            await each.close()
        assert calls


async def test_a_burst_of_wrong_passwords_ends_its_connection_and_not_the_server() -> None:
    """All its calls end at once, each of which would end the connection."""
    limits = Limits(failed_logins=1)
    async with EventStoreServer(tls=True, limits=limits) as server, asyncio.timeout(30):
        for _ in range(4):
            connection = await secured(server)
            calls: list[Any] = [
                await connection.call(f"{STREAMS}/Append", [("authorization", f"Basic {n:04}")]) for n in range(60)
            ]
            for call in calls:
                with pytest.raises((CallFailed, ConnectionLost)):
                    await call.receive()
            await connection.close()
        assert server.treasury.refused["too many wrong passwords"] == 4
        connection = await secured(server)
        assert await raw(connection, HEALTH, b"")
        await connection.close()


async def test_readers_that_pause_on_one_connection_go_on_and_let_appends_through() -> None:
    """Catch-up subscriptions whose handlers are slow: together they could keep more than the connection may."""

    def use(uri: str) -> list[int]:
        client = EventStoreDBClient(uri)
        many = [NewEvent("T", b"x" * 10_000, content_type="application/octet-stream") for _ in range(90)]
        for n in range(12):
            client.append_to_stream(f"history-{n}", current_version=StreamState.ANY, events=many, timeout=60)
        subscriptions = [client.subscribe_to_all() for _ in range(40)]
        for subscription in subscriptions:
            next(subscription)
        big = NewEvent("T", b"y" * 900_000, content_type="application/octet-stream")
        for _ in range(3):
            client.append_to_stream("late", current_version=StreamState.ANY, events=big, timeout=60)
        read = [sum(1 for _ in islice(subscription, 1079)) for subscription in subscriptions]
        for subscription in subscriptions:
            subscription.stop()
        client.close()
        return read

    async with EventStoreServer() as server:
        assert await asyncio.to_thread(use, server.uri) == [1079] * 40
        assert not server.treasury.refused


# ---- refused calls


def _record(size: int, **more: Any) -> Any:
    return MESSAGES["AppendRecord"](data=bytes(size), schema={"name": "Refused", "format": 1}, **more)


def _records(size: int = 10, state: int | None = None) -> list[bytes]:
    """Return a request of `AppendRecords` that is refused: for its size, or for a check."""
    made = MESSAGES["AppendRecordsRequest"](records=[_record(size, stream="s")])
    if state is not None:
        made.checks.add(stream_state={"stream": "s", "expected_state": state})
    return [made.SerializeToString()]


def _session() -> list[bytes]:
    return [MESSAGES["AppendRequest"](stream="s", records=[_record(10)], expected_revision=9).SerializeToString()]


def _append(size: int, revision: int) -> list[bytes]:
    options = streams.AppendReq.Options(stream_identifier=shared.StreamIdentifier(stream_name=b"s"), revision=revision)
    proposed = message(streams.AppendReq.ProposedMessage, bytes(size), "Refused")
    requests = [streams.AppendReq(options=options), streams.AppendReq(proposed_message=proposed)]
    return [request.SerializeToString() for request in requests]


def _batch() -> list[bytes]:
    request = streams.BatchAppendReq.FromString(batch("s"))
    request.options.stream_position = 9
    request.proposed_messages[0].metadata["type"] = "Refused"
    return [request.SerializeToString()]


@pytest.mark.parametrize(
    ("path", "requests"),
    [
        (f"/{PACKAGE}.StreamsService/AppendRecords", _records(size=17_000_000)),
        (f"/{PACKAGE}.StreamsService/AppendRecords", _records(state=9)),
        (f"/{PACKAGE}.StreamsService/AppendSession", _session()),
        (f"{STREAMS}/Append", _append(10, 9)),
        (f"{STREAMS}/Append", _append(17_000_000, 0)),
        (f"{STREAMS}/BatchAppend", _batch()),
    ],
    ids=["record", "check", "session", "version", "size", "batch"],
)
async def test_a_refused_call_leaves_nothing_for_the_garbage_collector(path: str, requests: list[bytes]) -> None:
    """A circle of an error and a frame would keep the request until Python looks for circles."""

    def kept() -> int:
        return sum(isinstance(each, EventData) and each.type == "Refused" for each in gc.get_objects())

    async with EventStoreServer(release="kurrentdb-26.1") as server, connected(server.port) as connection:
        gc.collect()
        gc.disable()
        try:
            for _ in range(4):
                with suppress(CallFailed):  # `Append` and `BatchAppend` say in an answer which version they found
                    await raw(connection, path, *requests)
            async with asyncio.timeout(30):
                while kept() > 1:  # the last one, until the writer has another one
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
