"""Connections to the PostgreSQL server of a log: how each begins, on which host, those that read. It knows no table."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import asyncpg

from tidings.errors import ConfigurationError, StoreUnavailable, TidingsError
from tidings.stores.postgresql.addresses import Host, addresses_of
from tidings.stores.postgresql.troubles import is_lost, unavailable
from tidings.urls import redact

__all__ = ["Connection", "Server", "closed", "discard"]

P = ParamSpec("P")
T = TypeVar("T")
Connection = Any
"""An asyncpg connection; asyncpg brings no types."""

CONNECT_SECONDS: Final = 10.0
"""Seconds that connecting may take. Several hosts share them: one that is silent leaves the others their part."""
ANSWER_SECONDS: Final = 30.0
"""Seconds after which a statement without an answer is given up, with its connection."""
LOCK_SECONDS: Final = 5.0
"""Seconds that an append waits for somebody else's transaction."""
CLOSE_SECONDS: Final = 2.0
"""Seconds for saying goodbye."""
OLDEST: Final = 120000
"""The oldest version of the server that is supported."""

# Names are looked for where PostgreSQL keeps its own, so that nobody's function is taken for one of them. A statement
# is planned once for a connection, for a table of any size: a plan for one that is still small must not read all of it
# later. Read committed: what an append looks at behind the lock is of that moment, not of the time before it waited.
# What is acknowledged survives the machine, whatever the server's default is or becomes: what a session has set for
# itself, even to the value that it had, is not changed by a reload.
_BEGIN: Final = f"""
SET search_path = pg_catalog;
SET lock_timeout = {int(LOCK_SECONDS * 1000)};
SET plan_cache_mode = force_generic_plan;
SET default_transaction_isolation = 'read committed';
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off;
SET idle_in_transaction_session_timeout = {int(ANSWER_SECONDS * 1000)};
SELECT set_config('synchronous_commit',
    CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END,
    false)"""
_STATE: Final = (
    "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean, "
    "current_setting('server_version_num')::integer, current_setting('server_version')"
)


class Server:
    """The server of one log, and the connections that read from it. It belongs to one event loop."""

    def __init__(self, url: str) -> None:
        self.shown = redact(url)
        self._hosts, readers = addresses_of(url)
        """The one that took writes last is the first."""
        self._room = asyncio.Semaphore(readers)
        self._idle: deque[Connection] = deque()
        self._leaving: set[asyncio.Task[Connection]] = set()
        """Those that connect although nobody waits for them any more."""
        self.refusals = 0
        """How often no host could be used."""
        self._refusal = "", True
        """What was said the last time, and whether waiting helps."""
        self._closed = False
        self.check: Callable[[Connection], Awaitable[None]] | None = None
        """Raises for a connection that leads elsewhere than those before it."""

    async def connect(self) -> Connection:
        """Return a new connection to a host that takes writes. Raises `StoreUnavailable`, `ConfigurationError`."""
        clock = asyncio.get_running_loop().time
        end = clock() + CONNECT_SECONDS
        refused: list[StoreUnavailable] = []
        hosts = tuple(self._hosts)
        for host in hosts:
            try:
                connection = await self._connect(host, (end - clock()) / (len(hosts) - len(refused)))
            except StoreUnavailable as error:
                refused.append(error)
            else:
                self._hosts.remove(host)
                self._hosts.insert(0, host)
                return connection
        refusal = refused[0]
        if len(refused) > 1:
            said, helps = " ".join(map(str, refused)), any(each.waiting_helps for each in refused)
            refusal = StoreUnavailable(f"no host of the event store can be used. {said}", waiting_helps=helps)
            refusal.__cause__ = refused[0]
        self.refusals += 1
        self._refusal = str(refusal), refusal.waiting_helps
        raise refusal

    def refusal(self) -> StoreUnavailable:
        """Return, as an error of its own, why no host could be used the last time that `refusals` grew."""
        said, helps = self._refusal
        return StoreUnavailable(said, waiting_helps=helps)

    async def _connect(self, host: Host, seconds: float) -> Connection:
        """A new connection to this host, ready for use."""
        connection: Connection = None
        try:
            async with asyncio.timeout(seconds):
                connection = await self._dialled(host, seconds)
                await connection.execute(_BEGIN)
                passive, version, named = await connection.fetchrow(_STATE)
            if version < OLDEST:
                raise ConfigurationError(
                    f"the event store {host.shown} is PostgreSQL {named}: Tidings needs version {OLDEST // 10000} or "
                    "newer"
                )
            if passive:
                raise StoreUnavailable(
                    f"the event store {host.shown} takes no writes: it is a standby, or read-only by its settings. "
                    "Name the primary in TIDINGS_STORE, or all hosts (postgresql://host1,host2/database)."
                )
            if self.check is not None:
                async with asyncio.timeout(seconds):
                    await self.check(connection)
        except BaseException as error:
            if connection is not None:
                discard(connection)
            if isinstance(error, TidingsError) or not isinstance(error, Exception):
                raise
            raise unavailable(host.shown, error) from error
        return connection

    async def _dialled(self, host: Host, seconds: float) -> Connection:
        """What asyncpg connects. It is never cancelled: where it has just made a socket, it would leave an error behind
        that nobody retrieves. It rather ends by itself, and its connection is closed."""
        dialling = asyncio.create_task(asyncpg.connect(host.dsn, timeout=seconds), name="tidings-postgresql-connect")
        try:
            await asyncio.wait([dialling])
        except BaseException:
            self._leaving.add(dialling)
            dialling.add_done_callback(self._left)
            raise
        try:
            return dialling.result()
        except (ValueError, TypeError) as error:
            if isinstance(error, OSError):  # a certificate that is not trusted is both
                raise
            # Neither its text nor its cause: it quotes what it takes for the port, maybe a part of the password.
            raise ConfigurationError(
                f"TIDINGS_STORE {self.shown} cannot be used ({type(error).__name__}): its port is no number, or one of "
                "its options is none of libpq's (sslmode, sslrootcert, target_session_attrs...)"
            ) from None

    def _left(self, dialling: asyncio.Task[Connection]) -> None:
        self._leaving.discard(dialling)
        if not dialling.cancelled() and dialling.exception() is None:
            discard(dialling.result())

    async def read(
        self, job: Callable[Concatenate[Connection, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return `job(connection, ...)`, which only reads. Raises `StoreUnavailable` for what asyncpg raises."""
        refusals = self.refusals
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._room.acquire()
        except TimeoutError as error:
            raise StoreUnavailable(
                f"the event store {self.shown} answered none of the reads before this one for {ANSWER_SECONDS:g} s. "
                "Check that the server runs, and what it is busy with (pg_stat_activity)."
            ) from error
        try:
            if self.refusals != refusals and not self._idle:
                raise self.refusal()  # while this one waited: it need not find out as slowly
            return await self._read(job, *args, **kwargs)
        finally:
            self._room.release()

    async def _read(
        self, job: Callable[Concatenate[Connection, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        silent = False
        while True:
            kept = bool(self._idle) and not silent
            connection = self._idle.pop() if kept else await self.connect()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await job(connection, *args, **kwargs)
            except BaseException as error:
                if isinstance(error, TidingsError):
                    self._keep(connection)
                    raise
                discard(connection)
                if not isinstance(error, Exception):
                    raise
                if kept and is_lost(error):
                    # It broke while nobody used it, maybe long ago: another one says how things are. After
                    # silence, a new one: the others that were kept may be as dead, and each would take as long.
                    silent = isinstance(error, TimeoutError)
                    continue
                raise unavailable(self.shown, error) from error
            self._keep(connection)
            return answer

    def _keep(self, connection: Connection) -> None:
        if self._closed:
            discard(connection)
        elif not connection.is_closed():
            self._idle.append(connection)

    async def close(self) -> None:
        """Close the connections that read; those in use, when they are free."""
        self._closed = True
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=CLOSE_SECONDS)
            for dialling in tuple(self._leaving):
                dialling.cancel()
        await asyncio.gather(*map(closed, self._idle))
        self._idle.clear()


async def closed(connection: Connection) -> None:
    """Say goodbye to the server, which would otherwise write of a lost connection into its log."""
    with suppress(Exception):
        await connection.close(timeout=CLOSE_SECONDS)


def discard(connection: Connection) -> None:
    """Close a connection at once, whatever it is doing."""
    with suppress(Exception):
        connection.terminate()
