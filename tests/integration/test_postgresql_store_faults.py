"""The PostgreSQL store's bad days: each is a typed error that says what to do, and nothing is lost or written twice."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import tidings.stores.postgresql.watcher as watcher
from tests.integration.postgresql_log import another, connected, database_of, locked, plain
from tests.unit.command_line import invoke
from tidings import open_store
from tidings.errors import ConfigurationError, StoreUnavailable
from tidings.stores import EventStore
from tidings.stores.postgresql.connections import Server
from tidings.stores.postgresql.troubles import is_lost
from tidings.testing.store_conformance import PATIENCE, caught_up, closing, event, events, many, numbers, read, take

Ended = Callable[[], Awaitable[None]]


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[EventStore]:
    async with open_store(postgresql_url) as store:
        yield store


async def end_connections(url: str) -> None:
    """Have the server end every connection to the database but one."""
    async with connected(url) as other:
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


# ---- connections that are lost


@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "waiting"])
async def test_connections_that_the_server_ended_are_made_again(
    postgresql_url: str, store: EventStore, waiting: bool
) -> None:
    await store.append("s", events(0))
    async with closing(store.subscribe_all()) as source:
        await take(source, caught_up)
        if waiting:
            async with locked(postgresql_url):
                appending = asyncio.ensure_future(store.append("s", events(1)))
                async with connected(postgresql_url) as other, asyncio.timeout(PATIENCE):
                    while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                        await asyncio.sleep(0.01)
                    await other.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted "
                        "AND relation = 'tidings_log.writer'::regclass"
                    )
        else:
            await end_connections(postgresql_url)
            appending = asyncio.ensure_future(store.append("s", events(1)))
        assert (await appending).version == 1
        assert await read(store, "s") == [(0, 0), (1, 1)]
        assert numbers(await take(source, many(1))) == [1]


async def test_a_read_on_connections_that_died_silently_is_tried_once_on_a_new_one(postgresql_url: str) -> None:
    server, used = Server(postgresql_url), list[Any]()

    async def silent(connection: Any) -> int:
        dead = not used or connection is used[0]
        used.append(connection)
        if dead:
            raise TimeoutError
        return 1

    async def apart(connection: Any) -> None:
        together.add(connection)
        async with asyncio.timeout(PATIENCE):
            while len(together) < 3:
                await asyncio.sleep(0.01)

    together = set[Any]()
    await asyncio.gather(*(server.read(apart) for _ in range(3)))
    assert await server.read(silent) == 1
    assert len(used) == 2
    assert used[1] not in together
    await server.close()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), True),
        (asyncpg.AdminShutdownError("terminating connection due to administrator command"), True),
        (asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction"), True),
        (asyncpg.DataError("invalid input for query argument"), False),
        (asyncpg.LockNotAvailableError("canceling statement due to lock timeout"), False),
        (asyncpg.DiskFullError("could not extend file"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_after_these_errors_another_connection_may_help(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost


async def test_a_subscription_says_when_the_server_is_gone(
    postgresql_url: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "AGAIN_SECONDS", 0.2)
    async with closing(store.subscribe_all()) as source:
        await take(source, caught_up)
        waiting = asyncio.ensure_future(take(source, many(1)))
        async with connected(postgresql_url, database="postgres") as other:
            await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} ALLOW_CONNECTIONS false")
            await other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                database_of(postgresql_url),
            )
            with pytest.raises(StoreUnavailable, match="not currently accepting connections"):
                await waiting
            await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} ALLOW_CONNECTIONS true")
    await store.append("s", events(1))
    async with closing(store.subscribe_stream("s")) as again:
        assert numbers(await take(again, many(1))) == [1]


# ---- others


async def test_somebody_elses_transaction_is_named_and_nothing_is_written(
    postgresql_url: str, store: EventStore
) -> None:
    await store.append("s", events(0))
    async with locked(postgresql_url):
        with pytest.raises(StoreUnavailable, match=r"lock timeout: process \d+ .* holds the log.*pg_terminate") as held:
            await store.append("s", events(1))
        assert held.value.waiting_helps
        assert await read(store, "s") == [(0, 0)], "reading needs no lock"
    assert (await store.append("s", events(2))).version == 1
    assert await read(store, "s") == [(0, 0), (1, 2)]


async def test_who_keeps_the_writers_from_the_table_is_named_not_a_writer(
    postgresql_url: str, store: EventStore
) -> None:
    """Here with SHARE, as CREATE INDEX does: the writer that holds the log waits for it, and so do all others."""
    await store.append("s", events(0))
    async with connected(postgresql_url) as culprit, connected(postgresql_url) as writing:
        async with culprit.transaction():
            await culprit.execute("LOCK TABLE tidings_log.events IN SHARE MODE")
            with pytest.raises(StoreUnavailable) as alone:
                await store.append("s", events(1))
            await writing.execute("BEGIN; LOCK TABLE tidings_log.writer IN EXCLUSIVE MODE")
            waiting = asyncio.ensure_future(writing.execute("LOCK TABLE tidings_log.events IN ROW EXCLUSIVE MODE"))
            with pytest.raises(StoreUnavailable) as behind:
                await store.append("s", events(2))
        await waiting
        for refusal in (alone, behind):
            assert re.findall(r"process (\d+)", str(refusal.value)) == [str(culprit.get_server_pid())]


async def test_who_holds_a_log_of_another_database_is_not_named(postgresql_url: str, store: EventStore) -> None:
    """A database made from another one has tables of the same number."""
    await store.close()
    async with (
        another(postgresql_url, f"TEMPLATE {database_of(postgresql_url)}") as url,
        locked(postgresql_url),
        connected(url) as culprit,
        open_store(url) as copied,
    ):
        await culprit.execute("SELECT tidings_log.accept_place()")
        async with culprit.transaction():
            await culprit.execute("LOCK TABLE tidings_log.writer IN EXCLUSIVE MODE")
            with pytest.raises(StoreUnavailable) as refusal:
                await copied.append("s", events(1))
        assert re.findall(r"process (\d+)", str(refusal.value)) == [str(culprit.get_server_pid())]


async def test_a_statement_timeout_that_is_too_short_is_named(postgresql_url: str) -> None:
    async with open_store(postgresql_url):
        pass
    async with connected(postgresql_url) as other:
        await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} SET statement_timeout = '1s'")
    async with open_store(postgresql_url) as store:
        async with locked(postgresql_url):
            with pytest.raises(StoreUnavailable, match="statement_timeout"):
                await store.append("s", events(1))
        assert (await store.append("s", events(2))).version == 0


@pytest.mark.parametrize("synchronous", ["off", "local"])
async def test_what_is_acknowledged_is_durable_whatever_the_default(postgresql_url: str, synchronous: str) -> None:
    async with connected(postgresql_url) as other:
        await other.execute(f"ALTER DATABASE {database_of(postgresql_url)} SET synchronous_commit = '{synchronous}'")
        async with open_store(postgresql_url) as store:
            found = await store._writer._connection.fetchval("SHOW synchronous_commit")  # type: ignore[attr-defined]
    assert found == {"off": "on", "local": "local"}[synchronous]


async def test_a_database_that_becomes_read_only_is_named_and_found_again(
    postgresql_url: str, store: EventStore
) -> None:
    """As a standby is, and a primary that was demoted."""
    name = database_of(postgresql_url)
    await store.append("s", events(0))
    async with connected(postgresql_url, database="postgres") as other:
        await other.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await end_connections(postgresql_url)
        with pytest.raises(StoreUnavailable, match="it is a standby"):
            async with open_store(postgresql_url):
                pass
        appending = asyncio.ensure_future(store.append("s", events(1)))
        with pytest.raises(StoreUnavailable, match="standby"):
            await read(store, "s")
        await other.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        assert (await appending).version == 1
    assert await read(store, "s") == [(0, 0), (1, 1)]


# ---- a log that was restored


@pytest.mark.parametrize("how", ["template", "pg_dump"])
async def test_a_restored_log_demands_a_new_identity(
    postgresql_url: str, store: EventStore, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append("s", events(0))
    identity = await store.log_id()
    await store.close()
    options = f"TEMPLATE {database_of(postgresql_url)}" if how == "template" else ""
    async with another(postgresql_url, options) as url:
        if how == "pg_dump":
            await asyncio.to_thread(dump_and_restore, plain(postgresql_url), url, tmp_path / "dump.sql")
        async with open_store(url) as restored, open_store(url) as beside:
            assert await read(restored, "s") == [(0, 0)], "what is there can be read"
            with pytest.raises(StoreUnavailable, match="renew-identity") as refusal:
                await restored.append("s", events(1))
            assert not refusal.value.waiting_helps
            monkeypatch.setenv("TIDINGS_STORE", url)
            assert (await asyncio.to_thread(invoke, "log", "renew-identity", "--yes")).code == 0
            assert await restored.log_id() != identity
            for each in (restored, beside):
                await each.append("s", events(1))
        async with open_store(url) as again:
            await again.append("s", events(2))
            assert [n for _, n in await read(again, "s")] == [0, 1, 1, 2]


async def test_a_log_that_was_moved_goes_on_when_that_is_said(postgresql_url: str, store: EventStore) -> None:
    identity = await store.log_id()
    await store.close()
    async with another(postgresql_url, f"TEMPLATE {database_of(postgresql_url)}") as url, open_store(url) as moved:
        with pytest.raises(StoreUnavailable, match="accept_place"):
            await moved.append("s", events(1))
        async with connected(url) as other:
            await other.execute("SELECT tidings_log.accept_place()")
        assert (await moved.append("s", events(1))).version == 0
        assert await moved.log_id() == identity


def dump_and_restore(old: str, new: str, file: Path) -> None:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    for command in (["pg_dump", "--file", str(file), old], ["psql", "--quiet", "--file", str(file), new]):
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)


# ---- what somebody must mend


async def opens(url: str) -> None:
    async with open_store(url):
        pass


async def test_a_wrong_password_database_or_address_is_named(postgresql_url: str) -> None:
    for url, remedy, waits in [
        (plain(postgresql_url, password="wrong-secret"), "password in TIDINGS_STORE", False),
        (plain(postgresql_url, database="not_there"), "createdb", False),
        ("postgresql://me:wrong-secret@127.0.0.1:1/db", "server runs", True),
    ]:
        with pytest.raises(StoreUnavailable, match=remedy) as refusal:
            await opens(url)
        assert refusal.value.waiting_helps is waits
        assert "wrong-secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("postgresql://host", "names no database"),
        ("postgresql://host/", "names no database"),
        ("postgresql://host/db?connections=0", "connections="),
        ("postgresql://host/db?connections=x", "connections="),
        ("postgresql://host:x/db", "cannot be used"),
        ("postgresql://host/db?sslmode=nonsense", "cannot be used"),
        ("postgresql://host/db?target_session_attrs=nonsense", "cannot be used"),
    ],
)
async def test_a_url_that_can_never_work_is_refused(url: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        await opens(url)


async def test_all_forms_of_a_url_open_the_same_log(postgresql_url: str, store: EventStore) -> None:
    url = plain(postgresql_url)
    rest = url.removeprefix("postgresql")
    for form in (url, f"postgres{rest}", f"postgresql+asyncpg{rest}?connections=2", f"postgresql{rest}?ssl=prefer"):
        async with open_store(form) as again:
            assert await again.log_id() == await store.log_id()
            assert len(await asyncio.gather(*(read(again, "tidings_log", limit=0) for _ in range(9)))) == 9


async def test_a_user_who_may_not_make_the_schema_is_told_what_to_grant(postgresql_url: str) -> None:
    user = f"{database_of(postgresql_url)}_reader"
    async with connected(postgresql_url) as other:
        await other.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'")
        try:
            as_reader = plain(postgresql_url, username=user, password="x")
            with pytest.raises(StoreUnavailable, match="GRANT CREATE ON DATABASE") as refusal:
                await opens(as_reader)
            assert not refusal.value.waiting_helps
            await opens(postgresql_url)
            await other.execute(
                f"GRANT USAGE ON SCHEMA tidings_log TO {user}; GRANT ALL ON ALL TABLES IN SCHEMA tidings_log TO {user}"
            )
            async with open_store(as_reader) as store:
                assert (await store.append("s", [event()])).version == 0
        finally:
            await other.execute(f"DROP OWNED BY {user}; DROP ROLE {user}")


async def test_a_schema_that_was_dropped_is_named(postgresql_url: str, store: EventStore) -> None:
    await store.append("s", events(0))
    async with connected(postgresql_url) as other:
        await other.execute("DROP SCHEMA tidings_log CASCADE")
    for use in (lambda: store.append("s", events(1)), lambda: read(store, "s")):
        with pytest.raises(StoreUnavailable, match="not whole") as refusal:
            await use()
        assert not refusal.value.waiting_helps
