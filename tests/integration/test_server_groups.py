"""Persistent subscriptions through EventStoreDB's client: what survives, who is dropped, what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import (
    AlreadyExists,
    EventStoreDBClientException,
    InternalError,
    NotFound,
)

from tests.integration.server import in_thread, named
from tidings.server import EventStoreServer
from tidings.server.protocol import persistent

ANY = StreamState.ANY


@pytest.fixture
def events() -> list[NewEvent]:
    return [NewEvent("T", b"%d" % n, content_type="application/octet-stream") for n in range(6)]


async def asked(question: Callable[[EventStoreDBClient], Any], **options: Any) -> Any:
    async with EventStoreServer(**options) as server:

        def ask() -> Any:
            client = EventStoreDBClient(server.uri)
            try:
                return question(client)
            finally:
                client.close()

        return await in_thread(ask)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def taken(subscription: Any, count: int, word: str = "ack") -> list[bytes]:
    got: list[bytes] = []
    for event in subscription:
        got.append(event.data)
        if word == "ack":
            subscription.ack(event)
        else:
            subscription.nack(event, word)
        if len(got) == count:
            break
    return got


def groups_of(client: EventStoreDBClient) -> Any:
    """Return the gRPC service, for calls that the client's methods do not offer."""
    return client._connection.persistent_subscriptions._stub


def described(client: EventStoreDBClient) -> Any:
    options = persistent.GetInfoReq.Options(group_name="g", stream_identifier=named("s"))
    return groups_of(client).GetInfo(persistent.GetInfoReq(options=options)).subscription_info


def put(client: EventStoreDBClient, stream: str, events: list[NewEvent]) -> None:
    client.append_to_stream(stream, current_version=ANY, events=events)


async def test_parked_events_and_settings_outlive_the_server(tmp_path: Path, events: list[NewEvent]) -> None:
    db = tmp_path / "log.db"

    def first(client: EventStoreDBClient) -> None:
        put(client, "s", events)
        client.create_subscription_to_stream("g", "s", max_retry_count=7, consumer_strategy="RoundRobin")
        subscription = client.read_subscription_to_stream("g", "s")
        taken(subscription, 6, "park")
        until(lambda: client.get_subscription_info("g", "s").parked_message_count == 6)
        subscription.stop()

    def second(client: EventStoreDBClient) -> tuple[list[bytes], int, str, int]:
        info = client.get_subscription_info("g", "s")
        client.replay_parked_events("g", "s")
        with client.read_subscription_to_stream("g", "s") as subscription:
            replayed: list[bytes] = []
            for event in subscription:
                subscription.ack(event)
                if event.link is not None:  # without a checkpoint the stream's own events come again, too
                    replayed.append(event.data)
                if len(replayed) == 6:
                    break
        until(lambda: client.get_subscription_info("g", "s").parked_message_count == 0)
        return replayed, info.parked_message_count, info.consumer_strategy, info.max_retry_count

    await asked(first, db=db)
    expected = [event.data for event in events]
    assert await asked(second, db=db) == (expected, 6, "RoundRobin", 7)


async def test_replaying_may_stop_before_the_end(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> list[bytes]:
        put(client, "s", events)
        client.create_subscription_to_stream("g", "s")
        with client.read_subscription_to_stream("g", "s") as subscription:
            taken(subscription, 6, "park")
            until(lambda: client.get_subscription_info("g", "s").parked_message_count == 6)
            options = persistent.ReplayParkedReq.Options(group_name="g", stream_identifier=named("s"), stop_at=2)
            groups_of(client).ReplayParked(persistent.ReplayParkedReq(options=options))
            got = taken(subscription, 2)
            until(lambda: client.get_subscription_info("g", "s").parked_message_count == 4)
            return got

    assert await asked(question) == [b"0", b"1"]


async def test_an_update_drops_the_consumers_and_keeps_the_checkpoint(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> list[bytes]:
        put(client, "s", events)
        client.create_subscription_to_stream("g", "s", min_checkpoint_count=1, max_checkpoint_count=1)
        subscription = client.read_subscription_to_stream("g", "s", event_buffer_size=1)
        taken(subscription, 3)
        until(lambda: client.get_subscription_info("g", "s").last_checkpointed_event_position == "2")
        until(lambda: len(client.get_stream("$persistentsubscription-s::g-checkpoint")) == 2)
        client.update_subscription_to_stream("g", "s", max_retry_count=3)
        with pytest.raises(EventStoreDBClientException, match="was dropped"):
            taken(subscription, 100)
        assert client.get_subscription_info("g", "s").max_retry_count == 3
        with client.read_subscription_to_stream("g", "s") as again:
            return taken(again, 3)

    assert await asked(question) == [b"3", b"4", b"5"]


async def test_a_deleted_group_drops_its_consumers_and_leaves_nothing(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> list[bytes]:
        put(client, "s", events)
        client.create_subscription_to_stream("g", "s", min_checkpoint_count=1, max_checkpoint_count=1)
        subscription = client.read_subscription_to_stream("g", "s")
        taken(subscription, 1, "park")
        taken(subscription, 5)
        until(lambda: client.get_subscription_info("g", "s").parked_message_count == 1)
        client.delete_subscription("g", "s")
        with pytest.raises(EventStoreDBClientException, match="was dropped"):
            next(subscription)
        for stream in ("$persistentsubscription-s::g-checkpoint", "$persistentsubscription-s::g-parked"):
            with pytest.raises(NotFound):
                client.get_stream(stream)
        client.create_subscription_to_stream("g", "s")
        with client.read_subscription_to_stream("g", "s") as again:
            return taken(again, 6)

    assert await asked(question) == [event.data for event in events]


async def test_a_consumer_that_goes_gives_its_events_to_another(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> list[tuple[bytes, int | None]]:
        put(client, "s", events[:3])
        client.create_subscription_to_stream("g", "s", max_retry_count=0)
        first = client.read_subscription_to_stream("g", "s")
        assert next(first).data == b"0"
        second = client.read_subscription_to_stream("g", "s")
        first.stop()
        got = []
        for event in second:
            got.append((event.data, event.retry_count))
            second.ack(event)
            if len(got) == 3:
                second.stop()
        return got

    assert await asked(question) == [(b"0", 1), (b"1", 1), (b"2", 1)]


async def test_a_group_on_all_filters_and_starts_where_it_is_told(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> tuple[list[bytes], list[bytes], str]:
        put(client, "old", events[:2])
        at = client.append_to_stream("a", current_version=ANY, events=events[2])
        put(client, "b", [events[3]])
        client.create_subscription_to_all("from", commit_position=at)
        client.create_subscription_to_all("filtered", filter_include=("a|c",), filter_by_stream_name=True)
        put(client, "c", [events[4]])
        with client.read_subscription_to_all("from") as subscription:
            everything = taken(subscription, 3)
        with client.read_subscription_to_all("filtered") as subscription:
            some = taken(subscription, 2)
        return everything, some, client.get_subscription_info("from").start_from

    everything, some, start = await asked(question)
    assert everything == [b"2", b"3", b"4"]
    assert some == [b"2", b"4"]
    assert start.startswith("C:")


async def test_a_group_that_reads_one_by_one_gets_past_what_all_hides(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> list[bytes]:
        put(client, "s", events)
        client.create_subscription_to_all("g", filter_exclude=(), read_batch_size=1)
        with client.read_subscription_to_all("g") as subscription:
            return taken(subscription, 7)

    assert (await asked(question))[1:] == [event.data for event in events]


async def test_the_checkpoint_of_a_filtered_group_passes_what_it_does_not_want(tmp_path: Path) -> None:
    db = tmp_path / "log.db"

    def first(client: EventStoreDBClient) -> None:
        client.create_subscription_to_all(
            "g", filter_include=("never",), min_checkpoint_count=1, max_checkpoint_count=10, checkpoint_after=0.1
        )
        put(client, "s", [NewEvent("T", b"{}") for _ in range(50)])
        until(lambda: client.get_subscription_info("g").last_checkpointed_event_position != "")

    await asked(first, db=db)

    def second(client: EventStoreDBClient) -> str:
        return str(client.get_subscription_info("g").last_checkpointed_event_position)

    assert (await asked(second, db=db)).startswith("C:")


async def test_what_cannot_be_is_refused(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> None:
        put(client, "s", events)
        client.create_subscription_to_all("g")
        with pytest.raises(AlreadyExists):
            client.create_subscription_to_all("g")
        with pytest.raises(InternalError):
            client.create_subscription_to_all("beyond", commit_position=10**12)
        with pytest.raises(NotFound):
            client.update_subscription_to_all("none")
        with pytest.raises(NotFound):
            client.delete_subscription("none", "s")
        assert [info.group_name for info in client.list_subscriptions()] == ["g"]
        assert client.list_subscriptions_to_stream("s") == []

    await asked(question)


async def test_a_group_says_who_is_connected(events: list[NewEvent]) -> None:
    def question(client: EventStoreDBClient) -> tuple[int, int, int]:
        put(client, "s", events)
        client.create_subscription_to_stream("g", "s")
        with client.read_subscription_to_stream("g", "s", event_buffer_size=4) as subscription:
            next(subscription)
            until(lambda: client.get_subscription_info("g", "s").total_in_flight_messages == 4)
            info = described(client)
            (connection,) = info.connections
            return connection.available_slots, connection.in_flight_messages, info.read_buffer_count

    assert await asked(question) == (0, 4, 2)
