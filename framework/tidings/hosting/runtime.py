"""Several services in one process on one store and bus, with the relay where nobody else runs it."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import structlog

from tidings._support.tasks import supervised, together
from tidings.adapters import open_bus, open_store
from tidings.buses import EventBus
from tidings.delivery.owned import OwnBus, OwnStore
from tidings.errors import ConfigurationError
from tidings.hosting.waiting import open_when_available
from tidings.logs import configure_by_default
from tidings.modelling.declaration import Declaration
from tidings.operations.verify import Report, verify
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


class Runtime:
    """An async context manager; by default everything is embedded and nothing needs to be installed.

    The relay runs here when the bus lives in this process; over a network it is a process of its own, unless `relay`
    says otherwise; a string names the relay. Enter and leave in one task. Leaving drains all services, side by side.
    It takes no notice of signals: under `asyncio.run` Ctrl-C cancels what runs, which then comes again at the next
    start, and ends the program with `KeyboardInterrupt`; SIGTERM kills it. Use `serve` for a process that shall end
    cleanly.
    """

    def __init__(self, *services: Hosted, settings: Settings | None = None, relay: bool | str | None = None) -> None:
        self.settings = settings or Settings()
        self.with_relay = self.settings.embedded_bus if relay is None else bool(relay)
        """The relay runs here."""
        self.relay_name = relay if isinstance(relay, str) else "main"
        self.relay: Relay | None = None
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
        """In the order in which they were started."""
        return [running.service for running in self._running.values()]

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
        """In a task of its own, so that services stop side by side."""
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
        """Is any service not a standby of another process's? Without services, whoever else uses the bus may be."""
        return not self._services or not all(service.stands_by for service in self._services)

    def unfinished(self) -> list[dict[str, Any]]:
        """What handlers are at work on now: handler, event id, stream, position, seconds."""
        now = time.monotonic()
        return [
            {"service": name, **work.facts(now)}
            for name, running in self._running.items()
            for work in running.at_work()
        ]

    def engine(self, service: Hosted) -> AsyncEngine:
        """The engine of a started service's database, for reading."""
        return service.engine

    async def verify(self) -> Report:
        """Is every event settled in every started service?"""
        return await verify(self.store, [(running.service, running.database) for running in self._running.values()])

    async def settled(self, *, timeout: float = 60.0) -> Report:
        """Wait until every event in the log is settled in every started service, and nothing is staged.

        Raises `TimeoutError` after `timeout` seconds with the report that names what is missing; and as soon as nothing
        is left but events that are held until later than that, or until somebody does something.
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
            # Looking costs the more, the more is to be done: leave most of the time to those who do it.
            await asyncio.sleep(max(0.02, 3 * (loop.time() - began)))

    def _is_stuck(self, report: Report, seconds: float) -> bool:
        """Nothing is left but events that are held for longer than these seconds. While a handler is paused, one of its
        events is tried now and then, whatever they are held for."""
        if any(running.paused for running in self._running.values()):
            return False
        until = time.time() + seconds
        for part in report.services:
            held_for_long = part.held_count and (part.held_due is None or part.held_due > until)
            moves = part.pending_count or part.staged_count or not all(handler.ok for handler in part.handlers)
            if not part.ok and (moves or not held_for_long):
                return False
        return True
