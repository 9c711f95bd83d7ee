"""The simulated service's own database: a real SQLite file, and for each process an engine that dies with it.

What was committed stays, what was not is rolled back when the process is killed, as the operating system would do it.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

from tidings.database.engine import Database, open_database
from tidings.testing.simulation.loop import Process, SimulatedLoop

__all__ = ["Databases", "Seat"]

_MEMORY: Final = Path("/dev/shm")
SLOW_STATEMENTS: Final = 0.02
"""Share of statements that take time, so that a process may stop in the middle of a transaction."""


class Seat:
    """One process's access to the database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.connections: list[sqlite3.Connection] = []

    def die(self) -> None:
        """Roll back what the process has not committed; nothing that it does from now on has an effect."""
        for connection in self.connections:
            with suppress(sqlite3.ProgrammingError):  # the pool has closed it already
                connection.rollback()
                connection.set_authorizer(_deny)

    async def close(self) -> None:
        """Close the engine, and let go of the process."""
        engine = self.database.engine.sync_engine
        # SQLAlchemy keeps what listens for errors with the dialect, which all engines here share.
        if sa.event.contains(engine, "handle_error", self.database.distrust):
            sa.event.remove(engine, "handle_error", self.database.distrust)
        await self.database.engine.dispose()
        for connection in self.connections:
            connection.close()


def _deny(*asked: object) -> int:
    return sqlite3.SQLITE_DENY


class Databases:
    """A folder, in memory if possible, with one file that is created anew for each world."""

    def __init__(self, tables: sa.MetaData) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tidings-simulation-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self._file = self._folder / "service.db"
        SimulatedLoop().run_until_complete(self._prepare(tables))  # type: ignore[abstract]
        self._template = self._file.read_bytes()

    async def _prepare(self, tables: sa.MetaData) -> None:
        async with open_database(f"sqlite:///{self._file}", tables) as database:
            self._made = database.engine.sync_engine
            async with database.engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def renew(self, contents: bytes | None = None) -> None:
        """Replace the database by an empty one with its tables, or by a copy."""
        for path in self._folder.iterdir():
            path.unlink()
        self._file.write_bytes(contents or self._template)

    def copy(self) -> bytes:
        """Return a copy of what is committed."""
        with closing(sqlite3.connect(self._file)) as connection:
            return connection.serialize()

    def seat(self, process: Process | None, *, slow_notes: float | None = None) -> Seat:
        """Open an engine for one process. All engines share what SQLAlchemy has compiled, which takes most of the time.

        With `slow_notes` it behaves like a server: it has no notebook, transactions of one process do not wait for each
        other, and noting which events have begun takes this many seconds.
        """
        engine = Engine(self._made.pool.recreate(), self._made.dialect, self._made.url)
        engine._compiled_cache = self._made._compiled_cache
        seat = Seat(Database(AsyncEngine(engine), "the simulated service's database"))

        if slow_notes is not None:
            seat.database.file, seat.database.turn = None, nullcontext()

        def connected(connection: Any, record: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")
            seat.connections.append(connection)

        def execute(connection: object, cursor: Any, statement: str, *rest: object) -> None:
            if process is None or process.gone:
                return
            if slow_notes and statement.startswith("INSERT INTO tidings_begun"):
                await_only(asyncio.sleep(slow_notes))
            process.spring("statement")
            if process.paused or process.dead or process.chance(SLOW_STATEMENTS):
                await_only(asyncio.sleep(process.seconds()))

        sa.event.listen(engine, "connect", connected)
        sa.event.listen(engine, "before_cursor_execute", execute)
        return seat
