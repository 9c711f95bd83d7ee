"""Requests that no honest client makes, and clients that behave badly: each has its answer, and the server lives on."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.integration.server import STREAMS, appends, connected, message, named, raw
from tidings.server import EventStoreServer
from tidings.server.calls import FRAME_LIMIT
from tidings.server.protocol import persistent, shared, streams
from tidings.stores import EventData
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, Status
from tidings.stores.eventstoredb.store import open_eventstoredb

ReadReq = streams.ReadReq
GROUPS = "/event_store.client.persistent_subscriptions.PersistentSubscriptions"
NOTHING = shared.Empty()


@pytest.fixture
async def server() -> AsyncIterator[EventStoreServer]:
    async with EventStoreServer() as server:
        yield server
        await lives(server)


@pytest.fixture
async def connection(server: EventStoreServer) -> AsyncIterator[Connection]:
    async with connected(server.port) as connection:
        yield connection


async def lives(server: EventStoreServer) -> None:
    """Assert that the server still appends and reads."""
    async with asyncio.timeout(20):
        store = await open_eventstoredb(server.uri)
        stream = f"alive-{uuid4().hex}"
        await store.append(stream, [EventData("T", b"{}")])
        assert len([event async for event in store.read_stream(stream)]) == 1
        await store.close()


async def refused(connection: Connection, path: str, *requests: bytes) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await raw(connection, path, *requests)
    return caught.value


def bare(options: Any) -> bytes:
    request: bytes = ReadReq(options=options).SerializeToString()
    return request


def read_options(**more: Any) -> Any:
    string = ReadReq.Options.UUIDOption(string=NOTHING)
    everything = ReadReq.Options.AllOptions(start=NOTHING)
    parts: dict[str, Any] = {"all": everything, "count": 10, "no_filter": NOTHING, "uuid_option": string} | more
    return ReadReq.Options(**parts)


# ---- requests ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Append", "Delete", "Tombstone"])
async def test_a_stream_whose_name_is_too_long_is_not_written(connection: Connection, method: str) -> None:
    """Every event repeats the name."""
    kind: Any = {"Append": streams.AppendReq, "Delete": streams.DeleteReq, "Tombstone": streams.TombstoneReq}[method]
    for name in ("ж" * 513, "$$" + "ж" * 513):
        request = kind(options=kind.Options(stream_identifier=named(name), any=shared.Empty()))
        requests = [request.SerializeToString(), *(appends(name, b"x")[1:] if method == "Append" else ())]
        error = await refused(connection, f"{STREAMS}/{method}", *requests)
        assert error.status is Status.INVALID_ARGUMENT
        assert "has 1026 bytes, and 1024 is the most" in error.details


async def test_a_stream_whose_name_is_long_is_written_and_has_metadata(connection: Connection) -> None:
    for name in ("ж" * 512, "$$" + "ж" * 512):
        assert await raw(connection, f"{STREAMS}/Append", *appends(name, b"{}"))


async def test_a_message_over_the_frame_limit(connection: Connection) -> None:
    options, _ = appends("s", b"x")
    with await connection.call(f"{STREAMS}/Append", timeout=30) as call:
        call.send(options, b"\0" * (FRAME_LIMIT + 1), end=True)
        with pytest.raises(CallFailed) as caught:
            await call.receive()
    assert caught.value.status is Status.RESOURCE_EXHAUSTED


async def test_an_append_over_the_size_limit(connection: Connection) -> None:
    error = await refused(connection, f"{STREAMS}/Append", *appends("s", b"x" * 600_000, b"x" * 600_000))
    assert error.status is Status.INVALID_ARGUMENT
    assert error.trailers["exception"] == "maximum-append-size-exceeded"
    assert error.trailers["maximum-append-size"] == "1048576"


@pytest.mark.parametrize("name", [b"\xff\xfe", b"", b"a\x80b"])
async def test_a_stream_name_that_is_no_text(connection: Connection, name: bytes) -> None:
    error = await refused(connection, f"{STREAMS}/Append", *appends(name, b"x"))
    assert (error.status, error.details) == (Status.UNKNOWN, "Exception was thrown by handler.")
    by_name = ReadReq.Options.StreamOptions(stream_identifier=named(name), start=NOTHING)
    error = await refused(connection, f"{STREAMS}/Read", bare(read_options(stream=by_name)))
    assert error.status is Status.UNKNOWN


def _without_type() -> Any:
    return streams.AppendReq.ProposedMessage(id=shared.UUID(string=str(uuid4())), data=b"x")


@pytest.mark.parametrize(
    ("proposed", "status"),
    [
        (lambda kind: message(kind, id=shared.UUID(string=str(UUID(int=0)))), Status.UNKNOWN),
        (lambda kind: message(kind, id=shared.UUID(structured=shared.UUID.Structured())), Status.UNKNOWN),
        (lambda kind: message(kind, id=shared.UUID(string="nonsense")), Status.UNKNOWN),
        (lambda kind: message(kind, id=shared.UUID()), Status.UNKNOWN),
        (lambda kind: message(kind, type=""), Status.UNKNOWN),
        (lambda kind: _without_type(), Status.INVALID_ARGUMENT),
    ],
)
async def test_an_event_that_cannot_be_meant_writes_nothing(
    server: EventStoreServer, connection: Connection, proposed: Callable[[Any], Any], status: Status
) -> None:
    store = await open_eventstoredb(server.uri)
    before = await store.head()
    options, good = appends("s", b"x")
    bad = streams.AppendReq(proposed_message=proposed(streams.AppendReq.ProposedMessage)).SerializeToString()
    error = await refused(connection, f"{STREAMS}/Append", options, good, bad)
    assert error.status is status
    assert await store.head() == before
    await store.close()


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [b""],
        [streams.AppendReq(options=streams.AppendReq.Options(any=NOTHING)).SerializeToString()],
        [streams.AppendReq(options=streams.AppendReq.Options(stream_identifier=named("s"))).SerializeToString()],
        [appends("s", b"x")[1]],
        [appends("s")[0], appends("s")[0]],
    ],
)
async def test_an_append_without_its_options(connection: Connection, requests: list[bytes]) -> None:
    error = await refused(connection, f"{STREAMS}/Append", *requests)
    assert error.status is Status.UNKNOWN


@pytest.mark.parametrize(
    "options",
    [
        ReadReq.Options(),
        ReadReq.Options(count=1, no_filter=NOTHING),
        read_options(uuid_option=None),
        read_options(all=None),
        read_options(count=None),
        read_options(no_filter=None),
        read_options(
            count=None,
            subscription=ReadReq.Options.SubscriptionOptions(),
            read_direction=ReadReq.Options.Backwards,
        ),
    ],
)
async def test_a_read_without_its_options(connection: Connection, options: Any) -> None:
    error = await refused(connection, f"{STREAMS}/Read", bare(options))
    assert error.status is Status.INVALID_ARGUMENT


@pytest.mark.parametrize("regex", ["(", "(?P<x>", "[z-a]", "a" * 20_000, "(?<=a+)b"])
async def test_a_filter_that_cannot_be_read(connection: Connection, regex: str) -> None:
    expression = ReadReq.Options.FilterOptions.Expression(regex=regex)
    chosen = ReadReq.Options.FilterOptions(event_type=expression, max=32, checkpointIntervalMultiplier=1)
    error = await refused(connection, f"{STREAMS}/Read", bare(read_options(no_filter=None, filter=chosen)))
    assert error.status is Status.INVALID_ARGUMENT
    assert "regular expression" in error.details


@pytest.mark.parametrize("prefixes", [["x"] * 1001, ["x" * 65_537]])
async def test_a_filter_of_more_prefixes_than_can_be_compared(connection: Connection, prefixes: list[str]) -> None:
    expression = ReadReq.Options.FilterOptions.Expression(prefix=prefixes)
    chosen = ReadReq.Options.FilterOptions(event_type=expression, max=32, checkpointIntervalMultiplier=1)
    error = await refused(connection, f"{STREAMS}/Read", bare(read_options(no_filter=None, filter=chosen)))
    assert error.status is Status.INVALID_ARGUMENT
    assert "1000 prefixes" in error.details


async def test_a_filter_without_a_window(connection: Connection) -> None:
    expression = ReadReq.Options.FilterOptions.Expression(prefix=["x"])
    chosen = ReadReq.Options.FilterOptions(event_type=expression, checkpointIntervalMultiplier=1)
    error = await refused(connection, f"{STREAMS}/Read", bare(read_options(no_filter=None, filter=chosen)))
    assert error.status is Status.INVALID_ARGUMENT
    assert "window" in error.details


async def test_fields_that_nobody_knows_are_passed_over(connection: Connection) -> None:
    options, event = appends("s", b"x")
    unknown = b"\xfa\x3e\x03abc"
    (answer,) = await raw(connection, f"{STREAMS}/Append", options + unknown, event + unknown)
    assert streams.AppendResp.FromString(answer).success.current_revision == 0


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\xff", b"\x08" * 50])
async def test_bytes_that_are_no_message(connection: Connection, garbage: bytes) -> None:
    for path in (f"{STREAMS}/Append", f"{STREAMS}/Read", f"{STREAMS}/Delete", f"{GROUPS}/Create"):
        error = await refused(connection, path, garbage)
        assert error.status in (Status.INTERNAL, Status.UNKNOWN, Status.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    "path", ["/event_store.client.users.Users/Create", f"{STREAMS}/Truncate", "/", "nonsense", "/a/b/c"]
)
async def test_what_is_not_supported_is_named(connection: Connection, path: str) -> None:
    error = await refused(connection, path, b"")
    assert error.status is Status.UNIMPLEMENTED
    assert path in error.details
    assert "\n" not in error.details


async def test_bad_requests_in_a_batch_call_are_answered_and_the_call_goes_on(connection: Connection) -> None:
    kind = streams.BatchAppendReq

    def request(identifier: Any, type: str = "T", size: int = 2) -> bytes:
        options = kind.Options(stream_identifier=identifier)
        options.any.SetInParent()
        one = message(kind.ProposedMessage, b"x" * size, type)
        id_ = shared.UUID(string=str(uuid4()))
        data: bytes = kind(
            correlation_id=id_, options=options, proposed_messages=[one], is_final=True
        ).SerializeToString()
        return data

    answers = await raw(
        connection,
        f"{STREAMS}/BatchAppend",
        request(named("a")),
        request(named("")),
        request(named(b"\xff")),
        request(named("a"), type=""),
        request(None),
        request(named("a"), size=1_100_000),
        kind(correlation_id=shared.UUID(string="nonsense"), is_final=True).SerializeToString(),
        request(named("a")),
    )
    kinds = [streams.BatchAppendResp.FromString(answer) for answer in answers]
    names = [answer.error.details.TypeName().rpartition(".")[2] for answer in kinds]
    assert names == ["", *["BadRequest"] * 4, "MaximumAppendSizeExceeded", "BadRequest", ""]
    assert [answer.success.current_revision for answer in (kinds[0], kinds[-1])] == [0, 1]


async def test_a_consumer_that_answers_for_events_it_never_got(connection: Connection) -> None:
    created = persistent.CreateReq.Options(
        stream=persistent.CreateReq.StreamOptions(stream_identifier=named("s"), start=NOTHING),
        group_name="g",
        settings=persistent.CreateReq.Settings(read_batch_size=20, history_buffer_size=500, max_retry_count=1),
    )
    await raw(connection, f"{GROUPS}/Create", persistent.CreateReq(options=created).SerializeToString())
    options = persistent.ReadReq.Options(
        stream_identifier=named("s"),
        group_name="g",
        buffer_size=-1,
        uuid_option=persistent.ReadReq.Options.UUIDOption(string=NOTHING),
    )
    ids = [shared.UUID(string=str(uuid4())), shared.UUID(structured=shared.UUID.Structured())]
    with await connection.call(f"{GROUPS}/Read", timeout=20) as call:
        call.send(persistent.ReadReq(options=options).SerializeToString())
        assert await call.receive()
        call.send(persistent.ReadReq(ack=persistent.ReadReq.Ack(ids=ids)).SerializeToString())
        call.send(
            persistent.ReadReq(
                nack=persistent.ReadReq.Nack(ids=ids, action=persistent.ReadReq.Nack.Park)
            ).SerializeToString()
        )
        call.send(persistent.ReadReq(options=options).SerializeToString())
        with pytest.raises(CallFailed) as caught:
            await call.receive()
    assert caught.value.status is Status.UNKNOWN


# ---- connections ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x01\x01\x04\x00\x00\x00\x00\xff",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x05\x00\x00\x00\x00\x00\x01hello",
        b"",
    ],
)
async def test_who_speaks_another_language_is_disconnected(server: EventStoreServer, said: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(said)
    if not said:
        writer.write_eof()
    async with asyncio.timeout(10):
        while await reader.read(65536):
            pass
    writer.close()


async def test_a_client_that_vanishes_in_the_middle_of_an_append_writes_nothing(server: EventStoreServer) -> None:
    async with connected(server.port) as connection:
        with await connection.call(f"{STREAMS}/Append") as call:
            call.send(*appends("gone", b"x", b"y"))
            await raw(connection, f"{STREAMS}/Append", *appends("there", b"x"))
            connection.cut()
    store = await open_eventstoredb(server.uri)
    seen = {event.stream async for event in store.read_all()}
    await store.close()
    assert "there" in seen
    assert "gone" not in seen


async def test_a_client_that_stops_reading_costs_little_memory_and_stops_nobody(server: EventStoreServer) -> None:
    store = await open_eventstoredb(server.uri)
    for n in range(60):
        await store.append(f"big-{n % 6}", [EventData("T", b"x" * 500_000) for _ in range(2)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    request = bare(read_options(count=2**63))
    sockets = []
    for _ in range(10):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        await asyncio.get_running_loop().sock_sendall(sock, _hello() + _request(request))
        sockets.append(sock)
    # Each of them has begun to receive, and could have had all of the 60 MB by the time that another has read them.
    for sock in sockets:
        assert await asyncio.get_running_loop().sock_recv(sock, 9)
    count = 0
    async for _ in store.read_all():
        count += 1
    assert count > 120
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    for sock in sockets:
        sock.close()
    await store.close()
    assert grown < 300 * 1024


def _hello() -> bytes:
    from hyperframe.frame import SettingsFrame

    settings = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1})
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings.serialize()


def _request(body: bytes) -> bytes:
    from hpack import Encoder
    from hyperframe.frame import DataFrame, HeadersFrame, WindowUpdateFrame

    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"{STREAMS}/Read"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
    ]
    headers = HeadersFrame(1, Encoder().encode(fields), flags=["END_HEADERS"])
    data = DataFrame(1, b"\0" + len(body).to_bytes(4, "big") + body, flags=["END_STREAM"])
    window = WindowUpdateFrame(0, window_increment=2**31 - 1 - 65_535)
    return window.serialize() + headers.serialize() + data.serialize()


async def test_200_idle_subscribers_all_hear_of_the_next_event(server: EventStoreServer) -> None:
    wanted = read_options(
        count=None,
        subscription=ReadReq.Options.SubscriptionOptions(),
        stream=ReadReq.Options.StreamOptions(stream_identifier=named("news"), start=NOTHING),
    )
    wanted.ClearField("all")
    wanted.stream.CopyFrom(ReadReq.Options.StreamOptions(stream_identifier=named("news"), start=NOTHING))
    heard = 0

    async with (
        connected(server.port) as one,
        connected(server.port) as other,
        connected(server.port) as appending,
        asyncio.TaskGroup() as tasks,
    ):
        ready = asyncio.Semaphore(0)

        async def listen(connection: Connection) -> None:
            nonlocal heard
            with await connection.call(f"{STREAMS}/Read") as call:
                call.send(bare(wanted), end=True)
                said: list[str | None] = []
                while "caught_up" not in said:
                    said += [content(answer) for answer in await call.receive()]
                ready.release()
                while "event" not in said:
                    said += [content(answer) for answer in await call.receive()]
                heard += 1

        for connection in [one, other] * 100:
            tasks.create_task(listen(connection))
        async with asyncio.timeout(30):
            for _ in range(200):
                await ready.acquire()
            await raw(appending, f"{STREAMS}/Append", *appends("news", b"x"))
    assert heard == 200


def content(answer: bytes) -> str | None:
    kind: str | None = streams.ReadResp.FromString(answer).WhichOneof("content")
    return kind
