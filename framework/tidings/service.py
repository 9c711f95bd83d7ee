"""A microservice as a user declares it: a name, tables, decorated handlers. No I/O at import, no global registry."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from tidings.buses import EventBus, check_partitions, check_service_name
from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate
from tidings.modelling.appending import append
from tidings.modelling.contention import CHANGE_SECONDS
from tidings.modelling.events import Event, Registry, wire_name
from tidings.modelling.handlers import Handler, Retry, Since, declare
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
F = TypeVar("F", bound=Callable[..., Any])

Lifespan = Callable[["Service"], AbstractAsyncContextManager[Any]]


class Service:
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
        if any(type(number) is not int or number < 1 for number in (concurrency, prefetch)):
            raise ConfigurationError(
                f"service {name!r}: concurrency={concurrency!r} and prefetch={prefetch!r} must be whole numbers from 1"
            )
        if lifespan is not None and not callable(lifespan):
            raise ConfigurationError(
                f"service {name!r}: lifespan={lifespan!r}: give a function of the service that returns an async "
                "context manager"
            )
        if tables is not None and not hasattr(tables, "sorted_tables"):
            raise ConfigurationError(
                f"service {name!r}: tables={tables!r}: give sqlalchemy.MetaData (of declarative models, Base.metadata)"
            )
        self.name = check_service_name(name)
        self.tables = tables
        self.resources = lifespan
        self.concurrency = concurrency
        self.prefetch = prefetch
        self.partitions = partitions if partitions is None else check_partitions(partitions)
        self.handlers: dict[str, tuple[Handler, ...]] = {}
        """By wire name, in the order of their declaration; those of `on_any` are among them."""
        self.handlers_of_any: tuple[Handler, ...] = ()
        """Those of `on_any`: of types that are not declared, they alone are given the events."""
        self.named: dict[str, Handler] = {}
        """All handlers by name."""
        self._types = Registry(f"service {name!r}")
        self._running: RunningService | None = None
        self._claimed = False
        self._died: Exception | None = None

    def on(
        self,
        *events: type[Event],
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        replay: bool = True,
        was: tuple[str, ...] = (),
        since: Since = None,
    ) -> Callable[[F], F]:
        """Handle these events; returns the function unchanged.

        Several handlers of one event run one after the other, in the order of their declaration; each is retried, held
        and given up on its own. While the first handler of an event holds one, later events of the same partition key
        wait for it in their own first handlers. A further handler of an event neither holds up others nor waits for
        them. A handler of several events may be the first for some of them, and a further one for others.

        Parameters are injected by annotation: the event, `Context`, SQLAlchemy's `AsyncSession` or `AsyncConnection`,
        or a resource of the service's lifespan. `timeout` is seconds per attempt. Effects through the session happen
        exactly once, in order per partition key; others at least once: give them `context.idempotency_key()`.
        `replay=False` is for handlers with such other effects: `tidings replay` does not run them again.
        `name`, by default the function's, is part of the ids of what the handler emits. When a handler is renamed, keep
        its `name`, or list the former ones in `was`, the oldest first: what it emitted under them is then recognised.
        `since` says where a handler begins that is new in a service which has settled events before: "now" (the
        default) after them, "start" with the first event of the log, or at a position. Its past is then done beside
        the other handlers' present, in order per partition key, before it is given new events. Without `since`, the
        service says in its log what the handler was not given. It counts until the handler has begun; a lower one
        later adds the past that is missing.
        Raises `ConfigurationError` for a name used twice, or a signature that cannot be served.
        """

        def register(function: F) -> F:
            policy = Retry() if retry is None else retry
            handler = declare(
                function, events, name=name, retry=policy, timeout=timeout, replay=replay, was=was, since=since
            )
            first_of = frozenset(wire_name(event) for event in events if self._is_first(event))
            handler = replace(handler, line=handler.name, first_of=first_of)
            self._add(handler)
            for event in dict.fromkeys(events):
                self._types.add(event)
                known = self.handlers.get(wire_name(event), self.handlers_of_any)
                self.handlers[wire_name(event)] = (*known, handler)
            return function

        return register

    def on_any(
        self,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        replay: bool = True,
        was: tuple[str, ...] = (),
        since: Since = None,
    ) -> Callable[[F], F]:
        """Handle every event that the log carries to services, of whatever type, declared or not, as a
        `RecordedEvent`; everything else is as with `on`.

        Events that a handler of `on` takes are given to both. What the handler itself emits comes back to it.
        """

        def register(function: F) -> F:
            handler = declare(
                function,
                (),
                name=name,
                retry=Retry() if retry is None else retry,
                timeout=timeout,
                replay=replay,
                was=was,
                since=since,
                every=True,
            )
            handler = replace(handler, line=handler.name)
            self._add(handler)
            self.handlers_of_any += (handler,)
            self.handlers = {kind: (*known, handler) for kind, known in self.handlers.items()}
            return function

        return register

    def _is_first(self, event: type[Event]) -> bool:
        """No other handler but those of `on_any` takes the event."""
        return all(not handler.events for handler in self.handlers.get(wire_name(event), ()))

    def _add(self, handler: Handler) -> None:
        if handler.name in self.named:
            raise ConfigurationError(
                f"service {self.name!r} has two handlers named {handler.name!r}: give one of them name=..., "
                "because the ids of emitted events are made from it"
            )
        for other in self.named.values():
            if both := handler.names & other.names:
                raise ConfigurationError(
                    f"service {self.name!r}: {min(both)!r} is, or was, the name of two handlers, {other.name!r} and "
                    f"{handler.name!r}: what was emitted and held under it belongs to one of them; take it out of the "
                    "other's was="
                )
        self.named[handler.name] = handler

    @property
    def names(self) -> frozenset[str]:
        """All that its handlers have, or had."""
        return frozenset().union(*(handler.names for handler in self.named.values()))

    def handlers_of(self, wire_name: str) -> tuple[Handler, ...]:
        """The handlers that are given an event of this type, in the order in which they run."""
        return self.handlers.get(wire_name, self.handlers_of_any)

    def view(self, wire_name: str) -> type[Event] | None:
        """This service's declaration of an event type, None for one it does not declare."""
        return self._types.get(wire_name)

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
            async with run_service(self, settings, store, bus) as running:
                yield running
        except Exception as error:
            self._died = error
            raise
        finally:
            self._claimed = False

    @contextmanager
    def bound_to(self, running: RunningService) -> Iterator[None]:
        """Within the block this service is the running one: for its repositories, `append` and `engine`."""
        self._running = running
        try:
            yield
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
        from tidings.hosting.runtime import serve

        asyncio.run(serve(self, settings=settings, health=health))
