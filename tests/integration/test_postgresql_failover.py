"""A database that takes no writes for a while: the service goes on by itself, with fresh connections.

What a pooled connection was told when it began (read-only, as a standby's are) stays with it, whatever becomes of the
server and of its name meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.integration.databases import database_url
from tests.integration.embedded import (
    QUICK,
    Happened,
    audit,
    auditing,
    embedded,
    letters,
    rows,
    settings_for,
    tables,
    until,
)
from tidings import Service
from tidings.database.engine import connected
from tidings.errors import DatabaseUnavailable
from tidings.operations.status import look

FIRST, SECOND = [Happened(key=f"k{n}", n=n) for n in range(5)], [Happened(key=f"k{n}", n=9) for n in range(5)]

WAYS = {
    "database": "ALTER DATABASE {name} SET default_transaction_read_only = {to}",
    "role": "ALTER ROLE CURRENT_USER IN DATABASE {name} SET default_transaction_read_only = {to}",
}


@asynccontextmanager
async def administrator(url: str) -> AsyncIterator[AsyncEngine]:
    """A connection to another database of the server."""
    engine = create_async_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        yield engine
    finally:
        await engine.dispose()


async def do(engine: AsyncEngine, statement: str) -> None:
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)


@pytest.mark.usefixtures("on_postgresql")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["session", "engine"])
async def test_a_service_writes_again_when_its_database_does(tmp_path: Path, way: str, kind: str) -> None:
    service = auditing() if kind == "session" else Service("audit", tables=tables)
    if kind == "engine":

        @service.on(Happened, retry=QUICK)
        async def handle(event: Happened) -> None:
            async with service.engine.begin() as connection:
                await connection.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world, administrator(database_url(tmp_path, "audit")) as admin:
        name = make_url(database_url(tmp_path, "audit")).database
        await world.append(*FIRST)
        await world.settled()
        await do(admin, WAYS[way].format(name=name, to="on"))
        await do(admin, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        await world.append(*SECOND)

        async def read_only() -> bool:
            """The pool is full of connections that will never accept writes."""
            try:
                async with world.running[0].database.transaction() as connection:
                    await connection.execute(sa.insert(audit).values(key="never", n=0))
            except DatabaseUnavailable as error:
                return "it takes no writes" in str(error)
            return False

        await until(read_only)
        await asyncio.sleep(1)  # the service meets it, too, again and again
        await do(admin, WAYS[way].format(name=name, to="off"))
        await world.settled(30)
        done = await rows(service)
        assert sorted(done) == sorted((event.key, event.n) for event in [*FIRST, *SECOND])
        assert await letters(service) == []


@pytest.mark.usefixtures("on_postgresql")
async def test_status_names_a_database_that_takes_no_writes_while_a_process_is_seen(tmp_path: Path) -> None:
    service = auditing()
    settings = settings_for(tmp_path)
    async with embedded(tmp_path, service) as world, administrator(database_url(tmp_path, "audit")) as admin:
        name = make_url(database_url(tmp_path, "audit")).database
        await world.append(*FIRST)
        await world.settled()

        async def problems() -> list[str]:
            state = await look(settings, world.store, world.bus, {"shop:audit": service})
            assert state.services[0].processes
            return state.problems

        assert await problems() == []
        await do(admin, WAYS["database"].format(name=name, to="on"))
        (problem,) = await problems()
        assert problem.startswith("audit: its database takes no writes: ")
        assert "read-only transaction" in problem
        assert "pg_is_in_recovery" in problem
        await do(admin, WAYS["database"].format(name=name, to="off"))
        assert await problems() == []


@pytest.mark.usefixtures("on_postgresql")
async def test_a_deadlock_costs_no_connection(tmp_path: Path) -> None:
    async with connected(database_url(tmp_path, "audit")) as database:

        async def served_by() -> object:
            async with database.transaction() as connection:
                return await connection.scalar(sa.text("SELECT pg_backend_pid()"))

        before = await served_by()
        for state in ("40P01", "40001", "55P03"):
            with pytest.raises(DatabaseUnavailable):
                async with database.transaction() as connection:
                    await connection.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$")
        assert await served_by() == before
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction() as connection:
                await connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '25006'; END $$")
        assert await served_by() not in (None, before)


@pytest.mark.sqlite("a connection that was opened while the file could not be written stays so")
async def test_a_connection_that_cannot_write_is_replaced(tmp_path: Path) -> None:
    async with connected(f"sqlite:///{tmp_path}/audit.db") as database:
        async with database.transaction() as connection:
            await connection.execute(sa.schema.CreateTable(audit))
        async with database.reading() as connection:
            await connection.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(DatabaseUnavailable, match="readonly"):
            async with database.transaction() as connection:
                await connection.execute(sa.insert(audit).values(key="lost", n=2))
        async with database.transaction() as connection:
            await connection.execute(sa.insert(audit).values(key="new", n=3))
            assert list(await connection.scalars(sa.select(audit.c.key))) == ["new"]
