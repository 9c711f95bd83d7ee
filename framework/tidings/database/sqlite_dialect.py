"""SQLite for services: SQLAlchemy's async interface over sqlite3 in the event loop, waiting only where SQLite waits.

A statement on a local file takes microseconds, less than a hop to a thread and back. What can take long does not block
the loop: the wait for another writer is an asyncio sleep, and the commit, which flushes to disk, runs in a thread.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.base import SQLiteExecutionContext
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool
from sqlalchemy.util import await_only

from tidings._support.backoff import Backoff

__all__ = ["BUSY_TIMEOUT", "TidingsSQLite", "register"]

BUSY_TIMEOUT: Final = 5.0
"""Seconds that a transaction waits for the writer of another process before the database counts as locked."""
BUSY_PAUSES: Final = (0.001, 0.05)
"""First and longest pause, in seconds, between attempts while another process writes."""


_COMMITTERS: Final = ThreadPoolExecutor(8, thread_name_prefix="tidings-commit")
"""The threads for commits. Handlers may fill the loop's default executor with calls that block."""


class _Nothing:
    """Something to await for each statement: SQLAlchemy insists that an async driver awaits, and this is cheapest."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_NOTHING: Final = _Nothing()


class _Cursor(sqlite3.Cursor):
    """A cursor that reads rows from the file as they are asked for."""

    async def _async_soft_close(self) -> None:
        """Called by SQLAlchemy's async results (2.1) on every cursor of an async driver."""


class _Connection(sqlite3.Connection):
    """A connection that knows how its next transaction begins."""

    begin = "BEGIN"

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)


class _ExecutionContext(SQLiteExecutionContext):
    def create_server_side_cursor(self) -> Any:
        return self._dbapi_connection.cursor()


class TidingsSQLite(SQLiteDialect_pysqlite):
    """`sqlite+tidings://`; isolation level IMMEDIATE begins as the writer: no later statement finds it taken."""

    driver = "tidings"
    is_async = True
    supports_statement_cache = True
    supports_server_side_cursors = True
    """Rows are read as they are asked for, always."""
    execution_ctx_cls = _ExecutionContext

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool

    in_memory = False
    """The database lives in its connection."""

    def create_connect_args(self, url: URL) -> Any:
        self.in_memory = not self._is_url_file_db(url)
        arguments, options = super().create_connect_args(url)
        options.update(isolation_level=None, check_same_thread=False, timeout=0, factory=_Connection)
        return arguments, options

    def get_isolation_level_values(self, dbapi_connection: Any) -> Any:
        return ("DEFERRED", "IMMEDIATE")

    def get_default_isolation_level(self, dbapi_connection: Any) -> Any:
        return "DEFERRED"

    def get_isolation_level(self, dbapi_connection: Any) -> Any:
        return "IMMEDIATE" if dbapi_connection.begin.endswith("IMMEDIATE") else "DEFERRED"

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        dbapi_connection.begin = "BEGIN IMMEDIATE" if level == "IMMEDIATE" else "BEGIN"

    def do_begin(self, dbapi_connection: Any) -> None:
        _patiently(dbapi_connection.execute, dbapi_connection.begin)

    def do_commit(self, dbapi_connection: Any) -> None:
        if not dbapi_connection.in_transaction:
            return
        if self.in_memory:  # nothing is flushed; and a wait that is cancelled would end the connection, and all with it
            dbapi_connection.commit()
        else:
            await_only(_commit(dbapi_connection))

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        _patiently(cursor.execute, statement, parameters)

    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        _patiently(cursor.execute, statement)

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        _patiently(cursor.executemany, statement, parameters)

    # SQLAlchemy compiles these three anew each time, which takes longer than all the rest of a small handler.

    def do_savepoint(self, connection: Connection, name: str) -> None:
        connection.exec_driver_sql(f"SAVEPOINT {name}")

    def do_rollback_to_savepoint(self, connection: Connection, name: str) -> None:
        connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {name}")

    def do_release_savepoint(self, connection: Connection, name: str) -> None:
        connection.exec_driver_sql(f"RELEASE SAVEPOINT {name}")


async def _commit(connection: sqlite3.Connection) -> None:
    """Commit in a thread, and wait for the end even when cancelled: nothing may use the connection meanwhile."""
    work = asyncio.get_running_loop().run_in_executor(_COMMITTERS, connection.commit)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError as error:
            cancelled = error
    failed = work.exception()
    if cancelled is not None:
        raise cancelled from failed
    if failed is not None:
        raise failed


def _patiently(call: Callable[..., Any], *arguments: Any) -> None:
    """Call, waiting while another process writes. A snapshot that is out of date stays so: that is not waited for."""
    loop, deadline, backoff = None, 0.0, None
    while True:
        try:
            call(*arguments)
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode
            loop = loop or asyncio.get_running_loop()
            deadline = deadline or loop.time() + BUSY_TIMEOUT
            if code & 0xFF != sqlite3.SQLITE_BUSY or code == sqlite3.SQLITE_BUSY_SNAPSHOT or loop.time() >= deadline:
                raise
        else:
            await_only(_NOTHING)
            return
        backoff = backoff or Backoff(*BUSY_PAUSES)
        await_only(backoff.wait())


def configure(dbapi_connection: Any, record: object) -> None:
    """WAL lets readers go on beside the writer; FULL makes a commit survive power loss."""
    dbapi_connection.execute("PRAGMA busy_timeout = 5000")
    dbapi_connection.execute("PRAGMA journal_mode = WAL")
    dbapi_connection.execute("PRAGMA synchronous = FULL")
    dbapi_connection.execute("PRAGMA foreign_keys = ON")
    dbapi_connection.execute("PRAGMA busy_timeout = 0")


def register(engine: Any) -> None:
    """Set up the connections of a sync engine on this dialect."""
    event.listen(engine, "connect", configure)


registry.register("sqlite.tidings", __name__, TidingsSQLite.__name__)
