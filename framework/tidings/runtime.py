"""Several services in one process on one store and bus, with the relay where nobody else runs it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import structlog

from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.relay import EMBEDDED_MARKERS, MARKER_SECONDS, Relay
from tidings.settings import Settings, open_bus, open_store
from tidings.stores import EventStore
from tidings.supervision import supervised
from tidings.verify import Report, verify

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.running import RunningService
    from tidings.service import Service

__all__ = ["Runtime", "serve"]

log = structlog.get_logger("tidings.runtime")


class Runtime:
    """An async context manager; by default everything is embedded and nothing needs to be installed.

    The relay runs here when the bus lives in this process; over a network it is a process of its own, unless `relay`
    says otherwise. Enter, start and leave in one task.
    """

    def __init__(self, *services: Service, settings: Settings | None = None, relay: bool | None = None) -> None:
        self.settings = settings or Settings()
        self._services = services
        self._with_relay = self.settings.embedded_bus if relay is None else relay
        self._stack = AsyncExitStack()
        self._running: dict[str, RunningService] = {}
        self._store: EventStore | None = None
        self._bus: EventBus | None = None
        self.relay: Relay | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._store = await stack.enter_async_context(open_store(self.settings.store))
            self._bus = await stack.enter_async_context(open_bus(self.settings.bus))
            if self._with_relay:
                self.relay = Relay(
                    self._store,
                    self._bus,
                    marker_seconds=EMBEDDED_MARKERS if self.settings.embedded_bus else MARKER_SECONDS,
                )
                await stack.enter_async_context(supervised(self.relay.run()))
            elif self.settings.embedded_bus:
                log.warning("runtime.no_relay", advice="no other process can carry events to a bus in this one")
            self._stack = stack.pop_all()
            try:
                for service in self._services:
                    await self.start(service)
            except BaseException as error:
                await self._stack.__aexit__(type(error), error, error.__traceback__)
                raise
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
        return self._bus

    @property
    def services(self) -> list[Service]:
        """In the order in which they were started."""
        return [running.service for running in self._running.values()]

    async def start(self, service: Service) -> RunningService:
        """Start a service; it stops with the runtime."""
        running = await self._stack.enter_async_context(service.running(self.settings, store=self.store, bus=self.bus))
        self._running[service.name] = running
        return running

    def engine(self, service: Service) -> AsyncEngine:
        """The engine of a started service's database, for reading."""
        return service.engine

    async def verify(self) -> Report:
        """Is every event settled in every started service?"""
        return await verify(self.store, [(running.service, running.database) for running in self._running.values()])

    async def settled(self, *, timeout: float = 60.0) -> Report:
        """Wait until every event in the log is settled in every started service, and nothing is staged.

        Raises `TimeoutError` after `timeout` seconds with the report that names what is missing.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            began = loop.time()
            report = await self.verify()
            if report.ok:
                return report
            if loop.time() > deadline:
                raise TimeoutError(f"not settled after {timeout:g} s:\n{report}")
            # Looking costs the more, the more is to be done: leave most of the time to those who do it.
            await asyncio.sleep(max(0.02, 3 * (loop.time() - began)))


async def serve(*services: Service, settings: Settings | None = None, relay: bool | None = None) -> None:
    """Run services until SIGINT or SIGTERM, then drain; a second signal ends the process at once.

    `relay` as for `Runtime`: `serve(relay=True)` is the relay's own process on a networked bus.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        log.info("process.stopping", signal=number.name)
        loop.remove_signal_handler(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        async with Runtime(*services, settings=settings, relay=relay):
            await stop.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
