"""Which process of a service works, on a bus that cannot say: one lock per service, beside or in its own database.

A bus within the process gives every process a queue of its own, so that two would do everything twice. The lock is one
that the operating system or the database server frees when its process dies, however it dies: a record lock on a file
beside an SQLite database, an advisory lock of a session in PostgreSQL. It is not what makes effects happen once (the
watermarks are): a process that loses it unawares is fenced at its next commit.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from typing import Any, Final, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from tidings._support.holders import lock_holder
from tidings.database.engine import Database
from tidings.database.outages import marked, outages
from tidings.errors import DatabaseUnavailable

__all__ = ["Post", "Taken", "post_of"]

log = structlog.get_logger("tidings.standby")

ANSWER_SECONDS: Final = 5.0
"""Seconds that PostgreSQL may take to answer the session that holds the lock."""
_KEEPALIVES: Final = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3"
"""PostgreSQL keeps the session, and so the lock, of a machine that vanished until its TCP notices."""


class Taken(Exception):
    """Another process holds the lock. `by` names it as well as this machine can."""

    def __init__(self, by: str) -> None:
        self.by = by
        super().__init__(by)


class _Lock(Protocol):
    async def take(self) -> None:
        """Raises `Taken`, `DatabaseUnavailable`."""

    async def check(self) -> None:
        """Raises `DatabaseUnavailable` when the lock is lost, or may be."""

    async def release(self) -> None: ...


class Post:
    """The one place at work of a service. Whoever runs the service in the process that has it shares it."""

    def __init__(self, place: tuple[str, str], lock: _Lock) -> None:
        self._place = place
        self._lock = lock
        self._here: _Here | None = None

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold the place while the block runs. Raises `Taken` at once when another process has it, and
        `DatabaseUnavailable`."""
        self._here = here = self._join()
        try:
            async with here.turn:
                if not here.taken:
                    await here.lock.take()
                    here.taken = True
            yield
        finally:
            here.members -= 1
            if not here.members:
                self._forget(here)
                await here.lock.release()

    def _join(self) -> _Here:
        here = _HERE.get(self._place)
        if here is None or here.process != os.getpid():
            here = _HERE[self._place] = _Here(self._lock)
        here.members += 1
        return here

    def _forget(self, here: _Here) -> None:
        if _HERE.get(self._place) is here:
            del _HERE[self._place]

    async def check(self) -> None:
        """Raises `DatabaseUnavailable` when the place is lost; only while it is held."""
        here = self._here
        assert here is not None, "the place is held"
        try:
            await here.lock.check()
        except DatabaseUnavailable:
            self._forget(here)  # who comes now takes it anew
            raise


class _Here:
    """What the members of one process share."""

    def __init__(self, lock: _Lock) -> None:
        self.lock = lock
        self.process = os.getpid()  # a forked child has none of its parent's record locks
        self.members = 0
        self.taken = False
        self.turn = asyncio.Lock()


_HERE: Final[dict[tuple[str, str], _Here]] = {}


def post_of(database: Database, service: str) -> Post | None:
    """The place at work of `service`; None for a database that no other process can open,
    and for one of a kind that no lock is known for, which the log says."""
    if database.file is not None:
        lock: _Lock = _FileLock(database.file, service)
        place = os.path.realpath(database.file)
    elif database.engine.dialect.name == "postgresql":
        lock = _SessionLock(database, service)
        url = database.engine.url
        place = f"{url.host}:{url.port}/{url.database}?{sorted(url.query.items())}"
    else:
        if not database.one_writer:
            log.warning(
                "service.unguarded",
                service=service,
                database=database.shown,
                advice="no lock is known for this kind of database: run one process of the service only",
            )
        return None
    return Post((place, service), lock)


class _FileLock:
    """A record lock (fcntl) on a file beside the database, which stays when it is free.

    Not flock: a child that was forked would keep that after its parent's death. Where SQLite's own locks work, also on
    NFS, this does.
    """

    def __init__(self, file: str, service: str) -> None:
        self._path = f"{os.path.realpath(file)}-{service}.lock"
        self._descriptor: int | None = None

    async def take(self) -> None:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there(descriptor):
                raise Taken("another process that has just replaced the lock's file")
        except BlockingIOError:
            # Of a remote machine (NFS) or another container, the id means nothing here.
            process = lock_holder(descriptor)
            os.close(descriptor)
            raise Taken(f"process {process}" if process else "another process") from None
        except PermissionError as error:  # what some systems call a lock that another process has
            os.close(descriptor)
            raise Taken("another process") from error
        except OSError as error:
            os.close(descriptor)
            raise self._unavailable(error) from error
        except Taken:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _is_there(self, descriptor: int) -> bool:
        """Does the path still lead to the file that is locked? One that was deleted keeps nobody out."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    async def check(self) -> None:
        if self._descriptor is None or not self._is_there(self._descriptor):
            raise DatabaseUnavailable(
                f"the lock {self._path} of the process at work was deleted or replaced: it is taken anew. Leave that "
                "file where it is while the service runs"
            )

    async def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _unavailable(self, error: OSError) -> DatabaseUnavailable:
        why = os.strerror(error.errno or 0)
        return DatabaseUnavailable(
            f"cannot lock {self._path}, which says which process of the service is at work: {why}. Its folder must be "
            "writable for this user, and on a file system with locks",
            waiting_helps=error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EMFILE),
        )


class _SessionLock:
    """An advisory lock of a PostgreSQL session that does nothing else: the server frees it when the session ends."""

    def __init__(self, database: Database, service: str) -> None:
        self._database = database
        self._service = service
        digest = sha256(f"tidings at work: {service}".encode()).digest()
        self._key = int.from_bytes(digest[:8], signed=True)
        self._engine: Any = None
        self._connection: AsyncConnection | None = None
        self._question: asyncio.Task[object] | None = None
        """Asked by whoever shares the lock, and never cancelled: the driver closes a session that is not waited for."""

    async def take(self) -> None:
        self._engine = create_async_engine(
            self._database.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True
        )
        sa.event.listen(self._engine.sync_engine, "handle_error", marked)
        try:
            with outages(self._database.shown):
                self._connection = connection = await self._asked(self._engine.connect().__aenter__())
                await self._asked(self._claim(connection))
        except BaseException:
            await self.release()
            raise

    async def _claim(self, connection: AsyncConnection) -> None:
        name = f"tidings {self._service} on {socket.gethostname()}, process {os.getpid()}"
        set_name = sa.select(sa.func.set_config("application_name", name[:63], False))
        await connection.execute(set_name)
        for statement in _KEEPALIVES.split("; "):
            with suppress(DBAPIError):  # a server that cannot set it keeps its own
                await connection.execute(sa.text(statement))
        if not await connection.scalar(sa.select(sa.func.pg_try_advisory_lock(self._key))):
            raise Taken(await self._holder(connection))

    async def _holder(self, connection: AsyncConnection) -> str:
        found = await connection.execute(
            sa.text(
                "SELECT a.pid, a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.granted "
                "AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.classid::bigint = :high "
                "AND l.objid::bigint = :low "
                "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ),
            {"high": (self._key >> 32) & 0xFFFFFFFF, "low": self._key & 0xFFFFFFFF},
        )
        row = found.first()
        if row is None:
            return "another process"
        named = str(row.application_name or "").partition(" on ")[2]
        return f"{named or 'another process'} (PostgreSQL session {row.pid})"

    async def _asked(self, asking: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asking
        except (TimeoutError, OSError, InternalError, InterfaceError, PendingRollbackError) as error:
            raise DatabaseUnavailable(
                f"database {self._database.shown} did not answer the session that says which process of service "
                f"{self._service!r} is at work: {type(error).__name__}: {error}. It is taken anew"
            ) from error

    async def check(self) -> None:
        connection = self._connection
        if connection is None:
            raise DatabaseUnavailable(f"service {self._service!r} has lost its place at work")
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(connection.execute(sa.select(1)), name="tidings-post-question")
        with outages(self._database.shown):
            await self._asked(asyncio.shield(self._question))

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        engine, self._engine = self._engine, None
        question, self._question = self._question, None
        if connection is not None:
            # Not `close`, which resets the session first: one that hangs must not hold up the end.
            with suppress(Exception):
                async with asyncio.timeout(1):
                    await connection.invalidate()
            with suppress(Exception):
                async with asyncio.timeout(1):
                    await connection.close()
        if question is not None:
            await asyncio.wait([question], timeout=1)
        if engine is not None:
            await engine.dispose()
