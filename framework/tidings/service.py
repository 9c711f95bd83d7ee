"""A microservice as its user sees it: declared, run, appended to. No I/O at import, no global registry.

Internal: its public name is `tidings.Service`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate
from tidings.modelling.appending import append
from tidings.modelling.contention import CHANGE_SECONDS
from tidings.modelling.declaration import Declaration, Lifespan
from tidings.modelling.events import Event
from tidings.modelling.repository import Repository
from tidings.stores import ANY, Appended, EventStore, Expected

if TYPE_CHECKING:
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tidings.hosting.running import RunningService
    from tidings.producing.outbox import Emit
    from tidings.settings import Settings

__all__ = ["Service"]

log = structlog.get_logger("tidings.service")

A = TypeVar("A", bound=Aggregate)


class Service(Declaration):
    """One service: one queue, one database, any number of handlers per event type.

    `tables` are created in the service's database when it starts. `lifespan(service)` is an async context manager
    around the running service; what it yields (one object, or a tuple of them) is injected into handlers by type.
    `concurrency` bounds the handlers without a session that run at once; `prefetch` the messages taken but not settled:
    both in each partition. `partitions`, 1 to 256, is into how many the service is divided, so that as many processes
    can work at once: what its database says must agree. Without it, the database says (a new one: 1).
    """

    def __init__(
        self,
        name: str,
        *,
        tables: MetaData | None = None,
        lifespan: Lifespan | None = None,
        concurrency: int = 64,
        prefetch: int = 1000,
        partitions: int | None = None,
    ) -> None:
        super().__init__(
            name,
            tables=tables,
            lifespan=lifespan,
            concurrency=concurrency,
            prefetch=prefetch,
            partitions=partitions,
        )
        self._running: RunningService | None = None
        self._claimed = False
        self._died: Exception | None = None

    def repository(self, aggregate: type[A], *, within: float = CHANGE_SECONDS) -> Repository[A]:
        """Aggregates of one kind; usable while the service runs. `within`: seconds that a change may take under
        contention."""
        return Repository(aggregate, lambda: self.running_now.store, within=within)

    async def append(
        self,
        stream: str,
        *events: Event,
        expected: Expected = ANY,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> Appended:
        """Append events outside any handler (inside one, use `Context.emit`). Errors are the store's."""
        store = self.running_now.store
        return await append(store, stream, events, expected=expected, metadata=metadata, correlation_id=correlation_id)

    @asynccontextmanager
    async def transaction(
        self, *, idempotency_key: str | None = None, appended_within: float = 1.0
    ) -> AsyncIterator[tuple[AsyncSession, Emit]]:
        """Commit rows of the service's database and events together, outside any handler:
        `async with service.transaction() as (session, emit):`.

        Leaving the block commits; an exception undoes everything. What `emit(stream, event)` was given is appended to
        the log exactly once, by the process of the service that is at work. If it is this one, leaving the block waits
        for that, at most `appended_within` seconds and not while the store is away; 0 does not wait. Else it happens
        within some 2 s, and after a crash by the next process: `await emit.appended()` after the block waits for any.

        With `idempotency_key` the events' ids are made from it, so that a request that is repeated, however late,
        appends nothing twice; to find what it was, each target stream is read to its beginning. The rows are yours to
        keep unique. An event with other data under the same key raises `RepetitionDiffers`, and nothing is committed.

        On SQLite nobody else writes during the block. Raises `DatabaseUnavailable` (when it comes from the commit
        itself, the outcome is unknown: repeat with a key), `ConfigurationError` in a handler.
        """
        from tidings.producing.outbox import transaction

        async with transaction(self.running_now, idempotency_key, appended_within) as both:
            yield both

    @property
    def running_now(self) -> RunningService:
        """The running service. Raises `ConfigurationError` outside `running()`."""
        if self._running is None and self._died is not None:
            raise ConfigurationError(f"service {self.name!r} is not running any more: {self._died}") from self._died
        if self._running is None:
            raise ConfigurationError(
                f"service {self.name!r} is not running: use it inside 'async with service.running()', a FastAPI app "
                "with lifespan=service.lifespan, or service.run()"
            )
        return self._running

    @property
    def stands_by(self) -> bool:
        """The service runs here, but another process has its place at work: only on a bus within the process."""
        return self._running is not None and self._running.standing_by is not None

    @property
    def engine(self) -> AsyncEngine:
        """The engine of the service's database, while it runs: for reading outside handlers."""
        return self.running_now.engine

    @asynccontextmanager
    async def running(
        self, settings: Settings | None = None, *, store: EventStore | None = None, bus: EventBus | None = None
    ) -> AsyncIterator[RunningService]:
        """Run the service around a block: consume, handle, settle. Leaving the block drains and stops it.

        `store` and `bus` may be given where several services of one process share them; else they are opened from
        `settings` (by default the environment). Raises `ConfigurationError`, `LogChanged`, `LogBehind`, or what ended
        the service while the block ran.
        """
        from tidings.hosting.running import run_service

        if self._claimed:
            raise ConfigurationError(
                f"service {self.name!r} runs already in this process. Start it once: a web application with "
                "lifespan=service.lifespan starts its service itself"
            )
        self._claimed, self._died = True, None
        try:
            async with run_service(self, settings, store, bus, self._hosted) as running:
                yield running
        except Exception as error:
            self._died = error
            raise
        finally:
            self._claimed = False

    @asynccontextmanager
    async def _hosted(self, running: RunningService) -> AsyncIterator[Any]:
        """Within the block, this service is the running one, and its lifespan is entered; yields what that yields."""
        self._running = running
        try:
            if self.resources is None:
                yield None
            else:
                async with self.resources(self) as resources:
                    yield resources
        finally:
            self._running = None

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """For `FastAPI(lifespan=service.lifespan)`: the service runs in the web application's process and loop.

        When the service dies, so does the process, by SIGTERM to itself: a web server that goes on answering for a
        service that handles nothing would be noticed by nobody.
        """
        serving = False
        try:
            async with self.running():
                serving = True
                yield
                serving = False
        except Exception as error:
            if serving:
                log.critical("service.died", service=self.name, error=f"{type(error).__name__}: {error}")
                os.kill(os.getpid(), signal.SIGTERM)
            raise

    def run(self, settings: Settings | None = None, *, health: int | str | None = None) -> None:
        """Run until SIGINT or SIGTERM, then drain; with an in-process bus the relay runs here too.

        `health`: a port of this machine, or `host:port`, that answers `/live` and `/ready`.
        """
        from tidings.hosting.serve import serve

        asyncio.run(serve(self, settings=settings, health=health))
