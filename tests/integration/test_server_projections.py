"""The system projections: real links, each event once, whatever happens to the server; and the register of others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import (
    AlreadyExists,
    ExceptionThrownByHandler,
    GrpcDeadlineExceeded,
    NotFound,
    OperationFailed,
)

from tests.integration.server import ServerProcess, in_thread
from tidings.server import EventStoreServer

ANY = StreamState.ANY


def put(client: EventStoreDBClient, stream: str, *events: NewEvent) -> None:
    client.append_to_stream(stream, current_version=ANY, events=list(events))


def linked(client: EventStoreDBClient, stream: str) -> list[tuple[str, int]]:
    """Return the events to which the stream's links lead."""
    return [(event.stream_name, event.stream_position) for event in client.get_stream(stream, resolve_links=True)]


async def asked(question: Any, **options: Any) -> Any:
    """Call a function with a client of a new server. Return its result."""
    async with EventStoreServer(**options) as server:

        def ask() -> Any:
            client = EventStoreDBClient(server.uri)
            try:
                return question(client)
            finally:
                client.close()

        return await in_thread(ask)


async def test_events_are_linked_by_category_and_by_type() -> None:
    def question(client: EventStoreDBClient) -> None:
        put(client, "order-1", NewEvent("Placed", b"{}"), NewEvent("Paid", b"{}"))
        put(client, "order-2", NewEvent("Placed", b"{}"))
        put(client, "nodash", NewEvent("Placed", b"{}"))
        assert linked(client, "$ce-order") == [("order-1", 0), ("order-1", 1), ("order-2", 0)]
        assert linked(client, "$et-Placed") == [("order-1", 0), ("order-2", 0), ("nodash", 0)]
        (link, *_) = client.get_stream("$ce-order")
        assert (link.type, link.data, link.stream_name) == ("$>", b"0@order-1", "$ce-order")
        with pytest.raises(NotFound):
            client.get_stream("$ce-nodash")

    await asked(question)


async def test_a_category_has_what_is_no_json_and_nothing_of_the_stores_own() -> None:
    def question(client: EventStoreDBClient) -> None:
        put(client, "a-1", NewEvent("Octets", b"{}", content_type="application/octet-stream"))
        put(client, "a-1", NewEvent("Broken", b"{nope"))
        client.set_stream_metadata("a-1", metadata={"k": 1})
        put(client, "a-1", NewEvent("Good", b"[]"))
        assert linked(client, "$ce-a") == [("a-1", 0), ("a-1", 1), ("a-1", 2)]
        for kind in ("Octets", "Broken", "$metadata", "$>"):
            with pytest.raises(NotFound):
                client.get_stream(f"$et-{kind}")

    await asked(question)


async def test_a_subscription_to_a_category_goes_on_with_new_events() -> None:
    def question(client: EventStoreDBClient) -> list[tuple[str, int]]:
        put(client, "a-1", NewEvent("T", b"{}"))
        subscription = client.subscribe_to_stream("$ce-a", resolve_links=True, timeout=20)
        first = next(subscription)
        put(client, "a-2", NewEvent("T", b"{}"))
        second = next(subscription)
        subscription.stop()
        return [(event.stream_name, event.stream_position) for event in (first, second)]

    assert await asked(question) == [("a-1", 0), ("a-2", 0)]


async def test_links_whose_events_are_gone_are_passed_over() -> None:
    def question(client: EventStoreDBClient) -> list[tuple[str, int]]:
        put(client, "a-1", NewEvent("T", b"{}"))
        put(client, "a-2", NewEvent("T", b"{}"))
        linked(client, "$ce-a")
        client.delete_stream("a-1", current_version=ANY)
        return linked(client, "$ce-a")

    assert await asked(question) == [("a-2", 0)]


async def test_all_with_resolved_links_shows_events_twice() -> None:
    def question(client: EventStoreDBClient) -> list[int]:
        event = NewEvent("T", b"{}")
        put(client, "a-1", event)
        return [
            sum(found.id == event.id for found in client.read_all(filter_exclude=(), resolve_links=resolve))
            for resolve in (False, True)
        ]

    assert await asked(question) == [1, 3]


async def test_without_a_reader_nothing_is_linked_unless_told_so() -> None:
    def question(client: EventStoreDBClient) -> list[str]:
        put(client, "a-1", NewEvent("T", b"{}"))
        return [event.type for event in client.read_all(filter_exclude=()) if event.stream_name.startswith("$ce")]

    assert await asked(question) == []


async def test_every_event_is_linked_once_over_kills(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    count = 0
    for _ in range(4):
        with ServerProcess(db, "--projections") as server:
            client = EventStoreDBClient(server.uri)
            for _ in range(20):
                put(client, f"a-{count % 3}", *(NewEvent("T", b"{}") for _ in range(10)))
                count += 10
            server.kill()  # somewhere in the middle of linking
            client.close()
    with ServerProcess(db) as server:

        def question() -> list[tuple[str, int]]:
            client = EventStoreDBClient(server.uri)
            try:
                found: list[tuple[str, int]] = []
                for _ in range(100):  # it catches up while it is read
                    found = linked(client, "$ce-a")
                    if len(found) >= count:
                        break
                return found
            finally:
                client.close()

        found = await asyncio.to_thread(question)
    assert len(found) == len(set(found)) == count


async def test_the_register() -> None:
    def question(client: EventStoreDBClient) -> None:
        statistics = client.get_projection_statistics(name="$by_category")
        assert statistics.status == "Running"
        with pytest.raises(NotFound):
            client.get_projection_statistics(name="mine")
        with pytest.raises(ExceptionThrownByHandler):
            client.create_projection(name="mine", query="", emit_enabled=False, track_emitted_streams=True)
        client.create_projection(name="mine", query="fromAll()")
        with pytest.raises(AlreadyExists):
            client.create_projection(name="mine", query="fromAll()")
        client.update_projection(name="mine", query="fromAll().when()")
        assert client.get_projection_state(name="mine").value == {}
        with pytest.raises(OperationFailed):
            client.delete_projection(name="mine")
        client.disable_projection(name="mine")
        assert client.get_projection_statistics(name="mine").status == "Stopped"
        client.enable_projection(name="mine")
        client.reset_projection(name="mine")
        client.disable_projection(name="mine")
        client.delete_projection(name="mine")
        with pytest.raises(NotFound):
            client.disable_projection(name="mine")
        client.create_projection(name="empty", query="")
        with pytest.raises(GrpcDeadlineExceeded):
            client.get_projection_state(name="empty", timeout=0.5)

    await asked(question)


async def test_the_register_outlives_the_server_and_disabled_means_no_links(tmp_path: Path) -> None:
    db = tmp_path / "log.db"

    def first(client: EventStoreDBClient) -> None:
        client.create_projection(name="mine", query="fromAll()")
        client.disable_projection(name="$by_category")

    def second(client: EventStoreDBClient) -> str:
        put(client, "a-1", NewEvent("T", b"{}"))
        assert linked(client, "$et-T") == [("a-1", 0)]
        with pytest.raises(NotFound):
            client.get_stream("$ce-a")
        return client.get_projection_statistics(name="mine").status

    await asked(first, db=db)
    assert await asked(second, db=db) == "Running"
