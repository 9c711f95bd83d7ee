"""A service's own database: its engine, and Tidings' tables in it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import UTC, datetime
from functools import partial
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tidings._support.ownership import mark
from tidings._support.writes import Writes
from tidings.database.outages import advice_for, is_refusal, marked, outages, stays_with_connections
from tidings.database.texts import Text, learn_encoding
from tidings.errors import ConfigurationError, DatabaseUnavailable, TransactionMisuse
from tidings.modelling.context import ATTEMPT
from tidings.urls import redact

__all__ = [
    "Database",
    "begun",
    "connected",
    "dead",
    "file_of",
    "floors",
    "guarded",
    "handlers",
    "held",
    "metadata",
    "open_database",
    "partials",
    "partitions",
    "prepared",
    "processes",
    "replays",
    "skips",
    "spans",
    "staged",
    "watermarks",
]

SCHEMA: Final = 8
"""Version of the tables below."""
_MAKING_TABLES: Final = 0x74696469
"""Key of PostgreSQL's advisory lock."""

_UPGRADES: Final = {
    1: (
        ("tidings_dead", "partition_key", "TEXT"),
        ("tidings_dead", "holds_key", "BOOLEAN DEFAULT false NOT NULL"),
    ),
    2: (
        ("tidings_floors", "active", "VARCHAR(36)"),
        ("tidings_floors", "asked", "VARCHAR(36)"),
        ("tidings_watermarks", "replays", "INTEGER DEFAULT 0 NOT NULL"),
        ("tidings_held", "replayed", "BOOLEAN DEFAULT false NOT NULL"),
        ("tidings_dead", "replayed", "BOOLEAN DEFAULT false NOT NULL"),
    ),
    3: (
        ("tidings_held", "since", "DOUBLE PRECISION"),
        ("tidings_held", "code", "VARCHAR(32)"),
    ),
    4: (("tidings_staged", "aliases", "TEXT DEFAULT '' NOT NULL"),),
    5: (("tidings_floors", "handlers", "TEXT"),),
    6: (("tidings_staged", "requested", "BOOLEAN DEFAULT false NOT NULL"),),
    7: (
        ("tidings_held", "line", "TEXT DEFAULT '' NOT NULL"),
        ("tidings_dead", "line", "TEXT DEFAULT '' NOT NULL"),
    ),
}
"""Columns that each older version lacks; tables that are missing are made whole before."""

_FORMER_INDEXES: Final = (
    "tidings_held_by_key",
    "tidings_held_by_due",
    "tidings_held_failed",
    "tidings_held_keys",
    "tidings_dead_holding",
    "tidings_held_lines",
    "tidings_dead_lines",
)

metadata = sa.MetaData()


class _Moment(sa.TypeDecorator[datetime]):
    """SQLite forgets that it was given UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


_NAME = sa.String(100)
_LOG = sa.String(36)

watermarks = sa.Table(
    "tidings_watermarks",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("replays", sa.Integer, nullable=False, server_default="0", comment="how often it was sent back"),
    comment="Per bucket: position of the last event whose effects are committed",
)

replays = sa.Table(
    "tidings_replay",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("upto", sa.BigInteger, nullable=False),
    comment="Per bucket: how far it had been settled when a replay sent it back; no replay lowers it",
)

floors = sa.Table(
    "tidings_floors",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("first_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("last_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("active", sa.String(36), comment="process at work on the range; null after a clean end"),
    sa.Column("asked", sa.String(36), comment="process that asks the one at work to give the range up"),
    sa.Column("handlers", Text, comment="JSON: each handler that its events are given to, and after which position"),
    comment="Per bucket range: everything up to here is settled",
)

partials = sa.Table(
    "tidings_partial",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("again", sa.Boolean, nullable=False, server_default=sa.false(), comment="a replay has it run again"),
    comment="Handlers that are done with an event which waits for others; gone when the watermark has passed it",
)

handlers = sa.Table(
    "tidings_handlers",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("since", sa.BigInteger, nullable=False, comment="it is given events after this position"),
    sa.Column("seen_at", _Moment, nullable=False, comment="when it was first at work"),
    comment="Handlers that have been at work in a service",
)

spans = sa.Table(
    "tidings_spans",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("kind", sa.String(10), primary_key=True, comment="behind, past or skipped"),
    sa.Column("done", sa.BigInteger, nullable=False, comment="its first event is above this position"),
    sa.Column("upto", sa.BigInteger, nullable=False, comment="its last position; -1 for kind behind, which has none"),
    comment="What a handler that was added late, or was away, is still given on its own, or was not given",
)

begun = sa.Table(
    "tidings_begun",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
    comment="Events that are being handled, noted only after an unclean end",
)

processes = sa.Table(
    "tidings_processes",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("process", sa.String(36), primary_key=True),
    sa.Column("host", Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", Text, nullable=False, comment="of the package that the handlers are in"),
    sa.Column("code", sa.String(32), nullable=False, comment="fingerprint of the handlers"),
    sa.Column("started", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column("seen", sa.Double, nullable=False, comment="seconds since 1970"),
    comment="Processes of the service, for operators to look at",
)

skips = sa.Table(
    "tidings_skips",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    comment="Events that an operator wants dead without being run, until the service comes to them",
)

partitions = sa.Table(
    "tidings_partitions",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, comment="rises by one with each resizing"),
    sa.Column("rebound", sa.Integer, nullable=False, comment="epoch whose queues were made"),
    sa.Column("former", sa.Integer, nullable=False, comment="largest count that there was"),
    comment="Into how many partitions a service is divided; without a row, into one that was never resized",
)

_event_columns = (
    ("event_id", sa.String(36)),
    ("stream", Text),
    ("type", Text),
    ("data", sa.LargeBinary),
    ("metadata", sa.LargeBinary),
    ("is_json", sa.Boolean),
)

staged = sa.Table(
    "tidings_staged",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("service", _NAME, nullable=False),
    sa.Column("log", _LOG, nullable=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column(
        "cause",
        sa.BigInteger,
        nullable=False,
        comment="position of the event whose handler emitted this; of a request, one below it",
    ),
    *(sa.Column(name, kind, nullable=False) for name, kind in _event_columns),
    sa.Column("aliases", Text, nullable=False, server_default="", comment="ids under former names of the handler"),
    sa.Column("requested", sa.Boolean, nullable=False, server_default=sa.false(), comment="emitted by a request"),
    sa.UniqueConstraint("service", "log", "event_id"),
    comment="Events that handlers and requests emitted, until they are appended to the store",
)

sa.Index(
    "tidings_staged_requested",
    *(staged.c.service, staged.c.log, staged.c.id),
    sqlite_where=sa.text("requested = 1"),
    postgresql_where=staged.c.requested,
)

held = sa.Table(
    "tidings_held",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("partition_key", Text, key="key", nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("ticks", sa.BigInteger, nullable=False),
    *(sa.Column(name, kind, nullable=False) for name, kind in _event_columns),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("attempts", sa.Integer, nullable=False, comment="all of them; 0 for one that waits behind another"),
    sa.Column("tries", sa.Integer, nullable=False, comment="attempts since it was held"),
    sa.Column("due", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column("reason", Text, nullable=False, comment="one line: error type and message, or whom it waits for"),
    sa.Column("detail", Text, comment="traceback of the last attempt"),
    sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false(), comment="it failed in a replay"),
    sa.Column("since", sa.Double, comment="when it was held first, seconds since 1970"),
    sa.Column("code", sa.String(32), comment="fingerprint of the handler's code that failed"),
    sa.Column("line", Text, nullable=False, server_default="", comment="of the handler; others do not wait for it"),
    sa.Index("tidings_held_order", "service", "log", "key", "line", "position", "bucket", "attempts"),
    comment="Events that failed for now, and later events of their keys; they run again when they are due",
)

_failed: Final = held.c.attempts > sa.literal_column("0")
# Without those that wait behind another: they are due as soon as it is gone, and may be many. What comes after `due`
# lets them be counted by handler without a look at the rows.
sa.Index(
    "tidings_held_tried",
    *(
        held.c.service,
        held.c.log,
        held.c.due,
        held.c.handler,
        held.c.since,
        held.c.attempts,
        held.c.bucket,
        held.c.code,
    ),
    sqlite_where=_failed,
    postgresql_where=_failed,
)

dead = sa.Table(
    "tidings_dead",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("service", _NAME, nullable=False, index=True),
    sa.Column("log", _LOG, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False, comment="handler, message or staged"),
    sa.Column("position", sa.BigInteger, comment="of the event; of the cause for kind staged; null for kind message"),
    sa.Column("bucket", sa.Integer),
    sa.Column("version", sa.BigInteger),
    sa.Column("ticks", sa.BigInteger),
    *(sa.Column(name, kind) for name, kind in _event_columns),
    sa.Column("handler", Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("reason", Text, nullable=False, comment="one line: error type and message"),
    sa.Column("detail", Text, comment="traceback, or the headers of a message that could not be read"),
    sa.Column("died_at", _Moment, nullable=False),
    sa.Column("partition_key", Text, key="key"),
    sa.Column("holds_key", sa.Boolean, nullable=False, server_default=sa.false(), comment="later events wait for it"),
    sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false(), comment="it failed in a replay"),
    sa.Column("line", Text, nullable=False, server_default="", comment="of the handler; others do not wait for it"),
    comment="Events and messages that this service gave up, whole, with the reason",
    sqlite_autoincrement=True,  # an id from an older listing must never name another letter
)

sa.Index(
    "tidings_dead_order",
    *(dead.c.service, dead.c.log, dead.c.key, dead.c.line, dead.c.position, dead.c.bucket),
    sqlite_where=sa.text("holds_key = 1"),
    postgresql_where=dead.c.holds_key,
)

_schema = sa.Table("tidings_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))


class Database:
    """An engine and what to know about it."""

    def __init__(self, engine: AsyncEngine, shown: str) -> None:
        self.engine = engine
        self.shown = shown
        """The URL without its password."""
        file = engine.url.database if engine.dialect.name == "sqlite" else None
        self.file = None if file in (None, "", ":memory:") or file.startswith("file:") else file
        """Where it is a file of this machine."""
        self.one_writer = engine.dialect.name == "sqlite"
        """All transactions that write share one writer; elsewhere every lane may have its own."""
        self.writes = Writes()
        self.turn: AbstractAsyncContextManager[object] = asyncio.Lock() if self.one_writer else nullcontext()
        """Around the transactions of dispatchers: a handler may hold the one writer for longer than those that wait
        for it would bear."""
        level = {"isolation_level": "IMMEDIATE"} if self.one_writer else {}
        self._writing = engine.execution_options(tidings_writing=True, **level)
        sa.event.listen(engine.sync_engine, "handle_error", marked)
        sa.event.listen(engine.sync_engine, "connect", self._learn)
        self._distrusted = 0.0
        """Connections that were made before this moment (of the monotonic clock) are not used again."""
        if self.file is not None or not self.one_writer:  # a database in memory ends with its connection
            sa.event.listen(engine.sync_engine, "handle_error", self._distrust)
            sa.event.listen(engine.sync_engine, "connect", _note_time)
            sa.event.listen(engine.sync_engine, "checkout", self._check_age)
        writing = self._writing.sync_engine
        sa.event.listen(writing, "before_cursor_execute", _refuse_statement)
        sa.event.listen(writing, "commit", partial(_refuse, "commit"))
        sa.event.listen(writing, "rollback", partial(_refuse, "rollback"))

    def _learn(self, connection: object, record: object) -> None:
        learn_encoding(self.engine.dialect, connection)

    def _distrust(self, context: sa.engine.ExceptionContext) -> None:
        if context.sqlalchemy_exception is not None and stays_with_connections(context.sqlalchemy_exception):
            self._distrusted = time.monotonic()

    def _check_age(self, connection: object, record: sa.pool.ConnectionPoolEntry, proxy: object) -> None:
        if record.info.get(_MADE_AT, 0.0) <= self._distrusted:
            raise DisconnectionError("it was made before the outage")  # the pool makes another one instead

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that will write. Raises `DatabaseUnavailable`; then the outcome of its commit is unknown."""
        try:
            with outages(self.shown):
                async with self._connected(self._writing) as connection, connection.begin():
                    yield connection
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, PoolTimeout):
                self.writes.failed(error)
            mark(error, self)
            raise
        self.writes.succeeded()

    async def probe_writes(self) -> None:
        """Write a row as it is: `writes` knows then whether the database takes it. It waits for nobody's turn: while
        another transaction writes, there is nothing to find out."""
        if isinstance(self.turn, asyncio.Lock) and self.turn.locked():
            return
        with suppress(DatabaseUnavailable):
            async with self.turn, self.transaction() as connection:
                await connection.execute(_schema.update().values(version=_schema.c.version))

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading only."""
        try:
            with outages(self.shown):
                async with self._connected(self.engine) as connection:
                    yield connection
        except DatabaseUnavailable as error:
            mark(error, self)
            raise

    @asynccontextmanager
    async def _connected(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """SQLAlchemy lets pass what some drivers (asyncpg) raise while they connect."""
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(engine.connect())
            except (SQLAlchemyError, TypeError, ValueError):  # the last two: an option that can never work
                raise
            except Exception as error:
                raise DatabaseUnavailable(
                    f"database {self.shown}: it lets nobody in: {type(error).__name__}: {error}{advice_for(error)}. "
                    "Nothing is lost: the service goes on where it was when the database answers again",
                    waiting_helps=not is_refusal(error),
                ) from error
            yield connection


_MADE_AT: Final = "tidings_made_at"
_GUARDED: Final = "tidings_guarded"
_ENDS_TRANSACTION: Final = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
    r"(BEGIN|START\s+TRANSACTION|COMMIT|END|ABORT|ROLLBACK(?!\s+(?:TRANSACTION\s+|WORK\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)


def _note_time(connection: object, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info[_MADE_AT] = time.monotonic()


@contextmanager
def guarded(connection: AsyncConnection) -> Iterator[None]:
    """Within the block, what would end the transaction raises `TransactionMisuse` before it reaches the database."""
    info = connection.sync_connection.info if connection.sync_connection is not None else {}
    info[_GUARDED] = True
    try:
        yield
    finally:
        del info[_GUARDED]


def _refuse(operation: str, connection: sa.Connection) -> None:
    # One that was lost has no info, and ending it is for the best.
    if not connection.invalidated and _GUARDED in connection.info:
        raise TransactionMisuse(operation)


def _refuse_statement(
    connection: sa.Connection, cursor: object, statement: str, parameters: object, context: object, many: bool
) -> None:
    if (attempt := ATTEMPT.get()) is not None:
        attempt.check_statement(connection)
    found = _ENDS_TRANSACTION.match(statement)
    if found is not None and _GUARDED in connection.info:
        raise TransactionMisuse(found[1].lower())


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Database]:
    """The engine for any SQLAlchemy URL; it connects on use, and makes nothing.

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
        options = {"pool_size": 1, "max_overflow": 0, "pool_recycle": -1} if file_of(url) == "" else {}
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


def file_of(url: str) -> str | None:
    """The file of an SQLite URL, "" for a database in memory; None for a server's, and for what is no URL."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return None
    except (ArgumentError, ValueError):
        return None
    return "" if parsed.database in (None, "", ":memory:") else parsed.database


@asynccontextmanager
async def open_database(url: str, tables: sa.MetaData | None = None) -> AsyncIterator[Database]:
    """As `connected`, with Tidings' and the service's tables made where they are missing.

    Raises `ConfigurationError` also for tables of a newer Tidings; `DatabaseUnavailable`.
    """
    async with connected(url) as database:
        await _prepare(database, tables)
        yield database


async def _prepare(database: Database, tables: sa.MetaData | None) -> None:
    async with database.transaction() as connection:
        if database.engine.dialect.name == "postgresql":  # of processes that start at once, one makes the tables
            # Whatever the database's default is: who has waited must see what was made meanwhile.
            await connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MAKING_TABLES)))
        await connection.run_sync(metadata.create_all)
        found = await _version(connection)
        if found is not None and found > SCHEMA:
            raise ConfigurationError(
                f"database {database.shown} has Tidings tables of version {found}, this Tidings knows {SCHEMA}: "
                "upgrade it"
            )
        for version in range(found or SCHEMA, SCHEMA):
            for table, column, kind in _UPGRADES[version]:
                if column not in await connection.run_sync(_columns, table):
                    await connection.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN {column} {kind}"))
        if found is not None and found < SCHEMA:
            await connection.run_sync(_key_by_handler)
        await connection.run_sync(_index)
        # Written even where nothing changes: a database that cannot be written says so now.
        write = _schema.insert() if found is None else _schema.update()
        await connection.execute(write.values(version=SCHEMA))
        if tables is not None:
            await connection.run_sync(tables.create_all)


def _index(connection: sa.Connection) -> None:
    """Tables that were made by an older version lack indexes, and keep some that nobody uses."""
    for table in (held, dead, staged):
        for index in table.indexes:
            index.create(connection, checkfirst=True)
    for name in _FORMER_INDEXES:
        connection.execute(sa.text(f"DROP INDEX IF EXISTS {name}"))


def _key_by_handler(connection: sa.Connection) -> None:
    """Held events of older versions have one row for each position: add the handler to the primary key."""
    key = sa.inspect(connection).get_pk_constraint(held.name)
    if "handler" in key["constrained_columns"]:
        return
    if connection.dialect.name != "sqlite":
        connection.execute(
            sa.text(
                f"ALTER TABLE {held.name} DROP CONSTRAINT {key['name']}, "
                "ADD PRIMARY KEY (service, log, position, handler)"
            )
        )
        return
    # SQLite cannot change a primary key: the table is made anew.
    for index in sa.inspect(connection).get_indexes(held.name):
        connection.execute(sa.text(f"DROP INDEX {index['name']}"))
    connection.execute(sa.text(f"ALTER TABLE {held.name} RENAME TO {held.name}_former"))
    held.create(connection)
    former = sa.table(f"{held.name}_former", *(sa.column(column.name) for column in held.columns))
    connection.execute(held.insert().from_select(list(held.columns.keys()), sa.select(*former.columns)))
    connection.execute(sa.text(f"DROP TABLE {held.name}_former"))


def _columns(connection: sa.Connection, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(connection).get_columns(table)}


async def prepared(database: Database) -> bool:
    """Whether a service has run on this database. It only reads.

    Raises `ConfigurationError` for tables of another version, `DatabaseUnavailable`.
    """
    async with database.reading() as connection:
        if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table(_schema.name)):
            return False
        found = await _version(connection)
    if found is not None and found != SCHEMA:
        remedy = "start the service, which upgrades it" if found < SCHEMA else "use the Tidings that made it"
        raise ConfigurationError(
            f"database {database.shown} has Tidings tables of version {found}, this Tidings looks at {SCHEMA}: {remedy}"
        )
    return found is not None


async def _version(connection: AsyncConnection) -> int | None:
    version: int | None = await connection.scalar(sa.select(sa.func.max(_schema.c.version)))
    return version


def _first_line(error: Exception, url: str, shown: str) -> str:
    if isinstance(error, ValueError):  # it quotes what it takes for the port, which may be a part of the password
        return "its port is no number"
    return str(error).replace(url, shown).partition("\n")[0]
