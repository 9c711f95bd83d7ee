"""Appends over several streams through KurrentDB's AppendRecords: lost answers, servers without it, what it carries."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import tidings
from tests.integration.eventstoredb import behind_a_proxy, opened, serving, stored
from tidings import Event, Settings, StreamAppend
from tidings.errors import (
    AbilityMissing,
    InvalidAppend,
    StoreError,
    StoreUnavailable,
    StreamNotFound,
    WrongExpectedVersion,
)
from tidings.server import EventStoreServer
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.eventstoredb.appends import Write
from tidings.stores.eventstoredb.grpc_call import CallFailed, ConnectionLost, Status
from tidings.stores.eventstoredb.store import EventStoreDB
from tidings.testing.store_conformance import events, read

KURRENTDB = "kurrentdb-26.1"


class Noted(Event, key="name"):
    name: str


@pytest.mark.parametrize("expected", [ANY, STREAM_EXISTS, 0], ids=["any", "stream_exists", "version"])
async def test_an_append_over_several_streams_whose_answer_was_lost_is_not_repeated(
    tmp_path: Path, expected: Expected
) -> None:
    """The next server has forgotten the ids of what was asked with ANY and STREAM_EXISTS."""
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database, KURRENTDB):
            await store.append("a", events(0))
            proxy.mute = True
            parts = [StreamAppend("a", events(1, 2), expected), StreamAppend("b", events(3)), StreamAppend("c")]
            appending = asyncio.ensure_future(store.append_several(parts))
            await stored(proxy.target, "b", 1)
            assert not appending.done()
        async with serving(proxy, database, KURRENTDB):
            done = await appending
            assert (dict(done.versions), done.position) == ({"a": 2, "b": 0}, await store.head())
            assert await read(store, "a") == [(0, 0), (1, 1), (2, 2)]
            assert await read(store, "b") == [(0, 3)]


@pytest.mark.parametrize("expected", [ANY, NO_STREAM], ids=["any", "no_stream"])
async def test_an_append_over_several_streams_that_never_arrived_is_made_behind_what_others_wrote(
    tmp_path: Path, expected: Expected
) -> None:
    database = tmp_path / "log.db"
    async with behind_a_proxy() as (store, proxy):
        async with serving(proxy, database, KURRENTDB):
            await store.append("a", events(0))
        parts = [StreamAppend("a", events(1)), StreamAppend("b", events(2), expected)]
        appending = asyncio.ensure_future(store.append_several(parts))
        async with serving(proxy, database, KURRENTDB), opened(proxy.target) as other:
            await other.append("a", events(77))
            assert (await appending).versions["b"] == 0
            assert sorted(number for _, number in await read(store, "a")) == [0, 1, 77]


async def losing_its_answer(store: EventStoreDB, other: EventStoreDB) -> list[str]:
    """Have the adapter take the next append for lost, and `other` write once after the log was searched for it."""
    several, searched = store._several, list[str]()
    find, called = several._find, several._called
    lost = [True]

    async def found_and_late(write: Write) -> Appended | Expected:
        found = await find(write)
        searched.append(write.stream)
        if len(searched) == 1:
            await other.append(write.stream, events(77))
        return found

    async def unsent(connection: object, request: bytes) -> object:
        if lost.pop() if lost else False:
            raise ConnectionLost("as the test wants it")
        return await called(connection, request)  # type: ignore[arg-type]

    several._find = found_and_late
    several._called = unsent  # type: ignore[assignment, method-assign]
    return searched


async def test_who_writes_between_the_search_and_the_second_attempt_only_makes_it_search_again() -> None:
    async with (
        EventStoreServer(release=KURRENTDB) as server,
        opened(server.port) as store,
        opened(server.port) as other,
    ):
        await store.append("a", events(0))
        searched = await losing_its_answer(store, other)
        done = await store.append_several([StreamAppend("a", events(1)), StreamAppend("b", events(2))])
        assert dict(done.versions) == {"a": 2, "b": 0}
        assert searched == ["a", "b", "a", "b"]
        assert await read(store, "a") == [(0, 0), (1, 77), (2, 1)]


async def test_an_append_that_never_arrived_is_made_behind_what_cannot_be_read() -> None:
    """A stream that shows nothing has a version none the less, which only a refusal tells."""
    async with (
        EventStoreServer(release=KURRENTDB) as server,
        opened(server.port) as store,
        opened(server.port) as other,
    ):
        await store.append("a", events(0, 1))
        await other.set_metadata("a", {"$tb": 100})
        searched = await losing_its_answer(store, other)
        done = await store.append_several([StreamAppend("a", events(2)), StreamAppend("b", events(3))])
        assert dict(done.versions) == {"a": 3, "b": 0}
        assert searched == ["a", "b", "a", "b"]


async def test_a_repetition_answers_as_before_although_the_ids_of_some_streams_were_forgotten(tmp_path: Path) -> None:
    new, at = StreamAppend("new", events(2, 3), NO_STREAM), StreamAppend("at", events(4), 0)
    parts = [StreamAppend("any", events(1)), new, at]
    database = str(tmp_path / "log.db")
    async with EventStoreServer(database, release=KURRENTDB) as server, opened(server.port) as store:
        await store.append("at", events(0))
        first = await store.append_several(parts)
        await store.append("at", events(5))
    async with EventStoreServer(database, release=KURRENTDB) as server, opened(server.port) as store:
        assert await store.append_several(parts) == first
        assert await read(store, "any") == [(0, 1)]


async def test_a_refusal_names_a_stream_whose_name_is_too_long_for_the_answer() -> None:
    async with EventStoreServer(release=KURRENTDB) as server, opened(server.port) as store:
        name, known = "ü" * 400, events(1)
        await store.append(name, known)
        for part in (StreamAppend(name, events(2), 5), StreamAppend(name, known)):
            with pytest.raises(StoreError, match=f"stream '{name}'"):
                await store.append_several([StreamAppend("other", events(0)), part])
        await store.tombstone(name)
        with pytest.raises(StoreError, match=f"stream '{name}'"):
            await store.append_several([StreamAppend("other", events(0)), StreamAppend(name, events(3))])


async def test_a_refusal_of_the_second_attempt_is_told() -> None:
    async with (
        EventStoreServer(release=KURRENTDB) as server,
        opened(server.port) as store,
        opened(server.port) as other,
    ):
        await store.append("a", events(0))
        await losing_its_answer(store, other)
        with pytest.raises(WrongExpectedVersion, match="'a'"):
            await store.append_several([StreamAppend("a", events(1), 0), StreamAppend("b", events(2))])
        with pytest.raises(StreamNotFound):
            await read(store, "b")


@pytest.mark.parametrize(
    ("expected", "says"),
    [(NO_STREAM, "append the same events, with the same ids, again"), (ANY, "look for the id of one of its events")],
    ids=["no_stream", "any"],
)
async def test_a_server_that_stays_away_is_named_with_what_is_known_of_the_append(
    tmp_path: Path, expected: Expected, says: str
) -> None:
    parts = [StreamAppend("a", events(1)), StreamAppend("b", events(2), expected)]
    async with behind_a_proxy(DefaultDeadline=1) as (store, proxy):
        with pytest.raises(StoreUnavailable, match=r"stream 'a' and 1 other\(s\) was not appended"):
            await store.append_several(parts)
        async with serving(proxy, tmp_path / "log.db", KURRENTDB):
            await store.head()
            proxy.mute = True
            appending = asyncio.ensure_future(store.append_several(parts))
            await stored(proxy.target, "b", 1)
        with pytest.raises(StoreUnavailable, match=f"may or may not have been appended: to be sure, {says}"):
            await appending


async def test_a_user_who_may_not_append_is_told_so_and_that_nothing_was_appended() -> None:
    async with EventStoreServer(release=KURRENTDB) as server, opened(server.port) as store:

        async def denied(connection: object, request: bytes) -> object:
            raise CallFailed(Status.PERMISSION_DENIED, "Access Denied")

        store._several._called = denied  # type: ignore[assignment, method-assign]
        with pytest.raises(StoreUnavailable, match=r"denies user.*stream 'a' and 1 other\(s\) was not appended"):
            await store.append_several([StreamAppend("a", events(1)), StreamAppend("b", events(2))])


async def test_a_server_without_the_call_is_refused_by_name_and_with_what_to_do() -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        with pytest.raises(AbilityMissing, match=r"127\.0\.0\.1.*append_several; nothing was written.*KurrentDB 26\.1"):
            await store.append_several([StreamAppend("a", events(1)), StreamAppend("b", events(2))])
        assert (await store.append("a", events(1))).version == 0, "everything else goes on"


BAD = {
    "no JSON": b"\x00\xff",
    "no object": b"[1]",
    "a large number": b'{"n": 9007199254740993}',
    "a large number inside": b'{"n": [{"k": -9007199254740993}]}',
    "no number": b'{"n": NaN}',
    "half a character": b'{"n": "\\ud800"}',
    "deep": b'{"n":' * 500 + b"1" + b"}" * 500,
}


@pytest.mark.parametrize("metadata", BAD.values(), ids=list(BAD))
async def test_metadata_that_would_not_come_back_is_refused(metadata: bytes) -> None:
    async with EventStoreServer(release=KURRENTDB) as server, opened(server.port) as store:
        bad = EventData("T", b"{}", metadata)
        with pytest.raises(InvalidAppend, match=r"'b'.*metadata.*nothing was written"):
            await store.append_several([StreamAppend("a", events(1)), StreamAppend("b", [bad])])
        with pytest.raises(StreamNotFound):
            await read(store, "a")


async def test_metadata_that_was_read_may_be_appended_again() -> None:
    """What the server added to it is not added twice."""
    async with EventStoreServer(release=KURRENTDB) as server, opened(server.port) as store:
        first = EventData("T", b"{}", json.dumps({"k": 2**53, "f": 1e300, "t": [True, None, {}]}).encode())
        await store.append_several([StreamAppend("a", [first])])
        [found] = [found async for found in store.read_stream("a")]
        await store.append_several([StreamAppend("b", [EventData("Other", b"{}", found.metadata)])])
        [again] = [found async for found in store.read_stream("b")]
        assert json.loads(again.metadata) == json.loads(found.metadata) | {"$schema.name": "Other"}


async def test_events_over_several_streams_are_read_with_their_metadata() -> None:
    async with (
        EventStoreServer(release=KURRENTDB) as server,
        tidings.connect(Settings(store=server.uri)) as log,
    ):
        await log.append_several(
            StreamAppend("a", [Noted(name="ada")], NO_STREAM),
            StreamAppend("b", [Noted(name="bob")]),
            metadata={"actor": "eve"},
            correlation_id="c-1",
        )
        for stream, name in (("a", "ada"), ("b", "bob")):
            [entry] = [entry async for entry in log.read(stream, Noted)]
            assert entry.event == Noted(name=name)
            assert (entry.metadata["actor"], entry.metadata["$correlationId"]) == ("eve", "c-1")
