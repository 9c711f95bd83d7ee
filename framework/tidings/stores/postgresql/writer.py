"""The task that appends to the PostgreSQL log: it groups what is queued, and tries again what a connection has lost."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from tidings._support.backoff import Backoff
from tidings.errors import StoreError, StoreUnavailable, TidingsError
from tidings.stores.postgresql.appender import Appender
from tidings.stores.postgresql.connections import ANSWER_SECONDS, Connection, Server, closed, discard
from tidings.stores.postgresql.continuity import Continuity
from tidings.stores.postgresql.decisions import Outcome, Write
from tidings.stores.postgresql.schema import prepare
from tidings.stores.postgresql.troubles import is_lost, of_one_write, state_of, unavailable

__all__ = ["Writer"]

GROUP_WRITES: Final = 256
GROUP_BYTES: Final = 8 * 1024 * 1024
"""Most of one transaction: bounds the wait of the first append for the last, and the memory of a statement."""
AGAIN_SECONDS: Final = 10.0
"""Seconds for which a group is tried again after its connection was lost. EventStoreDB's clients wait as long."""
PAUSE_SECONDS: Final = (0.05, 0.5)

HELD_SECONDS: Final = 5.0
"""Seconds for finding out who holds the lock. The error comes without a name after that."""

# Who holds what an append waits for, in this database, and whom they wait for themselves, up to those who wait for
# nobody: another writer that waits for a CREATE INDEX is not to blame. Locks on `events` are those that keep rows out.
_HOLDERS: Final = """
WITH RECURSIVE holding AS (
    SELECT pid FROM pg_locks
    WHERE granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND (
        relation = 'tidings_log.writer'::regclass AND mode <> 'AccessShareLock'
        OR relation = 'tidings_log.events'::regclass
        AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
    UNION
    SELECT unnest(pg_blocking_pids(pid)) FROM holding
)
SELECT string_agg(format('process %s (%s, %s, for %s s)', pid, coalesce(nullif(application_name, ''), usename), state,
    round(extract(epoch FROM clock_timestamp() - xact_start))), ', '), min(pid)
FROM holding JOIN pg_stat_activity USING (pid)
WHERE pid <> pg_backend_pid() AND cardinality(pg_blocking_pids(pid)) = 0"""


class Writer:
    """Takes what is queued, makes it durable with one commit, tells who waits."""

    def __init__(self, server: Server, log: Continuity, reached: Callable[[int], None]) -> None:
        self._server = server
        self._reached = reached
        self._appender = Appender(server.shown, log)
        self._queue: deque[Write] = deque()
        self._queued = asyncio.Event()
        self._closing = False
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, make the schema if need be, and begin to write. Raises `StoreUnavailable`, `ConfigurationError`."""
        await self._connected(make=True)
        self._task = asyncio.create_task(self._run(), name="tidings-postgresql-writer")

    def submit(self, write: Write) -> None:
        """Queue a write; writes are applied in this order."""
        self._queue.append(write)
        self._queued.set()

    async def close(self) -> None:
        """Write what is queued, and end."""
        self._closing = True
        self._queued.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._connection is not None:
            await closed(self._connection)

    async def _run(self) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._queued.clear()
                await self._queued.wait()
            # Who was just answered may have more to write: rather one group than two.
            await asyncio.sleep(0)
            group = self._next_group()
            refusals = self._server.refusals
            outcomes = await self._commit(group)
            self._appender.answered()
            self._reached(self._appender.head)
            for write, outcome in zip(group, outcomes, strict=True):
                if write.answer.done():  # its caller was cancelled
                    continue
                if isinstance(outcome, StoreError):
                    write.answer.set_exception(outcome)
                else:
                    write.answer.set_result(outcome)
            if self._server.refusals != refusals and (self._connection is None or self._connection.is_closed()):
                self._refuse_queued()

    def _refuse_queued(self) -> None:
        """Tell who waits behind a group for which no server was found: they need not find out as slowly."""
        while self._queue:
            answer = self._queue.popleft().answer
            if not answer.done():
                answer.set_exception(self._server.refusal())

    def _next_group(self) -> list[Write]:
        group: list[Write] = []
        size = 0
        while self._queue and len(group) < GROUP_WRITES:
            size += self._queue[0].size
            if group and size > GROUP_BYTES:
                break
            group.append(self._queue.popleft())
        return group

    async def _commit(self, group: Sequence[Write]) -> list[Outcome]:
        """The outcome of each write, durable when this returns. Never raises."""
        try:
            return await self._again(group)
        except Exception as error:
            if len(group) > 1 and not isinstance(error, TidingsError) and of_one_write(error):
                return [outcome for write in group for outcome in await self._commit([write])]
            return [self._failed(error) for _ in group]

    def _failed(self, error: Exception) -> StoreUnavailable:
        """An error of its own for each who waits."""
        failure = unavailable(self._server.shown, error)
        if self._appender.in_doubt:
            said = f"{failure} What was to be appended may or may not have been: to be sure, append the same events, "
            failure = StoreUnavailable(f"{said}with the same ids, again.", waiting_helps=failure.waiting_helps)
        failure.__cause__ = error
        return failure

    async def _again(self, group: Sequence[Write]) -> list[Outcome]:
        """Write the group; where the connection is lost, as often as it takes, for `AGAIN_SECONDS` from the first loss.

        Nothing is written twice, and nothing is decided twice: what was committed is found with the outcomes that it
        had. A transaction whose connection is gone may still go on in the server. It writes before this one, which then
        finds it, or not at all, because what it takes for granted is not so any more.
        """
        loop = asyncio.get_running_loop()
        deadline, backoff = math.inf, Backoff(*PAUSE_SECONDS, jitter=0.5)
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await self._appender.write(await self._connected(), group)
            except Exception as error:
                self._appender.forget()
                passing = error.waiting_helps if isinstance(error, StoreUnavailable) else is_lost(error)
                if self._connection is not None and (passing or _in_transaction(self._connection)):
                    discard(self._connection)
                if state_of(error) == "55P03":
                    raise await self._held_up(error) from error
                if not passing:
                    raise
                # A connection that died silently has used up all of `ANSWER_SECONDS` before anybody could know.
                deadline = min(deadline, loop.time() + AGAIN_SECONDS)
                if loop.time() + backoff.pause > deadline:
                    raise
                await backoff.wait()

    async def _connected(self, *, make: bool = False) -> Connection:
        """The connection that writes, on a schema that is up to date. A log that was there is never made again."""
        if self._connection is None or self._connection.is_closed():
            connection = await self._server.connect()
            try:
                await prepare(connection, self._server.shown, make=make)
                await self._appender.begin(connection)
            except BaseException as error:
                discard(connection)
                if isinstance(error, TidingsError) or not isinstance(error, Exception):
                    raise
                raise unavailable(self._server.shown, error) from error
            self._connection = connection
        return self._connection

    async def _held_up(self, error: Exception) -> StoreUnavailable:
        """Who holds the log's lock, as an error. It asks on the connection that writes: those that read may be busy."""
        holder = ""
        try:
            async with asyncio.timeout(HELD_SECONDS):
                named, process = await (await self._connected()).fetchrow(_HOLDERS)
            if named:
                holder = f": {named} holds the log. To end it:  SELECT pg_terminate_backend({process})"
        except Exception:
            if self._connection is not None:
                discard(self._connection)
        return unavailable(self._server.shown, error, holder)


def _in_transaction(connection: Connection) -> bool:
    """Whether a failed transaction is left, in which every further statement would fail."""
    return not connection.is_closed() and bool(connection.is_in_transaction())
