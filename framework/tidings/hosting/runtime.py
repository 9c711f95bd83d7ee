"""Runs several services in one process on one store and bus, and the relay if no other process runs it."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import structlog

from tidings._support.only_async import OnlyAsync
from tidings._support.tasks import supervised, together
from tidings.adapters import open_bus, open_store
from tidings.buses import EventBus, Subscription
from tidings.delivery.owned import OwnBus, OwnStore
from tidings.errors import ConfigurationError
from tidings.hosting.waiting import open_when_available
from tidings.logs import configure_by_default
from tidings.modelling.declaration import Declaration
from tidings.operations.looking import subscriptions_of
from tidings.operations.verify import Report, verify
from tidings.relay.refusals import Queues
from tidings.relay.relay import EMBEDDED_MARKERS, MARKER_SECONDS, Relay
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.hosting.hosted import Hosted
    from tidings.hosting.running import RunningService

__all__ = ["Runtime"]

log = structlog.get_logger("tidings.runtime")

STUCK_SECONDS: Final = 1.0
"""Seconds for which nothing but held events must be left before `Runtime.settled` gives up."""


class Runtime(OnlyAsync):
    """An async context manager that runs services. By default everything is embedded, and nothing must be installed.

    If the bus lives in this process, the relay runs here, too. Over a network the relay is a process of its own, unless
    `relay` is True or a string, which names the relay. Enter and leave the block in the same task. Leaving it drains
    all services at the same time.

    A runtime does not handle signals. Under `asyncio.run`, Ctrl-C cancels handlers that are running, whose events come
    again at the next start, and ends the program with `KeyboardInterrupt`. SIGTERM kills the program. Use `serve` for a
    process that should end cleanly.
    """

    def __init__(
        self,
        *services: Hosted,
        settings: Settings | None = None,
        relay: bool | str | None = None,
        queues: Queues | None = None,
    ) -> None:
        """`queues` returns the partitions that the relay looks at when a queue refuses messages; by default those of
        the services that run here."""
        self.settings = settings or Settings()
        self.with_relay = self.settings.embedded_bus if relay is None else bool(relay)
        """Whether the relay runs here."""
        self.relay_name = relay if isinstance(relay, str) else "main"
        self.relay: Relay | None = None
        self._queues = queues or self._own_queues
        self._services = services
        self._stack = AsyncExitStack()
        self._stop = asyncio.Event()
        self._running: dict[str, RunningService] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._store: EventStore | None = None
        self._bus: EventBus | None = None

    async def __aenter__(self) -> Self:
        configure_by_default()
        async with AsyncExitStack() as stack:
            self._store = OwnStore(
                await open_when_available(stack, lambda: open_store(self.settings.store), "the event store")
            )
            self._bus = await stack.enter_async_context(open_bus(self.settings.bus))
            self._tasks = await stack.enter_async_context(together(self._stop))
            if self.with_relay:
                self.relay = Relay(
                    self._store,
                    self._bus,
                    name=self.relay_name,
                    marker_seconds=EMBEDDED_MARKERS if self.settings.embedded_bus else MARKER_SECONDS,
                    needed=self._at_work,
                    seal=self.settings.seal,
                    queues=self._queues,
                )
                self._tasks.create_task(self._carry(self.relay))
            elif self.settings.embedded_bus:
                log.warning("runtime.no_relay", advice="no other process can carry events to a bus in this one")
            for service in self._services:
                await self.start(service)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @property
    def store(self) -> EventStore:
        if self._store is None:
            raise ConfigurationError("the runtime is not running: use it inside 'async with Runtime(...)'")
        return self._store

    @property
    def bus(self) -> EventBus:
        if self._bus is None:
            raise ConfigurationError("the runtime is not running: use it inside 'async with Runtime(...)'")
        return cast("EventBus", OwnBus(self._bus))

    @property
    def services(self) -> list[Declaration]:
        """The services, in the order in which they were started."""
        return [running.service for running in self._running.values()]

    async def _own_queues(self) -> list[Subscription]:
        return [part for service in self.services for part in await subscriptions_of(self.settings, service)]

    async def start(self, service: Hosted) -> RunningService:
        """Start a service; it stops with the runtime."""
        if self._tasks is None:
            raise ConfigurationError("the runtime is not running: use it inside 'async with Runtime(...)'")
        started: asyncio.Future[RunningService] = asyncio.get_running_loop().create_future()
        hosting = self._tasks.create_task(self._host(service, started), name=f"service {service.name}")
        try:
            running = await started
        except BaseException:
            hosting.cancel()
            await asyncio.wait((hosting,))
            raise
        self._running[service.name] = running
        return running

    async def _host(self, service: Hosted, started: asyncio.Future[RunningService]) -> None:
        """Run a service in a task of its own, so that services stop at the same time."""
        try:
            async with service.running(self.settings, store=self.store, bus=self.bus) as running:
                started.set_result(running)
                await self._stop.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _carry(self, relay: Relay) -> None:
        async with supervised(relay.run()):
            await self._stop.wait()
            await relay.part()

    def _at_work(self) -> bool:
        """Return whether a service is at work here, or may be: without services here, something else uses the bus."""
        return not self._services or not all(service.stands_by for service in self._services)

    def unfinished(self) -> list[dict[str, Any]]:
        """Return what handlers are working on now: handler, event id, stream, position, seconds."""
        now = time.monotonic()
        return [
            {"service": name, **work.facts(now)}
            for name, running in self._running.items()
            for work in running.at_work()
        ]

    def engine(self, service: Hosted) -> AsyncEngine:
        """Return the engine of a started service's database, for reading."""
        return service.engine

    async def verify(self) -> Report:
        """Return whether every event is settled in every started service, and name each one that is not."""
        return await verify(self.store, [(running.service, running.database) for running in self._running.values()])

    async def settled(self, *, timeout: float = 60.0) -> Report:
        """Wait until every event in the log is settled in every started service, and nothing is staged.

        Raises `TimeoutError` after `timeout` seconds, with a report that names what is missing. It is raised earlier if
        only held events are left and none of them will be tried again in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        stuck_since: float | None = None
        while True:
            began = loop.time()
            report = await self.verify()
            if report.ok:
                return report
            if loop.time() > deadline:
                raise TimeoutError(f"not settled after {timeout:g} s:\n{report}")
            stuck = self._is_stuck(report, deadline - loop.time())
            stuck_since = (began if stuck_since is None else stuck_since) if stuck else None
            if stuck_since is not None and loop.time() - stuck_since > STUCK_SECONDS:
                raise TimeoutError(f"not settled, and nothing that is held is tried within {timeout:g} s:\n{report}")
            # The more there is to do, the longer a look takes: leave most of the time to the services.
            await asyncio.sleep(max(0.02, 3 * (loop.time() - began)))

    def _is_stuck(self, report: Report, seconds: float) -> bool:
        """Return whether only events are left that are held for longer than `seconds`. While a handler is paused, one
        of its events is tried from time to time, however long they are held."""
        if any(running.paused for running in self._running.values()):
            return False
        until = time.time() + seconds
        for part in report.services:
            held_for_long = part.held_count and (part.held_due is None or part.held_due > until)
            moves = part.pending_count or part.staged_count or not all(handler.ok for handler in part.handlers)
            if not part.ok and (moves or not held_for_long):
                return False
        return True
