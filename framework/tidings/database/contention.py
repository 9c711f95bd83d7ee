"""Transactions of commands, with other transactions in their way: done again after a deadlock, and never waiting for
ever for a lock. What services do by themselves, this does for everything else.

Whoever locks both a service's layout and its watermarks, or one of these and held events, locks them in this order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.backoff import nth_pause
from tidings.database.engine import Database
from tidings.database.outages import is_contention, is_lock_timeout
from tidings.errors import DatabaseUnavailable

__all__ = ["again_when_contended", "commanding"]

TIMES: Final = 8
"""Times that it is done, at most. PostgreSQL undoes one of the transactions that wait for each other, so that the
others go on: each deadlock takes one of them out of the way."""
PAUSES: Final = (0.1, 1.0)
"""First and longest pause, in seconds, before it is done again; each is shortened at random."""
LOCK_SECONDS: Final = 15.0
"""Seconds that a command waits for rows that another transaction has locked. A service locks them for milliseconds."""
LOOK_SECONDS: Final = 0.5
"""Seconds between two looks at who holds them."""

P = ParamSpec("P")
T = TypeVar("T")


def again_when_contended(do: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Wrap a function whose only effect is one transaction: after a deadlock, or when the transaction could not be
    serialized, the function runs again after a pause. The last of these errors is raised as it is."""

    @wraps(do)
    async def doing(*args: P.args, **options: P.kwargs) -> T:
        for number in range(1, TIMES):
            try:
                return await do(*args, **options)
            except DatabaseUnavailable as error:
                if not is_contention(error):
                    raise
            await asyncio.sleep(nth_pause(number, *PAUSES, jitter=1.0))
        return await do(*args, **options)

    return doing


@asynccontextmanager
async def commanding(database: Database) -> AsyncIterator[AsyncConnection]:
    """Enter a transaction of a command. Raises what `Database.transaction` does. Where another transaction holds a lock
    for too long, or is in the way again and again, the error names its process on the server."""
    if database.one_writer or database.engine.dialect.name != "postgresql":
        async with database.transaction() as connection:
            yield connection
        return
    holders = _Holders(database)
    try:
        async with database.transaction() as connection:
            await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(LOCK_SECONDS * 1000)}")
            async with holders.watched(await connection.scalar(sa.select(sa.func.pg_backend_pid()))):
                yield connection
    except DatabaseUnavailable as error:
        if holders.found and (is_lock_timeout(error) or is_contention(error)):
            raise DatabaseUnavailable(f"database {database.shown}: {holders}") from error.__cause__
        raise


_HOLDERS: Final = sa.text(
    "SELECT pid, application_name, host(client_addr) AS client_addr, state, "
    "extract(epoch FROM now() - xact_start) AS age "
    "FROM pg_stat_activity WHERE pid = ANY(pg_blocking_pids(:pid)) ORDER BY xact_start"
)


class _Holders:
    """Who holds what a transaction waits for. `str` of it is for people."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.found: Sequence[sa.Row[Any]] = ()

    @asynccontextmanager
    async def watched(self, pid: int | None) -> AsyncIterator[None]:
        """Look, while the block runs, for whom the server's process `pid` waits."""
        looking = asyncio.create_task(self._look(pid))
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look(self, pid: int | None) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(DatabaseUnavailable):
                async with self._database.reading() as connection:
                    self.found = (await connection.execute(_HOLDERS, {"pid": pid})).all() or self.found

    def __str__(self) -> str:
        who = "; ".join(
            f"process {row.pid} of the server ({row.application_name or 'without an application_name'}, from "
            f"{row.client_addr or 'its machine'}, {row.state}, its transaction began {row.age or 0:.0f} s ago)"
            for row in self.found
        )
        pids = ", ".join(f"SELECT pg_terminate_backend({row.pid})" for row in self.found)
        return (
            f"another transaction has locked what this command needs: {who}. Nothing was changed. Wait until it ends, "
            f"or end it ({pids}: it is undone, and a service does its own again); then give the command again"
        )
