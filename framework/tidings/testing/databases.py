"""A PostgreSQL for tests: named by a variable, installed, or in Docker, in this order. It ends and drops only its own.

`postgresql_for_tests()` looks for `TIDINGS_TEST_POSTGRESQL` (a URL whose user may create databases), an installed
PostgreSQL (started by `deploy/local/postgresql`, the script that users run, which the wheel has, too), and Docker
(through testcontainers, where an engine answers). Without any of them, tests are skipped with the reason; with
`CI=true` they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

from sqlalchemy.engine import make_url

from tidings.testing.local import LocalServer, docker_answers, missing, script_of

__all__ = [
    "PostgreSQL",
    "PostgreSQLServer",
    "create_database",
    "drop_databases",
    "postgresql_for_tests",
    "server_for_tests",
]

_REMEDY: Final = (
    "no PostgreSQL for tests: install one (apt-get install postgresql), start Docker and install testcontainers, "
    "or set TIDINGS_TEST_POSTGRESQL=postgresql+asyncpg://user:password@host/database to one whose user "
    "may create databases"
)
_SAFE_IN_A_TEST: Final = {"fsync": "off", "full_page_writes": "off", "max_connections": "200", "shared_buffers": "16MB"}
"""Settings that make a server fast and unsafe against a loss of power. A test that kills its server uses others."""


class PostgreSQL(Protocol):
    """A server that tests share."""

    def isolated(self) -> AbstractAsyncContextManager[str]:
        """Yield the URL of a database without tables, for one test. Afterwards it is dropped, together with every
        database whose name begins with its name."""
        ...


class PostgreSQLServer(LocalServer):
    """A server on this machine, started by `deploy/local/postgresql` (about 2 s). `settings` are lines for
    postgresql.conf; `url` names a database that stays empty."""

    product = "postgresql"
    at_the_end = ()  # if it were killed, it would leave its shared memory behind

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        """See `PostgreSQL.isolated`. If an earlier test left the server stopped or paused, start it again."""
        self.mend()
        async with _isolated(self.url) as url:
            try:
                yield url
            finally:
                self.mend()


class _Named:
    """A server that is not ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def isolated(self) -> AbstractAsyncContextManager[str]:
        return _isolated(self._url)


async def create_database(server: str, name: str) -> None:
    """Create a database on the server of this URL, unless it exists."""
    import asyncpg  # here, because only the extra `postgresql` installs it

    async with _connected(server) as connection:
        # It exists, or another process creates it at this moment.
        with suppress(asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
            await connection.execute(f'CREATE DATABASE "{name}"')


async def drop_databases(server: str, prefix: str) -> None:
    """Drop the databases whose names begin with `prefix`, even if somebody is connected to them."""
    async with _connected(server) as connection:
        for row in await connection.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", prefix):
            await connection.execute(f'DROP DATABASE IF EXISTS "{row[0]}" WITH (FORCE)')


@asynccontextmanager
async def _isolated(server: str) -> AsyncIterator[str]:
    name = f"tidings_{uuid4().hex[:12]}"
    await create_database(server, name)
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        await drop_databases(server, name)


@asynccontextmanager
async def _connected(server: str) -> AsyncIterator[Any]:
    import asyncpg

    url = make_url(server).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def _installed() -> bool:
    if script_of("postgresql") is None:
        return False
    return shutil.which("postgres") is not None or any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def _container() -> Any:
    """Start a container. Return None without testcontainers or a Docker engine that answers."""
    try:
        from testcontainers.postgres import PostgresContainer
    except ImportError:
        return None
    return PostgresContainer("postgres:16", driver="asyncpg").start() if docker_answers() else None


@contextmanager
def postgresql_for_tests() -> Iterator[PostgreSQL]:
    """Yield the server that a test session shares. Without one, tests that ask for it are skipped (in CI: fail)."""
    if named := os.environ.get("TIDINGS_TEST_POSTGRESQL"):
        yield _Named(named)
    elif _installed():
        with PostgreSQLServer(_SAFE_IN_A_TEST) as server:
            yield server
    elif (container := _container()) is not None:
        try:
            yield _Named(container.get_connection_url())
        finally:
            container.stop()
    else:
        missing(_REMEDY)


@contextmanager
def server_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[PostgreSQLServer]:
    """Yield a server that a test may harm. Skips (in CI: fails) if none can be started."""
    if not _installed():
        missing("no PostgreSQL is installed, so none can be killed: apt-get install postgresql")
    with PostgreSQLServer(settings) as server:
        yield server
