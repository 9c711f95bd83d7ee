"""The PostgreSQL store under concurrent writers, whatever the database holds and the names are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

import tidings.stores.postgresql.schema as schema
import tidings.stores.postgresql.watcher as watcher
import tidings.stores.postgresql.writer as writer
from tests.integration.postgresql_log import another, connected, database_of
from tidings import open_store
from tidings.errors import ConfigurationError, EventTooLarge, StoreUnavailable, StreamDeleted, WrongExpectedVersion
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, EventData, EventStore, Expected, Filter, RecordedEvent
from tidings.stores.postgresql.appender import Appender
from tidings.testing.store_conformance import PATIENCE, caught_up, closing, event, events, numbers, read, take


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[EventStore]:
    async with open_store(postgresql_url) as store:
        yield store


async def positions(store: EventStore, after: int = -1) -> list[int]:
    return [found.position async for found in store.read_all(after=after)]


# ---- one order, without gaps


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_many_processes_write_one_order_and_nobody_sees_a_gap(postgresql_url: str, isolation: str) -> None:
    """Each store has connections of its own, as a process has. Some of their appends are refused, some rolled back."""
    async with connected(postgresql_url) as other, AsyncExitStack() as stack:
        await other.execute(
            f"ALTER DATABASE {database_of(postgresql_url)} SET default_transaction_isolation = '{isolation}'"
        )
        stores = [await stack.enter_async_context(open_store(postgresql_url)) for _ in range(4)]
        reader = await stack.enter_async_context(open_store(postgresql_url))
        done = asyncio.Event()
        told = 0

        async def write(number: int, store: EventStore) -> int:
            dice, written = random.Random(number), 0
            for n in range(60):
                stream = dice.choice(["shared-a", "shared-b", f"own-{number}", f"new-{number}-{n}"])
                choices: list[Expected] = [ANY, ANY, NO_STREAM, n]
                expected = dice.choice(choices)
                batch = [event(n) for _ in range(dice.randint(1, 4))]
                try:
                    await store.append(stream, batch, expected=expected)
                    written += len(batch)
                except WrongExpectedVersion:
                    pass
            return written

        async def roll_back() -> None:
            while not done.is_set():
                transaction = other.transaction()
                await transaction.start()
                key = schema.key_of("rolled-back")
                await other.execute(
                    "SELECT tidings_log.append('{}', '{}', '{}', '{}', $1, $2, '{0}', $2, '{t}', $1, $2, $2)",
                    [key],
                    [b"x"],
                )
                await transaction.rollback()
                await asyncio.sleep(0.01)

        async def follow() -> None:
            nonlocal told
            async with closing(reader.subscribe_all()) as source:
                async for item in source:
                    if isinstance(item, RecordedEvent):
                        assert item.position == told + 1
                        told = item.position

        async def look() -> None:
            while not done.is_set():
                found = await positions(reader)
                assert found == list(range(1, len(found) + 1))

        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follow())
            tasks.create_task(look())
            tasks.create_task(roll_back())
            written = await asyncio.gather(*(write(number, store) for number, store in enumerate(stores)))
            done.set()
            head = await reader.head()
            async with asyncio.timeout(PATIENCE):
                while told < head:
                    await asyncio.sleep(0.01)
            following.cancel()
        assert head == sum(written) + 1, "the first event says which log it is"


async def test_a_refused_append_of_a_group_leaves_its_neighbours_alone(store: EventStore) -> None:
    await store.append("known", events(0))
    await store.tombstone("closed")
    outcomes = await asyncio.gather(
        store.append("a", events(1)),
        store.append("known", events(2), expected=7),
        store.append("known", events(3), expected=0),
        store.append("closed", events(4)),
        store.append("missing", events(5), expected=STREAM_EXISTS),
        store.append("b", events(6), expected=NO_STREAM),
        store.append("known", events(7), expected=0),
        store.append("known", events(8), expected=1),
        return_exceptions=True,
    )
    refused = [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
    assert refused == [WrongExpectedVersion, StreamDeleted, WrongExpectedVersion, WrongExpectedVersion]
    assert await read(store, "known") == [(0, 0), (1, 3), (2, 8)]
    assert await read(store, "a") + await read(store, "b") == [(0, 1), (0, 6)]
    assert await positions(store) == list(range(1, 8))


async def test_what_another_process_did_to_a_stream_is_seen_by_who_remembers_it(
    postgresql_url: str, store: EventStore
) -> None:
    """Versions, metadata and ids of a stream are remembered, and checked where they are written."""
    async with open_store(postgresql_url) as other:
        again = events(0)
        await store.append("s", again)
        await other.append("s", events(1))
        assert (await store.append("s", events(2))).version == 2
        with pytest.raises(WrongExpectedVersion) as refusal:
            await store.append("s", events(9), expected=7)
        assert refusal.value.actual == 2
        theirs = events(3)
        first = await other.append("s", theirs)
        assert await store.append("s", theirs) == first
        assert await store.append("s", theirs, expected=2) == first
        await other.delete("s")
        with pytest.raises(StreamDeleted):
            await store.append("s", events(9), expected=STREAM_EXISTS)
        assert (await store.append("s", events(4))).version == 4
        assert await read(store, "s") == [(4, 4)]
        await other.set_metadata("s", {"$tb": 2**63 - 1})
        assert (await store.append("s", events(5))).version == 5
        assert await read(store, "s") == [(5, 5)]
        await other.tombstone("s")
        with pytest.raises(StreamDeleted):
            await store.append("s", events(9))


async def test_most_groups_take_one_round_trip(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the streams first: new ones, known ones, and those whose version the caller knows."""
    look, looks = Appender._looked, 0

    async def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return await look(*arguments)

    monkeypatch.setattr(Appender, "_looked", counted)
    async with open_store(postgresql_url) as other:
        for n in range(5):
            await asyncio.gather(
                store.append(f"new-{n}", events(0), expected=NO_STREAM),
                store.append("own", events(n)),
                other.append("others", events(n)),
                other.append("own-of-other", events(n), expected=n - 1 if n else NO_STREAM),
            )
        assert (await other.append("own", events(5), expected=4)).version == 5
        assert looks == 0
        assert (await store.append("own", events(6))).version == 6
        assert looks == 1, "somebody else wrote to it"


@pytest.mark.parametrize("how", ["notified", "polling"])
async def test_a_subscription_hears_of_what_another_process_appends(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "notified":
        monkeypatch.setattr(watcher, "POLL_SECONDS", 3600)
    else:
        monkeypatch.setattr(watcher, "CHANNEL", "nobody_notifies")
    async with open_store(postgresql_url) as other, closing(store.subscribe_all()) as source:
        await take(source, caught_up)
        for n in range(5):
            await other.append("s", [event(n)])
            assert numbers(await take(source, lambda got: bool(numbers(got)))) == [n]


# ---- names, bytes, sizes


NAMES = ["nul\0in it", "Ünïcödé ✓ 🧾", "x" * 20_000, "a'b\"c\\d%_", "tidings-escaped:x"]


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SQL_ASCII"])
async def test_any_name_and_type_in_a_database_of_any_encoding(postgresql_url: str, encoding: str) -> None:
    options = f"ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    async with another(postgresql_url, options) as url, open_store(url) as store:
        for n, name in enumerate(NAMES):
            assert (await store.append(name, [event(n, name)], expected=NO_STREAM)).version == 0
            await store.set_metadata(name, {name: name})
        for n, name in enumerate(NAMES):
            [found] = [found async for found in store.read_all(filter=Filter(types=(name,)))]
            assert (found.stream, found.type, numbers([found])) == (name, name, [n])
            [found] = [found async for found in store.read_all(filter=Filter(stream_prefixes=(name,)))]
            assert found.stream == name
            assert await read(store, name) == [(0, n)]
            assert (await store.get_metadata(name)).values == {name: name}


async def test_batches_larger_than_a_transaction_and_than_a_page(store: EventStore) -> None:
    large = [EventData("Large", bytes([n]) * 1_000_000) for n in range(24)]
    await asyncio.gather(*(store.append("large", [one]) for one in large))
    assert [found.data async for found in store.read_stream("large")] == [one.data for one in large]
    back = [found.data async for found in store.read_all(backwards=True, filter=Filter(types=("Large",)))]
    assert back == [one.data for one in reversed(large)]
    await store.append("many", [EventData("T", b"") for _ in range(20_000)])
    assert [found.version async for found in store.read_stream("many", backwards=True)] == list(reversed(range(20_000)))
    assert await positions(store) == list(range(1, 20_026))


async def test_very_many_small_events_share_no_transaction_with_others(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "GROUP_BYTES", 100_000)
    write, groups = Appender.write, list[list[str]]()

    async def noted(self: Appender, connection: Any, group: Any) -> Any:
        groups.append([each.stream for each in group])
        return await write(self, connection, group)

    monkeypatch.setattr(Appender, "write", noted)
    many = [EventData("T", b"") for _ in range(1000)]
    await asyncio.gather(
        store.append("a", events(0)), store.append("b", events(1)), store.append("many", many), store.append("c", [])
    )
    assert groups == [["a", "b"], ["many"], ["c"]]


async def test_a_long_name_counts_for_each_event(store: EventStore) -> None:
    with pytest.raises(EventTooLarge, match="name for each event"):
        await store.append("x" * 100_000, [EventData("T", b"") for _ in range(2000)])


@pytest.mark.parametrize("expected", [2**63 - 1, 2**63, 2**70, -2, -(2**70)])
async def test_an_impossible_version_is_refused_as_a_wrong_one(store: EventStore, expected: int) -> None:
    await store.append("s", events(0))
    with pytest.raises(WrongExpectedVersion):
        await store.append("s", events(1), expected=expected)
    with pytest.raises(WrongExpectedVersion):
        await store.append("other", events(1), expected=expected)


# ---- the schema


async def test_two_processes_that_begin_at_once_make_one_log(postgresql_url: str) -> None:
    async with AsyncExitStack() as stack:
        stores = await asyncio.gather(*(stack.enter_async_context(open_store(postgresql_url)) for _ in range(4)))
        assert len({await store.log_id() for store in stores}) == 1
        assert await stores[0].head() == 1


async def test_a_log_lives_beside_the_tables_of_a_service(postgresql_url: str) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("CREATE TABLE events (n integer); CREATE TABLE about (n integer)")
        async with open_store(postgresql_url) as store:
            await store.append("s", events(0))
        tables = await other.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert sorted(row[0] for row in tables) == ["about", "events"]


async def test_a_schema_of_somebody_else_is_left_alone(postgresql_url: str) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("CREATE SCHEMA tidings_log; CREATE TABLE tidings_log.mine (n integer)")
        with pytest.raises(ConfigurationError, match="no event log"):
            async with open_store(postgresql_url):
                pass
        assert await other.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'tidings_log'") == 1


async def test_a_newer_schema_is_refused(postgresql_url: str, store: EventStore) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("UPDATE tidings_log.about SET schema_version = 99")
    with pytest.raises(ConfigurationError, match="version 99"):
        async with open_store(postgresql_url):
            pass


async def test_an_older_schema_is_upgraded_once(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append("s", events(0))
    added = "ALTER TABLE tidings_log.about ADD COLUMN added integer"  # fails when it is run twice
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    monkeypatch.setitem(schema._UPGRADES, schema.SCHEMA_VERSION - 1, [added])

    async def opened() -> list[tuple[int, int]]:
        async with open_store(postgresql_url) as upgraded:
            return await read(upgraded, "s")

    assert await asyncio.gather(*(opened() for _ in range(4))) == [[(0, 0)]] * 4


async def test_a_closed_store_leaves_no_connection(postgresql_url: str) -> None:
    async with connected(postgresql_url) as other:
        async with open_store(postgresql_url) as store:
            source = store.subscribe_all()
            await take(source, caught_up)
            following = asyncio.ensure_future(take(source, lambda got: False))
            await asyncio.gather(*(read(store, "tidings_log", limit=0) for _ in range(10)))
        with pytest.raises(StoreUnavailable):
            await following
        async with asyncio.timeout(PATIENCE):
            while await other.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ):
                await asyncio.sleep(0.02)
