"""The connections to a service's own database: opening it, its transactions, and whether it takes writes.

It knows the SQL of no table but that of the version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tidings._support.ownership import mark
from tidings._support.private_files import make_private
from tidings._support.writes import Writes
from tidings.database.open_file import OpenFile
from tidings.database.outages import advice_for, is_contention, is_refusal, marked, outages, stays_with_connections
from tidings.database.tables import schema
from tidings.database.texts import learn_encoding
from tidings.database.transaction import watch
from tidings.database.upgrades import SCHEMA, prepare, version_of
from tidings.errors import ConfigurationError, DatabaseUnavailable, TidingsError
from tidings.urls import redact

__all__ = ["Database", "connected", "file_of", "open_database", "prepared"]

CONNECTIONS: Final = 15
"""Connections of a process to a database with more than one writer, at most. `?connections=` in its URL says another
number."""
FEWEST: Final = 3
"""Connections that a process needs: for handlers with a session, for everything else that it commits, and to read."""
SHARE: Final = 4
"""One of so many connections is for handlers with a session. The others stay free for commits, requests and health."""
_MADE_AT: Final = "tidings_made_at"
_ONE_MOMENT: Final = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
"""Without this, each statement of a transaction on PostgreSQL sees what was committed before that statement. On SQLite,
a transaction sees one moment in any case."""


class Database:
    """The engine of a service's own database, with its transactions."""

    def __init__(self, engine: AsyncEngine, shown: str) -> None:
        self.engine = engine
        self.shown = shown
        """The URL without its password."""
        file = engine.url.database if engine.dialect.name == "sqlite" else None
        self.file = None if file in (None, "", ":memory:") or file.startswith("file:") else file
        """The path of a SQLite file; None for a database on a server or in memory."""
        self._open_file = None if self.file is None else OpenFile(self.file)
        self.one_writer = engine.dialect.name == "sqlite"
        """Whether all transactions that write share one writer, as in SQLite."""
        self.width = 0 if self.one_writer else max(1, _connections_of(engine) // SHARE)
        self.writes = Writes()
        self.turn: AbstractAsyncContextManager[object] = asyncio.Lock() if self.one_writer else nullcontext()
        """To be held around transactions where there is one writer: a handler may have it for longer than SQLite lets
        others wait."""
        level = {"isolation_level": "IMMEDIATE"} if self.one_writer else {}
        self._writing = engine.execution_options(tidings_writing=True, **level)
        self._reading = engine.execution_options(**_ONE_MOMENT) if engine.dialect.name == "postgresql" else engine
        sa.event.listen(engine.sync_engine, "handle_error", marked)
        sa.event.listen(engine.sync_engine, "connect", self._learn)
        self._distrusted = 0.0
        """The time, by the monotonic clock, before which connections were made that are not used again."""
        if self.file is not None or not self.one_writer:  # a database in memory ends with its connection
            sa.event.listen(engine.sync_engine, "handle_error", self.distrust)
            sa.event.listen(engine.sync_engine, "connect", _note_time)
            sa.event.listen(engine.sync_engine, "checkout", self._check_age)
        if self._open_file is not None:
            sa.event.listen(engine.sync_engine, "connect", self._note_file)
        watch(self._writing.sync_engine)

    @property
    def width(self) -> int:
        """Transactions of handlers with a session that are under way at once, beside the one in which each bucket range
        commits everything else. 0: that one runs them too. Set it before a service joins."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        self._width = width
        self.room = asyncio.Semaphore(width)

    def _learn(self, connection: object, record: object) -> None:
        learn_encoding(self.engine.dialect, connection)

    def distrust(self, context: sa.engine.ExceptionContext) -> None:
        """Listen for errors after which none of the connections that exist is used again."""
        if context.sqlalchemy_exception is not None and stays_with_connections(context.sqlalchemy_exception):
            self._distrusted = time.monotonic()

    def _check_age(self, connection: object, record: sa.pool.ConnectionPoolEntry, proxy: object) -> None:
        if record.info.get(_MADE_AT, 0.0) <= self._distrusted:
            raise DisconnectionError("it was made before the outage")  # the pool makes another one instead

    def _check_file(self) -> None:
        """Raise `DatabaseMoved` when the database's file is not there any more."""
        if self._open_file is None:
            return
        pool = self.engine.pool
        if isinstance(pool, sa.QueuePool) and not pool.checkedin():
            self._open_file.check()  # the pool makes a connection, and that would make a new file where there is none
        else:
            self._open_file.look()

    def _note_file(self, connection: object, record: object) -> None:
        if self._open_file is not None:
            self._open_file.opened()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Enter a transaction that will write. Raises `DatabaseUnavailable`; then the outcome of its commit is unknown.

        Raises `DatabaseMoved`, at most a second late, when the database's file is not there any more.
        """
        try:
            with outages(self.shown):
                async with self._connected(self._writing) as connection, connection.begin():
                    yield connection
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, PoolTimeout) and not is_contention(error, self.engine.dialect):
                self.writes.failed(error)
            mark(error, self)
            raise
        self.writes.succeeded()

    async def probe_writes(self) -> None:
        """Write a row as it is, to let `writes` know whether the database accepts writes.

        While another transaction of this process writes, it does nothing: that one will tell.
        """
        if isinstance(self.turn, asyncio.Lock) and self.turn.locked():
            return
        with suppress(DatabaseUnavailable):
            async with self.turn, self.transaction() as connection:
                await connection.execute(schema.update().values(version=schema.c.version))

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Enter a transaction for reading only. All its statements see the database at one moment, that of the first:
        what moves from one table to another meanwhile is seen once. Raises as `transaction`."""
        try:
            with outages(self.shown):
                async with self._connected(self._reading) as connection:
                    yield connection
        except DatabaseUnavailable as error:
            mark(error, self)
            raise

    @asynccontextmanager
    async def _connected(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """Connect, and turn into `DatabaseUnavailable` what some drivers (asyncpg) raise while they connect: SQLAlchemy
        lets it pass."""
        self._check_file()
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(engine.connect())
            except (TidingsError, SQLAlchemyError, TypeError, ValueError):  # the last two: an option that never works
                raise
            except Exception as error:
                raise DatabaseUnavailable(
                    f"database {self.shown}: it lets nobody in: {type(error).__name__}: {error}{advice_for(error)}. "
                    "Nothing is lost: the service goes on where it was when the database answers again",
                    waiting_helps=not is_refusal(error),
                ) from error
            yield connection


def _note_time(connection: object, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info[_MADE_AT] = time.monotonic()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Database]:
    """Make the engine for a SQLAlchemy URL. It connects when it is used, and makes no tables.

    `sqlite:///path` runs on Tidings' own dialect. Raises `ConfigurationError` for a URL or driver that cannot work.
    """
    shown = redact(url)
    try:
        parsed = make_url(url)
        if parsed.drivername in ("sqlite", "sqlite+tidings"):
            import tidings.database.sqlite_dialect as sqlite_dialect

            parsed = parsed.set(drivername="sqlite+tidings")
        elif parsed.get_backend_name() == "sqlite":
            raise ArgumentError(
                f"of SQLite, Tidings uses its own driver: write sqlite:///, not {parsed.drivername}:///"
            )
        # A database in memory lives in one connection; it is shared, never dropped, by waiting for it.
        options: dict[str, Any] = {}
        if file_of(url) == "":
            options = {"pool_size": 1, "max_overflow": 0, "pool_recycle": -1}
        elif parsed.get_backend_name() != "sqlite":
            parsed, connections = _without_connections(parsed)
            options = {"pool_size": connections, "max_overflow": 0, "pool_use_lifo": True}
        # What a statement's parameters hold is the users' data: an error that is logged or kept says which statement.
        engine = create_async_engine(parsed, hide_parameters=True, **options)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, sa.exc.InvalidRequestError, ValueError) as error:
        raise ConfigurationError(
            f"TIDINGS_DATABASE {shown!r} cannot be used: {type(error).__name__}: {_first_line(error, url, shown)}. "
            "Give a SQLAlchemy URL with an async driver that is installed: sqlite:///file.db, postgresql+asyncpg://..."
        ) from None
    if parsed.drivername == "sqlite+tidings":
        sqlite_dialect.register(engine.sync_engine)
    try:
        yield Database(engine, shown)
    finally:
        await engine.dispose()


def _without_connections(url: URL) -> tuple[URL, int]:
    """Return the URL without its parameter `connections`, and what that says. Raises `ArgumentError`."""
    said = url.query.get("connections", str(CONNECTIONS))
    if not isinstance(said, str) or not said.isdecimal() or int(said) < FEWEST:
        raise ArgumentError(f"connections={said}: give a whole number from {FEWEST}, as in ?connections={CONNECTIONS}")
    return url.difference_update_query(["connections"]), int(said)


def _connections_of(engine: AsyncEngine) -> int:
    pool = engine.pool
    return pool.size() if isinstance(pool, sa.QueuePool) else CONNECTIONS


def file_of(url: str) -> str | None:
    """Return the file of a SQLite URL, "" for a database in memory, None for one on a server and for an invalid URL."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return None
    except (ArgumentError, ValueError):
        return None
    return "" if parsed.database in (None, "", ":memory:") else parsed.database


@asynccontextmanager
async def open_database(url: str, tables: sa.MetaData | None = None) -> AsyncIterator[Database]:
    """Open a database as `connected` does, and make the tables of Tidings and of the service where they are missing.

    A SQLite file that is made is its owner's alone. Raises `ConfigurationError` also for tables of a newer Tidings;
    `DatabaseUnavailable`.
    """
    if (path := file_of(url)) and not path.startswith("file:"):
        make_private(path)
    async with connected(url) as database:
        async with database.transaction() as connection:
            await prepare(connection, database.shown)
            if tables is not None:
                await connection.run_sync(tables.create_all)
        yield database


async def prepared(database: Database) -> bool:
    """Return whether a service has run on this database. It only reads.

    Raises `ConfigurationError` for tables of another version, `DatabaseUnavailable`.
    """
    async with database.reading() as connection:
        if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table(schema.name)):
            return False
        found = await version_of(connection)
    if found is not None and found != SCHEMA:
        remedy = "start the service, which upgrades it" if found < SCHEMA else "use the Tidings that made it"
        raise ConfigurationError(
            f"database {database.shown} has Tidings tables of version {found}, this Tidings looks at {SCHEMA}: {remedy}"
        )
    return found is not None


def _first_line(error: Exception, url: str, shown: str) -> str:
    if isinstance(error, ValueError):  # it quotes what it takes for the port, which may be a part of the password
        return "its port is no number"
    return str(error).replace(url, shown).partition("\n")[0]
