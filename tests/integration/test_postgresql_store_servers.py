"""The PostgreSQL store finds a server that it can use, and keeps its promises whatever that server is set to."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

import tidings.stores.postgresql.connections as connections
import tidings.stores.postgresql.writer as writer
from tests.integration.postgresql_log import connected, database_of, plain
from tidings import open_store
from tidings.errors import ConfigurationError, StoreUnavailable
from tidings.stores import EVERYTHING, OCTETS, EventData, EventStore
from tidings.stores.postgresql.log import head, page_of_all
from tidings.stores.postgresql.schema import key_of
from tidings.stores.rules import MAX_VERSION
from tidings.testing.databases import server_for_tests
from tidings.testing.store_conformance import PATIENCE, events, read

PAGE = Path(__file__).parents[2] / "docs" / "postgresql-store.md"
SHADOWS = (
    # Each suits its arguments better than PostgreSQL's own, or comes before it.
    "CREATE FUNCTION public.cardinality(uuid[]) RETURNS integer LANGUAGE sql AS 'SELECT 0'",
    "CREATE AGGREGATE public.max(bigint) (sfunc = int8smaller, stype = bigint)",
    "CREATE FUNCTION public.octet_length(bytea) RETURNS integer LANGUAGE sql AS 'SELECT 0'",
)


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[EventStore]:
    async with open_store(postgresql_url) as store:
        yield store


class Silent:
    """A host that accepts connections and says nothing."""

    address = ""
    accepted = 0


@asynccontextmanager
async def silent() -> AsyncIterator[Silent]:
    host, writers = Silent(), []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host.accepted += 1
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield host
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


def with_hosts(url: str, hosts: str) -> str:
    """The URL with other hosts; OWN in them is its own."""
    parsed = make_url(plain(url, host="OWN", port="1"))
    own = f"{make_url(url).host}:{make_url(url).port or 5432}"
    return parsed.render_as_string(hide_password=False).replace("OWN:1", hosts.replace("OWN", own))


# ---- names


async def test_functions_of_others_are_not_taken_for_postgresqls_own(postgresql_url: str) -> None:
    async with connected(postgresql_url) as other:
        await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} SET search_path = public, pg_catalog")
        for shadow in SHADOWS:
            await other.execute(shadow)
        async with open_store(postgresql_url) as store:
            assert await store.append("s", events(0, 1)) == (1, 3)
            assert await store.append("s", events(2), expected=1) == (2, 4)
            assert await store.head() == 4
            assert await read(store, "s") == [(0, 0), (1, 1), (2, 2)]
            # The functions on their own, as somebody with psql calls them.
            await other.execute("SET search_path = public, pg_catalog")
            assert await other.fetchval("SELECT max(position) FROM tidings_log.events") == 1, "shadowed here"
            await other.execute(
                "SELECT tidings_log.append('{}', '{}', '{}', '{}', $1, $2, '{0}', $2, '{t}', $1, $2, $2)",
                [key_of("x")],
                [b"x"],
            )
            assert await store.head() == 5
            assert await other.fetchval("SELECT tidings_log.accept_place()")
            assert (await store.append("s", events(3))).version == 3


# ---- hosts


async def test_the_primary_is_found_behind_a_host_that_is_silent(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with silent() as host, asyncio.timeout(PATIENCE):
        monkeypatch.setattr(connections, "CONNECT_SECONDS", 1.0)
        for hosts in (f"{host.address},OWN", f"127.0.0.1:1,{host.address},OWN"):
            while True:
                try:
                    async with open_store(with_hosts(postgresql_url, hosts)) as store:
                        await store.append("s", events(0))
                        break
                except StoreUnavailable:
                    continue  # a machine under load may need more than its part of the second


async def test_the_host_that_took_writes_last_is_asked_first(postgresql_url: str) -> None:
    server = connections.Server(with_hosts(postgresql_url, "127.0.0.1:1,127.0.0.1:2,OWN"))
    assert "127.0.0.1:1/" in server._hosts[0].dsn
    for _ in range(2):
        connections.discard(await server.connect())
        assert [f"127.0.0.1:{port}/" in host.dsn for port, host in zip((1, 2), server._hosts[1:], strict=True)] == [
            True,
            True,
        ]


async def test_where_no_host_can_be_used_each_is_named_with_its_reason(postgresql_url: str) -> None:
    async with connected(postgresql_url) as other:
        await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} SET default_transaction_read_only = on")
    with pytest.raises(StoreUnavailable) as refusal:
        async with open_store(with_hosts(postgresql_url, "127.0.0.1:1,OWN")):
            pass
    assert refusal.value.waiting_helps
    said = str(refusal.value)
    for part in ("127.0.0.1:1/", "server runs", "takes no writes"):
        assert part in said
    assert str(make_url(postgresql_url).password) not in said
    url = with_hosts(plain(postgresql_url, password="wrong-secret"), "OWN,OWN")
    with pytest.raises(StoreUnavailable, match=r"password in TIDINGS_STORE.*password in TIDINGS_STORE") as refusal:
        async with open_store(url):
            pass
    assert not refusal.value.waiting_helps
    assert "wrong-secret" not in str(refusal.value)


async def test_a_connect_that_is_cancelled_at_any_moment_leaves_nothing_behind(postgresql_url: str) -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    server = connections.Server(postgresql_url)
    for turns in range(40):
        connecting = asyncio.create_task(server.connect())
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        with suppress(asyncio.CancelledError):
            connections.discard(await connecting)
    await server.close()
    gc.collect()
    assert complaints == []
    async with connected(postgresql_url) as other, asyncio.timeout(PATIENCE):
        while await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ):
            await asyncio.sleep(0.01)


# ---- durability


@pytest.fixture
def own_server_url() -> Iterator[str]:
    """A server whose settings nobody else's test sees."""
    with server_for_tests() as server:
        yield server.url


async def test_what_is_acknowledged_stays_durable_when_the_default_is_changed(own_server_url: str) -> None:
    async with open_store(own_server_url) as store, connected(own_server_url) as other:
        await store.append("s", events(0))
        writing = store._writer._connection  # type: ignore[attr-defined]
        for setting in ("synchronous_commit = off", "log_min_duration_statement = 12345"):
            await other.execute(f"ALTER SYSTEM SET {setting}")
        await other.execute("SELECT pg_reload_conf()")
        async with asyncio.timeout(PATIENCE):
            while await writing.fetchval("SHOW log_min_duration_statement") != "12345ms":
                await asyncio.sleep(0.01)
        assert await writing.fetchval("SHOW synchronous_commit") == "on"
        async with connected(own_server_url) as third:
            assert await third.fetchval("SHOW synchronous_commit") == "off"
        assert (await store.append("s", events(1))).version == 1


# ---- silence


async def test_reads_that_wait_are_told_with_the_one_that_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.3)
    async with silent() as host:
        server = connections.Server(f"postgresql://me:secret@{host.address}/db?connections=2")
        outcomes = await asyncio.gather(*(server.read(head) for _ in range(20)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 20
        assert host.accepted <= 2, "none of them has tried again what two had just found out"
        await server.close()


async def test_a_read_that_waits_for_silent_ones_is_told_as_soon_as_they_are(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: connections.Connection) -> int:
        begun.set()
        await go_on.wait()
        return await head(connection)

    async with open_store(postgresql_url):
        server = connections.Server(f"{plain(postgresql_url)}?connections=1")
        reading = asyncio.create_task(server.read(slow))
        await begun.wait()
        with monkeypatch.context() as shortened:
            shortened.setattr(connections, "ANSWER_SECONDS", 0.2)
            with pytest.raises(StoreUnavailable, match="none of the reads before"):
                async with asyncio.timeout(PATIENCE):
                    await server.read(head)
        go_on.set()
        assert await reading == 1
        assert await server.read(head) == 1, "its place is free again"
        await server.close()


async def test_appends_that_wait_are_told_with_the_group_that_cannot_connect(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, groups = writer.Writer._again, 0

    async def counted(*arguments: Any) -> Any:
        nonlocal groups
        groups += 1
        return await again(*arguments)

    monkeypatch.setattr(writer.Writer, "_again", counted)
    monkeypatch.setattr(writer, "GROUP_WRITES", 4)
    name = database_of(postgresql_url)
    await store.append("s", events(0))
    async with connected(postgresql_url, database="postgres") as other:
        await other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        with monkeypatch.context() as shortened:
            shortened.setattr(writer, "AGAIN_SECONDS", 0.2)
            groups = 0
            appends = (store.append("s", events(n)) for n in range(20))
            outcomes = await asyncio.gather(*appends, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 20
        assert groups == 1
        await other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert (await store.append("s", events(1))).version == 1
    assert await read(store, "s") == [(0, 0), (1, 1)]


# ---- a restore that has not ended


async def test_a_log_without_events_is_at_its_end_and_takes_none(postgresql_url: str, store: EventStore) -> None:
    async with connected(postgresql_url) as other:
        await other.execute("TRUNCATE tidings_log.events")
        assert await page_of_all(other, -1, MAX_VERSION, False, EVERYTHING, 10) == ([], -1, True)
        assert await page_of_all(other, -1, MAX_VERSION, True, EVERYTHING, 10) == ([], 1, True)
    with pytest.raises(StoreUnavailable, match=r"without the first event.* restored") as refusal:
        await store.append("s", events(0))
    assert refusal.value.waiting_helps


async def test_a_log_whose_restore_has_not_ended_is_waited_for(postgresql_url: str) -> None:
    async with open_store(postgresql_url):
        pass
    async with connected(postgresql_url) as other:
        await other.execute("DELETE FROM tidings_log.about")
    with pytest.raises(StoreUnavailable, match="being restored") as refusal:
        async with open_store(postgresql_url):
            pass
    assert refusal.value.waiting_helps


# ---- rights


@pytest.fixture
async def app(postgresql_url: str) -> AsyncIterator[str]:
    """A user who may connect, and nothing else."""
    user = f"{database_of(postgresql_url)}_app"
    async with connected(postgresql_url) as other:
        await other.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'")
        yield user
        await other.execute(f"DROP OWNED BY {user}; DROP ROLE {user}")


@pytest.mark.parametrize(
    "made",
    [
        "CREATE SCHEMA tidings_log AUTHORIZATION {app}",
        "CREATE SCHEMA tidings_log; GRANT USAGE, CREATE ON SCHEMA tidings_log TO {app}",
    ],
    ids=["owned", "granted"],
)
async def test_an_empty_schema_that_was_made_for_it_is_taken(postgresql_url: str, app: str, made: str) -> None:
    as_app = plain(postgresql_url, username=app, password="x")
    async with connected(postgresql_url) as other:
        await other.execute(made.format(app=app))
        async with open_store(as_app) as store, open_store(as_app) as again:
            assert (await store.append("s", events(0))).version == 0
            assert (await again.append("s", events(1))).version == 1


async def test_a_schema_that_must_not_be_filled_is_left_alone(postgresql_url: str, app: str) -> None:
    as_app = plain(postgresql_url, username=app, password="x")
    async with connected(postgresql_url) as other:
        await other.execute(f"CREATE SCHEMA tidings_log; GRANT USAGE ON SCHEMA tidings_log TO {app}")
        with pytest.raises(StoreUnavailable, match="GRANT USAGE, CREATE ON SCHEMA") as refusal:
            async with open_store(as_app):
                pass
        assert not refusal.value.waiting_helps
        await other.execute("CREATE FUNCTION tidings_log.theirs() RETURNS integer LANGUAGE sql AS 'SELECT 0'")
        with pytest.raises(ConfigurationError, match="Rename it"):
            async with open_store(postgresql_url):
                pass


async def test_the_rights_that_are_documented_suffice(postgresql_url: str, app: str) -> None:
    as_app = plain(postgresql_url, username=app, password="x")
    grants = re.search(r"(GRANT USAGE ON SCHEMA.*?)```", PAGE.read_text(), re.DOTALL)
    assert grants is not None
    async with connected(postgresql_url) as other:
        await other.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        async with open_store(postgresql_url):
            pass
        await other.execute(
            f"GRANT USAGE ON SCHEMA tidings_log TO {app}; GRANT ALL ON ALL TABLES IN SCHEMA tidings_log TO {app}"
        )
        with pytest.raises(StoreUnavailable, match="GRANT EXECUTE ON ALL FUNCTIONS"):
            async with open_store(as_app):
                pass
        await other.execute(grants[1].replace("TO app;", f"TO {app};"))
        async with open_store(as_app) as store:
            assert (await store.append("s", events(0))).version == 0


# ---- what the page says


async def test_the_query_on_the_page_shows_events_of_any_kind(postgresql_url: str, store: EventStore) -> None:
    query = re.search(r"SELECT position.*?LIMIT 20", PAGE.read_text(), re.DOTALL)
    assert query is not None
    await store.append("nul\0 ✓", [EventData("T\0", b"\xff\x00", content_type=OCTETS)])
    await store.append("s", [EventData("T", b'{"name": "value"}')])
    async with connected(postgresql_url) as other:
        rows = await other.fetch(query[0])
    assert [row["position"] for row in rows] == [3, 2, 1]
    assert (rows[0]["stream"], rows[0]["type"], rows[0]["data"]) == ("s", "T", '{"name": "value"}')


@pytest.mark.parametrize(
    "option",
    [
        "prepared_statement_cache_size=0",
        "command_timeout=60",
        "connect_timeout=3",
        "keepalives_idle=30",
        "gssencmode=prefer",
        "channel_binding=disable",
        "client_encoding=LATIN1",
        "application_name=shop",
    ],
)
async def test_options_of_libpq_and_of_sqlalchemy_may_be_in_the_url(postgresql_url: str, option: str) -> None:
    async with open_store(f"{postgresql_url}?{option}") as store:
        assert (await store.append("s", events(0))).version == 0


async def test_an_option_that_the_server_does_not_know_is_named(postgresql_url: str) -> None:
    with pytest.raises(StoreUnavailable, match=r'"nonsense".*An option in TIDINGS_STORE') as refusal:
        async with open_store(f"{postgresql_url}?nonsense=1"):
            pass
    assert not refusal.value.waiting_helps
