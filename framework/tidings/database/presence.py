"""The processes of a service and the code that each runs, one row each, for display to operators.

No decision rests on it: the bus chooses which process is at work.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from tidings._support.tasks import supervised
from tidings.database.engine import Database
from tidings.database.tables import processes
from tidings.errors import DatabaseUnavailable
from tidings.modelling.fingerprints import fingerprint, version_of

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["PRESENT_SECONDS", "Process", "present", "present_as"]

AGAIN_SECONDS: Final = 10.0
"""Seconds between two updates of a process's row."""
PARTING_SECONDS: Final = 0.3
"""Seconds that a process takes at most to delete its row. If that fails, it is displayed for a while longer."""
PRESENT_SECONDS: Final = 60.0
"""Seconds since a process was last seen, after which it counts as gone."""
FORGOTTEN_SECONDS: Final = 86400.0
"""Seconds since a process was last seen, after which its row is deleted."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a service. Times are seconds since 1970, by the clock of the process."""

    process: str
    host: str
    pid: int
    version: str
    """Version of the package that contains the handlers; "" where there is none."""
    code: str
    """Fingerprint of all handlers; "-" where the service has none."""
    started: float
    seen: float

    def __str__(self) -> str:
        return f"{self.version or self.code} (process {self.pid} on {self.host})"


def code_of(service: Declaration) -> tuple[str, str]:
    """Return the version of this process's code, and the fingerprint of all its handlers; "-" where it has none: other
    code is not looked at."""
    functions = {name: handler.function for name, handler in service.named.items()}
    if not functions:
        return "", "-"
    digest = sha256("".join(f"{name} {fingerprint(functions[name])} " for name in sorted(functions)).encode())
    version = next((found for name in sorted(functions) if (found := version_of(functions[name]))), "")
    return version[:50], digest.hexdigest()[:8]


@asynccontextmanager
async def present_as(database: Database, service: Declaration, process: str) -> AsyncIterator[None]:
    """Show operators this process and its code while the block runs. A database that does not answer is no error."""
    async with supervised(_stay(database, service, process)):
        yield
    with suppress(DatabaseUnavailable, TimeoutError):
        async with asyncio.timeout(PARTING_SECONDS):
            await _leave(database, service.name, process)


async def _stay(database: Database, service: Declaration, process: str) -> None:
    started = time.time()
    while True:
        with suppress(DatabaseUnavailable):  # whoever needs it says so
            await _announce(database, service, process, started)
        await asyncio.sleep(AGAIN_SECONDS)


async def _announce(database: Database, service: Declaration, process: str, started: float) -> None:
    """Update this process's row. Raises `DatabaseUnavailable`."""
    now = time.time()
    version, code = code_of(service)
    mine = (processes.c.service == service.name, processes.c.process == process)
    async with database.turn, database.transaction() as connection:
        if (await connection.execute(processes.update().where(*mine).values(seen=now))).rowcount:
            return
        long_ago = (processes.c.service == service.name, processes.c.seen < now - FORGOTTEN_SECONDS)
        await connection.execute(processes.delete().where(*long_ago))
        await connection.execute(
            processes.insert().values(
                service=service.name,
                process=process,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=version,
                code=code,
                started=started,
                seen=now,
            )
        )


async def _leave(database: Database, service: str, process: str) -> None:
    """Delete this process's row. Raises `DatabaseUnavailable`."""
    mine = (processes.c.service == service, processes.c.process == process)
    async with database.turn, database.transaction() as connection:
        await connection.execute(processes.delete().where(*mine))


async def present(database: Database, service: str, now: float) -> list[Process]:
    """Return the processes that have updated their rows lately, the oldest first. Raises `DatabaseUnavailable`."""
    names = [processes.c[name] for name in Process.__slots__]
    lately = (processes.c.service == service, processes.c.seen > now - PRESENT_SECONDS)
    async with database.reading() as connection:
        rows = await connection.execute(sa.select(*names).where(*lately).order_by(processes.c.started))
        return [Process(*row) for row in rows]
