"""What users of EventStoreDB's client notice of the server beyond the recorded cases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import FailedPrecondition, NotFound, OperationFailed, StreamIsDeleted, WrongCurrentVersion
from structlog.testing import capture_logs

from tests.integration.server import STREAMS, appends, connected, in_thread, serving
from tidings.server import EventStoreServer
from tidings.server.calls import Call, Method, Send
from tidings.server.group_delivery import Consumer, Delivery, Item, Mark
from tidings.server.log import ServedLog
from tidings.server.protocol import shared
from tidings.stores import ANY, EventData, RecordedEvent
from tidings.stores.eventstoredb.grpc_call import CallFailed, Status
from tidings.stores.sqlite.store import open_sqlite

EVENTS = [NewEvent("T", b"%d" % n, content_type="application/octet-stream") for n in range(4)]


def received(subscription: Any, count: int) -> list[bytes]:
    got: list[bytes] = []
    for event in subscription:
        subscription.ack(event)
        got.append(event.data)
        if len(got) == count:
            break
    return got


async def test_round_robin_begins_with_the_consumer_that_came_first() -> None:
    def consume(uri: str) -> list[list[bytes]]:
        with EventStoreDBClient(uri) as client:
            client.create_subscription_to_stream("g", "s", consumer_strategy="RoundRobin")
            consumers = [client.read_subscription_to_stream("g", "s", timeout=20) for _ in range(2)]
            client.append_to_stream("s", current_version=StreamState.NO_STREAM, events=EVENTS)
            return [received(consumer, 2) for consumer in consumers]

    async with EventStoreServer() as server:
        assert await in_thread(consume, server.uri) == [[b"0", b"2"], [b"1", b"3"]]


async def test_a_projection_without_a_query_never_runs_and_may_be_deleted_at_once() -> None:
    def delete(uri: str) -> None:
        with EventStoreDBClient(uri) as client:
            client.create_projection(name="runs", query="fromAll()")
            with pytest.raises(OperationFailed):
                client.delete_projection(name="runs")
            client.create_projection(name="empty", query="")
            client.delete_projection(name="empty")
            with pytest.raises(NotFound):
                client.get_projection_statistics(name="empty")

    async with EventStoreServer() as server:
        await in_thread(delete, server.uri)


async def test_metadata_that_a_stream_had_before_its_tombstone_can_be_set_after_it() -> None:
    def use(uri: str) -> int:
        with EventStoreDBClient(uri) as client:
            for stream in ("with", "without"):
                client.append_to_stream(stream, current_version=StreamState.NO_STREAM, events=EVENTS)
            client.set_stream_metadata("with", metadata={"k": 1}, current_version=StreamState.NO_STREAM)
            client.delete_stream("with", current_version=StreamState.ANY)  # its metadata says so: nothing is undone
            for stream in ("with", "without"):
                client.tombstone_stream(stream, current_version=StreamState.ANY)
            client.set_stream_metadata("with", metadata={"k": 2}, current_version=1)
            client.set_stream_metadata("with", metadata={"k": 3}, current_version=StreamState.ANY)
            with pytest.raises(WrongCurrentVersion):
                client.set_stream_metadata("with", metadata={"k": 4}, current_version=1)
            with pytest.raises(FailedPrecondition):
                client.set_stream_metadata("without", metadata={"k": 1}, current_version=StreamState.ANY)
            with pytest.raises(StreamIsDeleted):
                client.get_stream("with")
            written = client.read_all(filter_exclude=(), filter_include=(r"\$metadata",))
            return len([event for event in written if event.stream_name == "$$with"])

    async with EventStoreServer() as server:
        assert await in_thread(use, server.uri) == 4


@pytest.mark.parametrize("timeout", ["0n", "1n", "1000u", "1m"])
async def test_a_call_that_comes_without_time_is_not_begun(timeout: str) -> None:
    async with EventStoreServer() as server, connected(server.port) as connection:
        with await connection.call(f"{STREAMS}/Append", [("grpc-timeout", timeout)]) as call:
            call.send(*appends("s", b"late"), end=True)
            with pytest.raises(CallFailed) as refused:
                await call.receive()
        assert refused.value.status is Status.DEADLINE_EXCEEDED

        def read() -> None:
            with EventStoreDBClient(server.uri) as client, pytest.raises(NotFound):
                client.get_stream("s")

        await in_thread(read)


async def test_a_handler_that_answers_a_client_that_has_gone_is_no_failure() -> None:
    began, answered = asyncio.Event(), asyncio.Event()

    async def handler(request: object, call: Call, send: Send) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await send([b"late"])
            finally:
                answered.set()

    with capture_logs() as logs:
        async with serving(Method("/a/b", shared.Empty, streaming=handler)) as (port, _), connected(port) as connection:
            call = await connection.call("/a/b")
            call.send(b"", end=True)
            await began.wait()
            call.cancel()
            await answered.wait()
    assert [entry["event"] for entry in logs] == []


async def test_a_call_that_is_cancelled_from_inside_does_not_end_as_if_all_went_well() -> None:
    """As when the group of all calls ends because one of its tasks has failed."""
    inside: list[asyncio.Task[Any]] = []

    async def handler(request: object, call: Call, send: Send) -> None:
        await send([b"half"])
        task = asyncio.current_task()
        assert task is not None
        inside.append(task)
        await asyncio.Event().wait()

    async with serving(Method("/a/b", shared.Empty, streaming=handler)) as (port, _), connected(port) as connection:
        call = await connection.call("/a/b")
        call.send(b"", end=True)
        assert await call.receive() == [b"half"]
        inside[0].cancel()
        with pytest.raises(CallFailed) as caught:
            await call.receive()
        assert caught.value.status is Status.UNAVAILABLE
        await connection.close()


async def test_a_quiet_stream_is_noticed_behind_many_events_of_others() -> None:
    store = await open_sqlite("memory://")
    try:
        served = ServedLog(store, lambda: 0)
        for stream, count in (("busy", 1500), ("quiet", 1), ("busy", 1500)):
            await store.append(stream, [EventData("T", b"") for _ in range(count)], expected=ANY)
        async with asyncio.timeout(20):
            await asyncio.gather(*(served.touched("quiet", 0) for _ in range(3)))
    finally:
        await store.close()


async def test_a_quiet_stream_is_followed_past_what_is_written_to_others() -> None:
    def follow(uri: str) -> list[tuple[str, bytes]]:
        with EventStoreDBClient(uri) as client:
            subscriptions = [client.subscribe_to_stream(f"s-{n}", timeout=20) for n in range(3)]
            filtered = [client.subscribe_to_all(filter_include=(r"Last",), timeout=20) for _ in range(2)]
            for n in range(700):
                client.append_to_stream("busy", current_version=n - 1 if n else StreamState.NO_STREAM, events=EVENTS[0])
            for n in range(3):
                last = NewEvent("Last", b"%d" % n, content_type="application/octet-stream")
                client.append_to_stream(f"s-{n}", current_version=StreamState.NO_STREAM, events=last)
            one = [next(subscription) for subscription in subscriptions]
            all_ = [next(subscription) for subscription in filtered for _ in range(3)]
            return [(event.stream_name, event.data) for event in (*one, *all_)]

    async with EventStoreServer() as server:
        assert await in_thread(follow, server.uri) == [(f"s-{n}", b"%d" % n) for n in range(3)] * 3


def test_round_robin_passes_nobody_over_when_a_consumer_leaves() -> None:
    state = Delivery("RoundRobin", 1, 10.0, Mark(-1, 0))
    first, second, third = consumers = [Consumer(9) for _ in range(3)]
    for consumer in consumers:
        state.join(consumer)
    offer(state, 0)
    assert first.unanswered
    state.done(first, list(first.unanswered))
    state.leave(first)
    offer(state, 1)
    assert (len(second.unanswered), len(third.unanswered)) == (1, 0)


def offer(state: Delivery, version: int) -> None:
    event = RecordedEvent(version + 1, "s", version, "T", b"", b"", True, bytes([version] * 16), 0)
    state.offer(
        [Item((event, None), Mark(version, version + 1), Mark(version - 1, version))], Mark(version, version + 1)
    )
    state.dispatch(0.0)
