"""Finds the process that holds the write lock of a service's SQLite database. It changes nothing."""

from __future__ import annotations

import glob
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from tidings._support.holders import writer_elsewhere
from tidings.database.engine import connected, file_of
from tidings.database.notebook import Notebook
from tidings.database.presence import Process, present
from tidings.errors import DatabaseUnavailable, TidingsError
from tidings.settings import Settings
from tidings.stores import EventStore
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Holder", "find_holder", "naming_the_writer"]


class Holder(NamedTuple):
    """The process that holds the write lock of a service's database."""

    pid: int
    service: str
    """The service whose database it is."""
    ours: bool
    """Whether the process runs the service."""
    doing: str
    """What it holds the lock for, if that is known; "" if the process does not run the service."""

    def __str__(self) -> str:
        who = f"process {self.pid} on this machine"
        if self.ours:
            return f"{who}, which runs service {self.service!r}, holds the one writer that SQLite has{self.doing}"
        return (
            f"{who}, which is none of service {self.service!r} (ps -p {self.pid} shows what it is), holds the one "
            "writer that SQLite has"
        )


@asynccontextmanager
async def naming_the_writer(store: EventStore, settings: Settings, service: Declaration) -> AsyncIterator[None]:
    """Add to errors about a locked SQLite database, within the block, which process holds the lock, and what to do.

    Open the database within the block: while this process has it open, the system does not tell who holds the lock.
    Raises `DatabaseUnavailable`.
    """
    try:
        yield
    except DatabaseUnavailable as error:
        url = settings.database_of(service.name)
        file = file_of(url)
        if not file or not _is_locked(error):
            raise
        holder = await _holder(file, url, store, service)
        raise DatabaseUnavailable(f"database {redact(url)} is locked: {holder}") from error


def _is_locked(error: DatabaseUnavailable) -> bool:
    code = getattr(getattr(error.__cause__, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY


async def find_holder(file: str, url: str, store: EventStore, service: Declaration) -> Holder | None:
    """Return who holds the write lock now; None if nobody does, or if the system does not tell.

    This process must not have the database open.
    """
    pid = None
    with suppress(OSError):
        pid = writer_elsewhere(file)
    if not pid:
        return None
    process = await _process(url, service, pid)
    if process is None:
        return Holder(pid, service.name, ours=False, doing="")
    under_way = await _under_way(file, process, store, service)
    doing = f" while it runs {' and '.join(under_way)}" if under_way else " while a handler with a session runs"
    return Holder(pid, service.name, ours=True, doing=doing)


async def _holder(file: str, url: str, store: EventStore, service: Declaration) -> str:
    """Return who holds the write lock, and what to do so that the command succeeds."""
    holder = await find_holder(file, url, store, service)
    if holder is None:
        return (
            "another process holds the one writer that SQLite has, and the system does not say which. Nothing was "
            f"changed. Find it (lsof {file}) and stop it, give this command again, then start it again"
        )
    return (
        f"{holder}. Nothing was changed. Stop that process (kill {holder.pid}; if it does not end, kill -9 "
        f"{holder.pid}: what it has not committed is undone and done again), give this command again, then start the "
        "process again"
    )


async def _process(url: str, service: Declaration, pid: int) -> Process | None:
    """Return the service's process with this process id on this machine."""
    here = socket.gethostname()
    async with connected(url) as database:
        with suppress(DatabaseUnavailable):
            found = await present(database, service.name, time.time())
            return next((each for each in found if (each.pid, each.host) == (pid, here)), None)
    return None


async def _under_way(file: str, process: Process, store: EventStore, service: Declaration) -> list[str]:
    """Return the handlers with a session that the process is running, each with its event, from its notebooks."""
    found: list[str] = []
    for notebook in glob.glob(f"{glob.escape(file)}-begun-{process.process}-*"):
        for position in sorted(Notebook.read(notebook) or {}):
            with suppress(TidingsError):
                async for event in store.read_all(after=position - 1, limit=1):
                    names = [known.name for known in service.handlers_of(event.type) if known.transactional]
                    where = f"event {event.id} (position {position}) of stream {event.stream!r}"
                    found += [f"handler {name!r} at {where}" for name in names if event.position == position]
    return found
