"""Who holds the one writer of a service's SQLite database, for a command that could not write. It changes nothing."""

from __future__ import annotations

import glob
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

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

__all__ = ["naming_the_writer"]


@asynccontextmanager
async def naming_the_writer(store: EventStore, settings: Settings, service: Declaration) -> AsyncIterator[None]:
    """Within the block, a SQLite database that is locked is said with the process that holds it, and what to do.

    Open the database within the block: while this process has it open, nobody can be asked who holds it.
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


async def _holder(file: str, url: str, store: EventStore, service: Declaration) -> str:
    """Return who holds the writer, and the steps to the command's success."""
    pid = None
    with suppress(OSError):
        pid = writer_elsewhere(file)
    if not pid:
        return (
            "another process holds the one writer that SQLite has, and the system does not say which. Nothing was "
            f"changed. Find it (lsof {file}) and stop it, give this command again, then start it again"
        )
    who, doing = f"process {pid} on this machine", ""
    process = await _process(url, service, pid)
    if process is None:
        who += f", which is none of service {service.name!r} (ps -p {pid} shows what it is),"
    else:
        under_way = await _under_way(file, process, store, service)
        doing = f" while it runs {' and '.join(under_way)}" if under_way else " while a handler with a session runs"
        who += f", which runs service {service.name!r},"
    return (
        f"{who} holds the one writer that SQLite has{doing}. Nothing was changed. Stop that process (kill {pid}; if it "
        f"does not end, kill -9 {pid}: what it has not committed is undone and done again), give this command again, "
        "then start the process again"
    )


async def _process(url: str, service: Declaration, pid: int) -> Process | None:
    """Return the process of the service that has this id on this machine."""
    here = socket.gethostname()
    async with connected(url) as database:
        with suppress(DatabaseUnavailable):
            found = await present(database, service.name, time.time())
            return next((each for each in found if (each.pid, each.host) == (pid, here)), None)
    return None


async def _under_way(file: str, process: Process, store: EventStore, service: Declaration) -> list[str]:
    """Return handlers with a session that the process runs, each with its event, as far as its notebooks tell."""
    found: list[str] = []
    for notebook in glob.glob(f"{glob.escape(file)}-begun-{process.process}-*"):
        for position in sorted(Notebook.read(notebook) or {}):
            with suppress(TidingsError):
                async for event in store.read_all(after=position - 1, limit=1):
                    names = [known.name for known in service.handlers_of(event.type) if known.transactional]
                    where = f"event {event.id} (position {position}) of stream {event.stream!r}"
                    found += [f"handler {name!r} at {where}" for name in names if event.position == position]
    return found
