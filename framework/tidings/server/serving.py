"""The server as a whole: a log, its services, a port, from start to end. It interprets no request."""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote
from uuid import uuid4

from tidings._support.private_files import private
from tidings.errors import ConfigurationError, StoreUnavailable, StreamDeleted
from tidings.hosting.listening import listening_at
from tidings.server.budgets import Limits, Treasury
from tidings.server.certificates import generated_certificate, is_loopback, tls_context
from tidings.server.cluster import Cluster
from tidings.server.connections import Connections
from tidings.server.disk import watch_disk
from tidings.server.door import SHARE, Door
from tidings.server.group_service import PersistentSubscriptions
from tidings.server.http1 import Site
from tidings.server.http2 import Connection
from tidings.server.log import ServedLog
from tidings.server.permissions import ADMINS, IDENTITY
from tidings.server.projections import Projections
from tidings.server.records import Records
from tidings.server.refusals import Refusal, Status
from tidings.server.releases import EVENTSTOREDB, release_of
from tidings.server.security import DEFAULT_PASSWORD, Access
from tidings.server.streams import Streams
from tidings.stores.sqlite.log import now
from tidings.stores.sqlite.store import SqliteStore, open_sqlite

__all__ = ["DEFAULT_PORT", "EventStoreServer"]

DEFAULT_PORT: Final = 2113
OWN_FILES: Final = 128
"""Files that the server itself may have open."""
GRACE: Final = 2.0
"""Seconds that calls which have begun may take when the server ends."""


class EventStoreServer:
    """An EventStoreDB-compatible server in this process.

    `async with EventStoreServer() as server:` listens on a free port of 127.0.0.1 with a log in memory;
    `server.uri` is what a client connects to.

    `db` is the path of a database file; the embedded store may use it at the same time, another server may not.
    `tls=True`, or a `certificate` with its `key` (PEM files), asks for users: `users` are names and passwords, by
    default, on this machine alone, EventStoreDB's own `admin` and `ops` with `changeit`. Listening elsewhere needs
    TLS and users, or `insecure=True`. As in EventStoreDB, ids of `ANY` and `STREAM_EXISTS` appends are forgotten when
    it is started again; `remember_ids` keeps them. `projections` runs `$by_category` and `$by_event_type` from the
    start; without it they begin when somebody reads one of their streams. `strict` leaves out what is kinder than
    EventStoreDB: there, and then here, an append that is repeated while its first copy is being written is dropped, and
    answered with a time-out after two seconds. `services` are the users that may read `$all` as relays and services
    must, without being administrators. `limits` are what clients may cost. `release` is the server whose answers it
    gives: "eventstoredb-24.2" or "kurrentdb-26.1".

    Raises `ConfigurationError` for options that do not go together and for an address that cannot be had, and
    `StoreUnavailable`, for a database that another server has too.
    """

    def __init__(
        self,
        db: str | Path | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: bool = False,
        certificate: str | None = None,
        key: str | None = None,
        users: Mapping[str, str] | None = None,
        insecure: bool = False,
        remember_ids: bool = False,
        projections: bool = False,
        strict: bool = False,
        services: Collection[str] = (),
        limits: Limits | None = None,
        release: str = EVENTSTOREDB.name,
    ) -> None:
        self._release = release_of(release)
        limits = limits or self._release.limits
        self._release.check(limits)
        self._db = None if db is None else str(db)
        self.host = host
        self.port = port
        """The port that it listens on; 0 until it has started, when a free one was asked for."""
        self.certificate = certificate
        """What clients must trust, when it uses TLS: a PEM file."""
        self._key = key
        self._tls = tls or certificate is not None
        self._users = dict(users or {})
        self._remember_ids = remember_ids
        self._projections = projections
        self._strict = strict
        self._services = frozenset(services)
        self._connections = Connections(Treasury(_affordable(limits), users=self._tls))
        self._idle = asyncio.Event()
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        if (certificate is None) != (key is None):
            raise ConfigurationError("a certificate goes with its key: give both, or neither")
        if insecure and (self._tls or users):
            raise ConfigurationError("insecure means without TLS and users: leave one of them out")
        if self._services and not self._tls:
            raise ConfigurationError("services that may read $all are users, and users need TLS: add tls")
        if self._users and not self._tls:
            raise ConfigurationError("users need TLS, or their passwords could be read on the way: add tls")
        if not is_loopback(host) and not insecure and not self._tls:
            raise ConfigurationError(
                f"listening on {host} lets others than this machine in: add TLS and users, or say insecure"
            )

    @property
    def treasury(self) -> Treasury:
        """What its clients use at the moment."""
        return self._connections.treasury

    @property
    def uri(self) -> str:
        """For esdbclient and kurrentdbclient."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if not self._tls:
            return f"esdb://{host}:{self.port}?Tls=false"
        name, password = next(iter(self._users.items()), ("admin", DEFAULT_PASSWORD))
        user = f"{quote(name, safe='')}:{quote(password, safe='')}"
        return f"esdb://{user}@{'localhost' if is_loopback(self.host) else host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        started = asyncio.create_task(self._started.wait())
        try:
            await asyncio.wait([self._running, started], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._running.cancel()
            raise
        finally:
            started.cancel()
        if not self._started.is_set():
            await self._running
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Take no more calls, finish those that have begun, and close the log."""
        self._stopping.set()
        if self._running is not None:
            await self._running

    async def wait(self) -> None:
        """Until it ends, which it does by itself only by an error."""
        if self._running is not None:
            await asyncio.shield(self._running)

    async def _run(self) -> None:
        try:
            await self._serve()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            url = f"memory://server-{uuid4().hex}"
            if self._db is not None:
                stack.enter_context(_alone(self._db))
                url = f"sqlite:///{self._db}"
            # Before the log is opened: what cannot listen leaves no trace. Who connects already is served in a moment.
            listening = stack.enter_context(listening_at(self.host, self.port, "the server"))
            self.port = listening.getsockname()[1]
            store = await open_sqlite(
                url,
                remember_ids=self._remember_ids,
                first_streams=True,
                stride=self._release.stride,
                limit=self._release.whole,
            )
            stack.push_async_callback(store.close)
            await _begin_log(store)
            access = await self._access(store)
            context = self._context(stack) if self._tls else None
            log = ServedLog(store, now)
            async with asyncio.TaskGroup() as tasks:
                projections = Projections(store, log, access, tasks)
                await projections.load(start=self._projections)
                subscriptions = PersistentSubscriptions(store, log, access, projections.wanted, tasks)
                await subscriptions.load()
                strict, release = self._strict, self._release
                methods = [
                    *Streams(store, log, access, projections.wanted, strict=strict, release=release).methods(),
                    *(Records(store, access, release).methods() if release.appends_records else ()),
                    *subscriptions.methods(),
                    *projections.methods(),
                ]
                by_path = {method.path: method for method in methods}
                looking = [tasks.create_task(self._connections.run()), tasks.create_task(watch_disk(store))]

                site = Site(release, users=self._tls)

                def connection() -> Connection:
                    return Connection(by_path, access.authenticate, tasks, self._connections, self._idle.set, site)

                accepting = tasks.create_task(Door(listening, context, connection, self.treasury).run())
                name = "localhost" if is_loopback(self.host) else self.host
                by_path |= {
                    method.path: method for method in Cluster(name, self.port, methods, access, release).methods()
                }
                self._started.set()
                await self._stopping.wait()
                accepting.cancel()
                await asyncio.wait([accepting])
                listening.close()
                await self._drain()
                for task in looking:
                    task.cancel()
                await subscriptions.stop()
                await projections.stop()

    async def _access(self, store: SqliteStore) -> Access:
        failures = self.treasury.limits.user_failed_logins
        access = Access(store, open=not self._tls, services=self._services, user_failures=failures)
        if self._tls:
            alone = is_loopback(self.host)
            await access.load(self._users, default=alone)
            if not access.users:
                raise ConfigurationError(f"listening on {self.host} needs users: give a name and a password")
            if not alone and await access.uses_default_password():
                raise ConfigurationError(
                    f"listening on {self.host} with EventStoreDB's default password lets everybody in: "
                    "give admin and ops other passwords"
                )
        return access

    def _context(self, stack: AsyncExitStack) -> ssl.SSLContext:
        if self.certificate is None or self._key is None:
            if self._db is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidings-server-")))
            else:
                folder = Path(f"{self._db}-tls")
            self.certificate, self._key = generated_certificate(folder, self.host)
        return tls_context(self.certificate, self._key)

    async def _drain(self) -> None:
        """Until every call that will end by itself has ended; subscriptions are ended."""
        for connection in self._connections:
            connection.leave()
        try:
            async with asyncio.timeout(GRACE):
                while any(connection.busy for connection in self._connections):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            pass
        for connection in self._connections:
            connection.drop(Refusal(Status.UNAVAILABLE, "Server Is Not Ready"))


async def _begin_log(store: SqliteStore) -> None:
    """A log of EventStoreDB begins with an event of its own, and its clients' tests look for one. The log's identity is
    the administrators'."""
    with suppress(StreamDeleted):
        if (await store.get_metadata("$scavenges")).version < 0:
            await store.set_metadata("$scavenges", {"$maxAge": 2_592_000})
    with suppress(StreamDeleted):
        if (await store.get_metadata(IDENTITY)).version < 0:
            admins = {"$acl": {"$r": "$all", "$w": [ADMINS], "$d": [ADMINS], "$mr": "$all", "$mw": [ADMINS]}}
            await store.set_metadata(IDENTITY, admins)


def _alone(db: str) -> ExitStack:
    """A lock for as long as this process lives. Not on the database itself: SQLite's own locks are there."""
    import fcntl  # not on every system; a server without a database needs none

    path = f"{db}-server"
    stack = ExitStack()
    try:
        lock = stack.enter_context(closing(open(path, "a+", encoding="ascii", opener=private)))  # noqa: SIM115 - the stack closes it
    except OSError as error:
        raise ConfigurationError(f"the database {db} cannot be served: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        process = lock.read(32).strip() or "unknown"
        stack.close()
        raise StoreUnavailable(
            f"another server has the database {db} (process {process}): connect to that one, or stop it"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return stack


def _affordable(limits: Limits) -> Limits:
    """No more connections than the process may have files open, less those that it needs itself."""
    import resource  # not on every system, like fcntl

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return limits
    room = max(most - OWN_FILES, most // 2) * SHARE // (SHARE + 1)  # some more are shaking hands
    return replace(limits, connections=min(limits.connections, max(room, 1)))
