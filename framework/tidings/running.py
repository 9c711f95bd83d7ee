"""A running service: join, work until fenced or cut off, pause, join again; drain when told to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final
from uuid import UUID

import structlog

from tidings.attempt import AtWork, Resources, is_infrastructure
from tidings.buses import EventBus, Subscription
from tidings.database import Database, open_database
from tidings.dispatch import Dispatcher
from tidings.errors import LogBehind
from tidings.healing import Pass
from tidings.held import HeldRows
from tidings.inbox import Inbox
from tidings.intake import Intake
from tidings.opening import opened
from tidings.position import ALL_BUCKETS, Accepted, bucket_of
from tidings.relay import EMBEDDED_MARKERS, Relay
from tidings.settings import Settings, open_bus, open_store
from tidings.stores import EventStore
from tidings.supervision import leaves, supervised
from tidings.watchdog import Watchdog
from tidings.work import Troubles

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.service import Service

__all__ = ["RunningService", "run_service"]

log = structlog.get_logger("tidings.running")

DRAIN_SECONDS: Final = 3.5
REJOIN_SECONDS: Final = (0.1, 5.0)
"""First and longest pause before joining again."""


class RunningService:
    """What `service.running()` yields."""

    def __init__(self, service: Service, store: EventStore, bus: EventBus, database: Database) -> None:
        self.service = service
        self.store = store
        self.bus = bus
        self.database = database
        self.resources = Resources(service.name, None)
        self.joined = asyncio.Event()
        """Set after the first join."""
        self.stopping = asyncio.Event()
        self.joins = 0
        """How often the service has joined: more than 1 after it was fenced or cut off from database or store."""
        self._troubles = Troubles()
        self._dispatcher: Dispatcher | None = None
        self._intake: Intake | None = None
        self._healing: Pass | None = None
        self._joined: Inbox | None = None

    @property
    def engine(self) -> AsyncEngine:
        return self.database.engine

    @property
    def floor(self) -> int:
        """Everything up to this position is settled; -1 before the first join."""
        return self._dispatcher.floor if self._dispatcher else -1

    @property
    def healing(self) -> bool:
        """A pass over the log is under way."""
        return self._healing is not None and self._healing.under_way

    @property
    def marker_age(self) -> float | None:
        """Seconds since the last marker on this connection to the bus; None before the first. Over 30 is unhealthy."""
        heard = self._intake.marker_at if self._intake else None
        return None if heard is None else time.monotonic() - heard

    @property
    def marker(self) -> int:
        """The position up to which the last marker says that everything was published; -1 before the first."""
        return self._intake.marker if self._intake else -1

    @property
    def consuming(self) -> bool:
        """Connected to the bus. Of several processes of a service one is given messages; this may be a standby."""
        return self._intake is not None and self._intake.connected

    @property
    def paused(self) -> str | None:
        """Why the service tries only one event from time to time: everything fails. None while it works."""
        breaker = self._dispatcher.breaker if self._dispatcher else None
        if breaker is None or breaker.opened_at is None:
            return None
        return f"for {time.monotonic() - breaker.opened_at:.0f} s every attempt has failed, the last: {breaker.reason}"

    async def handled(self, position: int, key: str, *, timeout: float = 5.0) -> bool:
        """Wait until the event at `position`, of a type that this service handles and with partition key `key`, is
        handled, or after its failures held or dead, by whichever process of the service; False after `timeout` seconds.
        For reading one's own writes.

        Raises `DatabaseUnavailable`.
        """
        return await self._comes_to(bucket_of(key), position, timeout)

    async def reached(self, position: int, *, timeout: float = 5.0) -> bool:
        """Wait until every event up to `position` is handled, held or dead, by whichever process of the service; False
        after `timeout` seconds. This follows the relay's markers, which come a second apart.

        Raises `DatabaseUnavailable`.
        """
        return await self._comes_to(None, position, timeout)

    async def _comes_to(self, bucket: int | None, position: int, timeout: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + timeout, 0.005
        inbox = self._inbox(await self.store.log_id())
        while True:
            if await inbox.settled(bucket) >= position:
                return True
            if loop.time() + pause > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    async def settled(self) -> int:
        """The floor as committed by whichever process of the service; -1 before the first. One look into the database,
        which does not ask the store once the service has joined: raises `DatabaseUnavailable`, `StoreUnavailable`."""
        inbox = self._joined or self._inbox(await self.store.log_id())
        return await inbox.settled(None)

    def at_work(self) -> list[AtWork]:
        """Handlers at work now."""
        return list(self._dispatcher.working.values()) if self._dispatcher else []

    def working(self) -> dict[str, float]:
        """Handlers at work now: name to seconds, the longest of each."""
        now, found = time.monotonic(), dict[str, float]()
        for work in self.at_work():
            found[work.handler.name] = max(found.get(work.handler.name, 0.0), now - work.since)
        return found

    def _inbox(self, log_id: UUID) -> Inbox:
        return Inbox(self.database, self.service.name, log_id, ALL_BUCKETS)

    async def serve(self) -> None:
        """Until `stopping` is set. Raises what no waiting heals: configuration, another log, a log that went back."""
        first, longest = REJOIN_SECONDS
        pause = first
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                await self._session()
            except Exception as error:
                causes = list(leaves(error))
                strange = [cause for cause in causes if not is_infrastructure(cause)]
                if strange:
                    raise strange[0] from None
                if time.monotonic() - began > longest:
                    pause = first
                log.warning("service.rejoining", service=self.service.name, error=str(causes[0]), pause=pause)
            try:
                async with asyncio.timeout(pause):
                    await self.stopping.wait()
            except TimeoutError:
                pause = min(pause * 2, longest)

    async def _session(self) -> None:
        """From joining to the first loss of what was joined."""
        service = self.service
        log_id = await self.store.log_id()
        inbox = self._inbox(log_id)
        remembered = await inbox.join()
        self._joined = inbox
        head = await self.store.head()
        if remembered.highest > head:
            raise LogBehind(f"service {service.name!r}", log_id, head, remembered.highest)
        accepted = Accepted(ALL_BUCKETS, remembered.floor, remembered.watermarks)
        self._dispatcher = dispatcher = Dispatcher(
            service,
            self.store,
            self.database,
            inbox,
            HeldRows(service.name, log_id, ALL_BUCKETS),
            log_id,
            remembered,
            self.resources,
            self._troubles,
        )
        self._healing = healing = Pass(service.name, self.store, accepted, dispatcher)
        self._intake = intake = Intake(
            Subscription(service.name),
            self.bus,
            log_id,
            inbox,
            accepted,
            dispatcher,
            healing,
            prefetch=service.prefetch,
        )
        self.joins += 1
        log.info("service.joined", service=service.name, log=str(log_id), floor=remembered.floor, joins=self.joins)
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(dispatcher.run())
            taking = [tasks.create_task(healing.run()), tasks.create_task(intake.run())]
            self.joined.set()
            await self.stopping.wait()
            for task in taking:
                task.cancel()
            await dispatcher.drain(DRAIN_SECONDS)
            working.cancel()
        log.info("service.stopped", service=service.name, floor=dispatcher.floor)


@asynccontextmanager
async def run_service(
    service: Service, settings: Settings | None, store: EventStore | None, bus: EventBus | None
) -> AsyncIterator[RunningService]:
    """What `Service.running` does; `service.running_now` is set by it before the service's own lifespan begins."""
    settings = settings or Settings()
    async with AsyncExitStack() as stack:
        if store is None:
            store = await opened(stack, lambda: open_store(settings.store), "the event store")
        if bus is None:
            bus = await stack.enter_async_context(open_bus(settings.bus))
            if settings.embedded_bus:  # no relay of another process can reach it
                await stack.enter_async_context(supervised(Relay(store, bus, marker_seconds=EMBEDDED_MARKERS).run()))
        url = settings.database_of(service.name)
        database = await opened(
            stack, lambda: open_database(url, service.tables), f"the database of service {service.name}"
        )
        running = RunningService(service, store, bus, database)
        stack.enter_context(service.bound_to(running))
        if service.resources is not None:
            yielded = await stack.enter_async_context(service.resources(service))
            running.resources = Resources(service.name, yielded)
        for handler in service.handlers.values():
            running.resources.check(handler)
        stack.enter_context(Watchdog(running))
        async with supervised(running.serve(), stop=running.stopping):
            await running.joined.wait()
            yield running
