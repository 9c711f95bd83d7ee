"""What users of EventStoreDB's client notice of the server beyond the recorded cases."""

from __future__ import annotations

from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import NotFound, OperationFailed

from tests.integration.server import STREAMS, appends, connected, in_thread
from tidings.server import EventStoreServer
from tidings.server.group_delivery import Consumer, Delivery, Item, Mark
from tidings.stores import RecordedEvent
from tidings.stores.grpc_call import CallFailed, Status

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
