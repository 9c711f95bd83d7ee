"""A microservice as its user sees it: declare handlers, run it, append events. No I/O at import, no global registry.

Internal: its public name is `tidings.Service`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate
from tidings.modelling.appending import Appends
from tidings.modelling.contention import CHANGE_SECONDS
from tidings.modelling.declaration import Declaration, Lifespan
from tidings.modelling.repository import Repository
from tidings.stores import EventStore

if TYPE_CHECKING:
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tidings.hosting.running import RunningService
    from tidings.producing.outbox import Emit
    from tidings.settings import Settings

__all__ = ["Service"]

log = structlog.get_logger("tidings.service")

A = TypeVar("A", bound=Aggregate)


class Service(Declaration, Appends):
    """One service: one queue, one database, any number of handlers per event type.

    `tables` are created in the service's database when it starts. `lifespan(service)` is an async context manager
    around the running service; the object that it yields, or each one of a tuple, is injected into handlers by type.

    `concurrency` limits the handlers without a session that run at once, and `prefetch` the messages that are taken and
    not settled, both per partition. `partitions`, from 1 to 256, divides the service, so that as many processes can
    work at once. It must agree with the number in the service's database; by default that number is used (1 in a new
    database).
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
        """Return a repository of one kind of aggregates. It works while the service runs.

        `within` is the number of seconds that a change may take when others change the same aggregate.
        """
        return Repository(
            aggregate,
            lambda: self.running_now.store,
            within=within,
            taken=lambda *found: self.running_now.taken.note(*found),
        )

    def _appends_to(self) -> EventStore:
        return self.running_now.store

    @asynccontextmanager
    async def transaction(
        self, *, idempotency_key: str | None = None, appended_within: float = 1.0
    ) -> AsyncIterator[tuple[AsyncSession, Emit]]:
        """Commit rows of the service's database and events together, outside any handler:
        `async with service.transaction() as (session, emit):`.

        The end of the block commits; an exception undoes everything. The process that is at work for the service
        appends each event of `emit(stream, event)` to the log exactly once. If it is this process, the end of the block
        waits for that, for at most `appended_within` seconds (0 does not wait) and not while the store is down.
        Otherwise it happens within about 2 s, or after a crash by the next process. `await emit.appended()` after the
        block waits for whichever process does it.

        With `idempotency_key` the ids of the events are computed from the key, so a repeated request appends nothing
        twice, however late it comes; to find earlier events, each target stream is read back to its beginning. Keep
        your rows unique yourself. An event with other data under the same key raises `RepetitionDiffers`, and nothing
        is committed.

        On SQLite nothing else can write during the block. Raises `ConfigurationError` inside a handler, and
        `DatabaseUnavailable`. If the latter comes from the commit itself, the outcome is unknown: repeat with a key.
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
        """Whether the service runs here while another process is at work. Only possible on a bus within the process."""
        return self._running is not None and self._running.standing_by is not None

    @property
    def engine(self) -> AsyncEngine:
        """The engine of the service's database, for reading outside handlers while the service runs."""
        return self.running_now.engine

    @asynccontextmanager
    async def running(
        self, settings: Settings | None = None, *, store: EventStore | None = None, bus: EventBus | None = None
    ) -> AsyncIterator[RunningService]:
        """Run the service around a block: consume, handle, settle. The end of the block drains and stops it.

        Pass `store` and `bus` if several services of a process share them. Otherwise they are opened from `settings`,
        by default from the environment. Raises `ConfigurationError`, `LogChanged`, `LogBehind`, or the error that ended
        the service while the block ran.
        """
        from tidings.hosting.hosted import HOST
        from tidings.hosting.running import run_service

        host = HOST.get()
        if host is not None:
            async with host.host(self) as running:
                yield running
            return
        with self.claimed():
            async with run_service(self, settings, store, bus, self._hosted) as running:
                yield running

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have the service for the block alone. Raises `ConfigurationError` while it runs. Internal."""
        if self._claimed:
            raise ConfigurationError(
                f"service {self.name!r} runs already in this process. Start it once: a web application with "
                "lifespan=service.lifespan starts its service itself"
            )
        self._claimed, self._died = True, None
        try:
            yield
        except Exception as error:
            self._died = error
            raise
        finally:
            self._claimed = False

    @contextmanager
    def bound_to(self, running: RunningService) -> Iterator[None]:
        """Have repositories, `append` and `engine` use `running` within the block. Internal."""
        self._running = running
        try:
            yield
        finally:
            self._running = None

    @asynccontextmanager
    async def _hosted(self, running: RunningService) -> AsyncIterator[Any]:
        """Make this service the running one and enter its lifespan within the block. Yields what the lifespan
        yields."""
        from tidings.hosting.surroundings import SURROUNDINGS

        around = SURROUNDINGS.get()
        with self.bound_to(running):
            async with AsyncExitStack() as stack:
                resources = None
                if self.resources is not None and not around.replace_all(self):
                    with around.entering():
                        resources = await stack.enter_async_context(self.resources(self))
                yield resources

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Run the service in a web application's process and loop, with `FastAPI(lifespan=service.lifespan)`.

        If the service dies, the process sends itself SIGTERM. Otherwise nobody would notice that the web server goes on
        answering while the service handles nothing.
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
        """Run until SIGINT or SIGTERM, then drain. With an in-process bus, the relay runs here, too.

        `health` is a port of this machine, or `host:port`, that answers `/live` and `/ready`.
        """
        from tidings.hosting.serve import serve

        asyncio.run(serve(self, settings=settings, health=health))
