"""After a reconnect, the PostgreSQL store goes on only with the log that it knew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.integration.postgresql_log import connected, database_of
from tests.unit.command_line import invoke
from tidings import open_store
from tidings.errors import StoreUnavailable
from tidings.stores import EventStore
from tidings.testing.store_conformance import caught_up, closing, events, many, numbers, read, take


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[EventStore]:
    async with open_store(postgresql_url) as store:
        for n in range(4):
            await store.append("s", events(n))
        yield store


END_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def refuses(text: str, *uses: Callable[[], Awaitable[object]]) -> None:
    for use in uses:
        with pytest.raises(StoreUnavailable, match=text) as refusal:
            await use()
        assert not refusal.value.waiting_helps


async def test_a_log_that_lost_its_end_takes_no_appends_and_nobody_goes_on_behind_it(
    postgresql_url: str, store: EventStore
) -> None:
    """As after a failover to a standby that had not received everything."""
    async with (
        open_store(postgresql_url) as relay,
        connected(postgresql_url) as other,
        closing(relay.subscribe_all()) as source,
    ):
        await take(source, caught_up)
        following = asyncio.ensure_future(take(source, many(1)))
        await other.execute(
            "BEGIN; CREATE TABLE kept AS SELECT * FROM tidings_log.events WHERE position > 3; "
            "DELETE FROM tidings_log.events WHERE position > 3; COMMIT"
        )
        await other.execute(END_CONNECTIONS)
        await refuses(
            "lost its end: it reaches position 3, and reached 5",
            lambda: store.append("s", events(9)),
            lambda: read(store, "s"),
            lambda: following,
            lambda: relay.append("t", events(9)),
        )
        await other.execute("INSERT INTO tidings_log.events SELECT * FROM kept")
        assert await store.append("s", events(4)) == (4, 6)
        async with closing(relay.subscribe_all(after=5)) as again:
            assert numbers(await take(again, many(1))) == [4]


async def test_a_subscription_ends_where_the_log_is_shorter_than_it_was(postgresql_url: str, store: EventStore) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("DELETE FROM tidings_log.events WHERE position > 3")
    async with closing(store.subscribe_all()) as source, closing(store.subscribe_stream("s")) as of_stream:
        await refuses("lost its end", lambda: take(source, many(3)), lambda: take(of_stream, many(3)))


async def test_a_database_that_was_replaced_by_an_empty_one_gets_no_log_by_itself(
    postgresql_url: str, store: EventStore
) -> None:
    name = database_of(postgresql_url)
    async with connected(postgresql_url, database="postgres") as other:
        await other.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await other.execute(f"CREATE DATABASE {name}")
    uses = (lambda: store.append("s", events(9)), lambda: read(store, "s"))
    await refuses("not whole", *uses)
    async with connected(postgresql_url) as other:
        assert not await other.fetchval("SELECT count(*) FROM pg_namespace WHERE nspname = 'tidings_log'")
    async with open_store(postgresql_url) as made:
        await made.append("s", events(0))
        await refuses(f"holds the log {await made.log_id()}, and held the log", *uses)
        assert await read(made, "s") == [(0, 0)]


async def test_a_log_that_got_a_new_identity_is_another_one_for_who_ran_on(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_STORE", postgresql_url)
    assert (await asyncio.to_thread(invoke, "log", "renew-identity", "--yes")).code == 0
    async with connected(postgresql_url) as other:
        await other.execute(END_CONNECTIONS)
    await refuses("got a new identity", lambda: store.append("s", events(9)))
    async with open_store(postgresql_url) as again:
        assert (await again.append("s", events(9))).version == 4


@pytest.mark.parametrize(("version", "said"), [(99, "version 99"), (0, "an older schema")])
async def test_another_schema_is_named_after_a_reconnect(
    postgresql_url: str, store: EventStore, version: int, said: str
) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("UPDATE tidings_log.about SET schema_version = $1", version)
        await other.execute(END_CONNECTIONS)
    await refuses(said, lambda: store.append("s", events(9)))
