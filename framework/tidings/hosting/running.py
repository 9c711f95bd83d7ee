"""A running service: its partitions as its database lays them out, laid out anew when it is resized, and what all know.

Each process of a service runs every partition; the bus decides which of them it is given. So this never asks where the
other processes are, and they come and go as they like.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID, uuid4

import structlog

from tidings._support.backoff import Backoff, becomes_true
from tidings._support.tasks import supervised, task_group
from tidings._support.telling import Telling
from tidings.adapters import open_bus, open_store
from tidings.buses import EventBus, WithinProcess
from tidings.database.engine import Database, open_database
from tidings.database.held_code import reason_in_code
from tidings.database.held_events import HeldCount, held_by_handler
from tidings.database.layout import Layout, Range, ask_for, lay_out, layout_of, lowest, ranges_of, settled, was_rebound
from tidings.database.presence import present_as
from tidings.database.staged_events import StagedEvent, requested_events
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.inflight import InFlight
from tidings.delivery.owned import OwnBus, OwnStore
from tidings.delivery.resources import Resources
from tidings.delivery.site import TRUSTING, Site, Trust, Witness
from tidings.errors import BusUnavailable, DatabaseMoved, DatabaseUnavailable, StoreUnavailable
from tidings.hosting.balance import asked_of, to_ask
from tidings.hosting.partition import DRAIN_SECONDS, Partition, persistently
from tidings.hosting.standby import Post, Taken, post_of
from tidings.hosting.surroundings import SURROUNDINGS
from tidings.hosting.waiting import open_when_available
from tidings.hosting.watchdog import Watchdog
from tidings.logs import configure_by_default
from tidings.protocol.position import bucket_of
from tidings.relay.relay import EMBEDDED_MARKERS, Relay
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.modelling.declaration import Declaration

__all__ = ["RunningService", "run_service"]

log = structlog.get_logger("tidings.running")

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks at whether the service was resized, or another process asks for a partition."""
BALANCE_LOOKS: Final = 3
"""Looks between two requests for a partition: what was asked for before has mostly come by then."""
STANDBY_SECONDS: Final = 1.0
"""Seconds between two attempts of a standby to take over, and between two looks of the process at work at its lock."""
REQUESTED: Final = 1000
"""Events emitted by requests that are looked at together."""
POLL_SECONDS: Final = (0.005, 0.1)
"""First and longest pause between looks at how far a service has come, while a caller waits for it."""
REBIND_SECONDS: Final = (0.2, 5.0)
"""First and longest pause between attempts to make queues anew."""


class RunningService:
    """What `service.running()` yields."""

    def __init__(
        self,
        service: Declaration,
        store: EventStore,
        bus: EventBus,
        database: Database,
        *,
        clock: Callable[[], float] = time.monotonic,
        witness: Witness | None = None,
        trust: Trust = TRUSTING,
    ) -> None:
        self.service = service
        self.store: EventStore = OwnStore.of(store)
        self.bus: EventBus = cast("EventBus", OwnBus(bus))
        self._bus = bus
        self.database = database
        self.resources = Resources(service.name, None)
        self.joined = asyncio.Event()
        """Set after the first join of every partition, or when this process first stands by for another."""
        self.standing_by: str | None = None
        """Which other process is at work, on a bus that reaches only this process; else None."""
        self.staged = asyncio.Event()
        """A request of this process has staged events: whoever is at work here need not wait for its next look."""
        self.stopping = asyncio.Event()
        self.partitions: list[Partition] = []
        """As the service is laid out now; none before the first join."""
        self.process: Final = str(uuid4())
        """Id of this process of the service, another one after each start."""
        self._clock = clock
        self._witness = witness
        self.trust = trust
        self._memory = FailureMemory()
        self.taken = self._memory.taken
        self._log_id: UUID | None = None
        self._alone: Final = isinstance(bus, WithinProcess) and bus.within_process
        self._post = post_of(database, service.name) if self._alone else None

    @property
    def engine(self) -> AsyncEngine:
        return self.database.engine

    @property
    def joins(self) -> int:
        """How often the service has joined as it is laid out now, in the partition where that was most often: more than
        1 after it was fenced, cut off from database or store, or has given a partition up to another process."""
        return max((part.joins for part in self.partitions), default=0)

    @property
    def floor(self) -> int:
        """Everything up to this position is settled, as far as this process knows; -1 before the first join."""
        return min((part.floor for part in self.partitions), default=-1)

    @property
    def healing(self) -> bool:
        """A pass over the log is under way."""
        return any(part.healing for part in self.partitions)

    @property
    def marker_age(self) -> float | None:
        """Seconds since the last marker on this connection to the bus, where that is longest; None before the first.
        Over 30 is unhealthy."""
        return max((age for part in self.partitions if (age := part.marker_age) is not None), default=None)

    @property
    def marker(self) -> int:
        """The position up to which the last marker says that everything was published; -1 before the first."""
        return max((part.marker for part in self.partitions), default=-1)

    @property
    def consuming(self) -> bool:
        """Connected to the bus. Of several processes of a service one is given a partition's messages; this may be a
        standby."""
        return bool(self.partitions) and all(part.consuming for part in self.partitions)

    @property
    def paused(self) -> str | None:
        """Which handlers are paused, and why: every attempt of theirs fails, so that their events are held, and one of
        them is tried from time to time. None while there are none."""
        return "; ".join(self.paused_handlers.values()) or None

    @property
    def paused_handlers(self) -> dict[str, str]:
        """Handlers whose breaker is open: name to the reason."""
        found = dict[str, tuple[float, str]]()
        for part in self.partitions:
            for name, breaker in part.pipeline.breakers.open.items() if part.pipeline else ():
                assert breaker.opened_at is not None
                found[name] = min(found.get(name, (math.inf, "")), (breaker.opened_at, breaker.reason))
        return {
            name: f"handler {name!r}: for {self._clock() - since:.0f} s every attempt has failed, the last: {reason}"
            for name, (since, reason) in found.items()
        }

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
        log_id = await self.store.log_id()

        async def come() -> bool:
            return await settled(self.database, self.service.name, log_id, bucket) >= position

        return await becomes_true(come, timeout, Backoff(*POLL_SECONDS, factor=1.5))

    async def settled(self) -> int:
        """The floor as committed by whichever process of the service; -1 before the first. One look into the database,
        which does not ask the store once the service has joined: raises `DatabaseUnavailable`, `StoreUnavailable`."""
        return lowest(await self.ranges())

    async def ranges(self) -> list[Range]:
        """Return what is committed of each partition, by whichever process; else as `settled`."""
        log_id = await self.log_id()
        async with self.database.reading() as connection:
            return await ranges_of(connection, self.service.name, log_id)

    async def log_id(self) -> UUID:
        """Return the log's id; the store is asked only before the first join. Raises `StoreUnavailable`."""
        known = self.partitions[0].log_id if self.partitions else None
        if known is None:
            known = self._log_id = self._log_id or await self.store.log_id()
        return known

    def watch(self, rows: Sequence[StagedEvent]) -> list[asyncio.Future[bool]]:
        """Return a future for each of these events that this process will append; see `Stager.watch`."""
        pipelines = [part.pipeline for part in self.partitions if part.pipeline is not None]
        found = [pipeline.watch(row, alone=self._alone) for row in rows for pipeline in pipelines]
        return [future for future in found if future is not None]

    def failed_attempts(self, item: InFlight) -> int:
        """Attempts at an event that failed since it was read."""
        return self._memory.attempts.get(item.turn, 0)

    async def held(self) -> list[HeldCount]:
        """What is held because a handler failed, by handler; else as `settled`."""
        async with self.database.reading() as connection:
            counts = await held_by_handler(connection, self.service.name, await self.log_id())
        service = self.service
        return [count._replace(reason=reason_in_code(service, count.handler, None, count.reason)) for count in counts]

    def at_work(self) -> list[InFlight]:
        """Handlers at work now."""
        return [work for part in self.partitions for work in part.at_work()]

    def working(self) -> dict[str, float]:
        """Handlers at work now: name to seconds, the longest of each."""
        now, found = self._clock(), dict[str, float]()
        for work in self.at_work():
            found[work.handler.name] = max(found.get(work.handler.name, 0.0), now - work.since)
        return found

    async def serve(self) -> None:
        """Run until `stopping` is set. Raises what no waiting mends: another log, a log that went back, settings."""
        membership = self._as_laid_out if self._post is None else partial(self._at_post, self._post)
        await persistently(membership, self.stopping, self._clock, service=self.service.name)

    async def _at_post(self, post: Post, telling: Telling) -> None:
        """Work while this process has the place of the service at work; until then, stand by."""
        while not self.stopping.is_set():
            try:
                async with post.held():
                    await self._take_over(post, telling)
                return
            except Taken as taken:
                await self._stand_by(taken.by)
            await self._pause(STANDBY_SECONDS)

    async def _stand_by(self, for_: str) -> None:
        if self.standing_by != for_:
            log.info(
                "service.standing_by",
                service=self.service.name,
                at_work=for_,
                database=self.database.shown,
                advice="on a bus in memory one process of a service works; this one appends, reads and answers, and "
                "takes over within seconds when that one ends. To share the work: TIDINGS_BUS=amqp://..., partitions",
            )
        self.standing_by = for_
        # The relay of this process is not to fill queues that nobody empties.
        await self.bus.delete([part.subscription for part in self.partitions])
        self.partitions = []
        self.joined.set()

    async def _take_over(self, post: Post, telling: Telling) -> None:
        if self.standing_by is not None:
            log.info("service.takes_over", service=self.service.name, was_at_work=self.standing_by)
            self.standing_by = None
        async with task_group() as tasks:
            guarding = tasks.create_task(self._stay(post))
            await self._as_laid_out(telling)
            guarding.cancel()

    async def _stay(self, post: Post) -> None:
        """Raises `DatabaseUnavailable` when another process may have the place."""
        while True:
            await asyncio.sleep(STANDBY_SECONDS)
            await post.check()

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the service is to stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()

    async def _as_laid_out(self, telling: Telling) -> None:
        """Run the partitions until the service is resized, or stops."""
        service = self.service
        layout = await lay_out(self.database, service.name, service.partitions)
        telling.seems_over("service.rejoined", service=service.name)
        ready = asyncio.Event()
        site = Site(
            service,
            self.store,
            self._bus,
            self.database,
            self.resources,
            self.process,
            self._memory,
            self._clock,
            self._witness,
            self.trust,
        )
        self.partitions = parts = [
            Partition(site, subscription, layout.epoch, ready) for subscription in layout.subscriptions
        ]
        async with task_group() as tasks:
            beside = [
                tasks.create_task(work)
                for work in (self._rebind(layout, ready), self._join(parts), self._collect(parts))
            ]
            for part in parts:
                tasks.create_task(part.serve())
            await self._watch(layout)
            for task in beside:
                task.cancel()
            for part in parts:
                part.leave(DRAIN_SECONDS)

    async def _join(self, parts: Sequence[Partition]) -> None:
        for part in parts:
            await part.joined.wait()
        self.joined.set()
        for part in parts:
            if part.pipeline is not None:
                await part.pipeline.takeover.active.wait()
                self.staged.set()

    async def _rebind(self, layout: Layout, ready: asyncio.Event) -> None:
        """Make the queues of this layout where they are of an older one, and take away those of any other."""
        if not layout.queues_are_old:
            ready.set()
        doomed = layout.strays + (layout.subscriptions if layout.queues_are_old else [])
        backoff, telling = Backoff(*REBIND_SECONDS), Telling(log)
        while doomed:
            try:
                await self.bus.delete(doomed)
                if layout.queues_are_old:
                    for subscription in layout.subscriptions:
                        await self.bus.provision(subscription)
                    await was_rebound(self.database, layout)
                    log.info("service.rebound", service=layout.service, partitions=layout.count, epoch=layout.epoch)
                break
            except (BusUnavailable, DatabaseUnavailable) as error:
                telling.failed("service.not_rebound", error, service=layout.service, next_attempt_in=backoff.pause)
            await backoff.wait()
        ready.set()

    async def _collect(self, parts: Sequence[Partition]) -> None:
        """Hand on what requests emitted, in whichever process."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self.staged.wait()
            self.staged.clear()
            try:
                log_id = await self.log_id()
                async with self.database.reading() as connection:
                    rows = await requested_events(connection, self.service.name, log_id, REQUESTED)
            except (DatabaseUnavailable, StoreUnavailable):
                continue  # the partitions notice it themselves, and say so
            for part in parts:
                if part.pipeline is not None and part.log_id == log_id:
                    part.pipeline.collect(rows, all=len(rows) < REQUESTED)

    # ---- what other processes and operators want ---------------------------------------

    async def _watch(self, layout: Layout) -> None:
        """Wait until the service stops, or is laid out in another way."""
        looks = 0
        while not self.stopping.is_set():
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self.stopping.wait()
                return
            except TimeoutError:
                looks += 1
            try:
                async with self.database.reading() as connection:
                    found = await layout_of(connection, layout.service)
                if found is not None and found.epoch != layout.epoch:
                    log.info("service.resized", service=layout.service, partitions=found.count, before=layout.count)
                    return
                if layout.count > 1:
                    await self._balance(await self.ranges(), asking=looks % BALANCE_LOOKS == 0 and self.consuming)
            except DatabaseMoved:
                raise
            except (DatabaseUnavailable, StoreUnavailable):
                continue  # the partitions notice it themselves, and say so

    async def _balance(self, ranges: Sequence[Range], *, asking: bool) -> None:
        me, wanted = self.process, set(asked_of(ranges, self.process))
        for part in self.partitions:
            if part.subscription.buckets.start in wanted:
                part.give_up()
        asks = to_ask(ranges, me) if asking else {}
        if not asks:
            return
        log.info("service.asks_for_partitions", service=self.service.name, partitions=len(asks))
        await ask_for(self.database, self.service.name, asks, me)


@asynccontextmanager
async def run_service(
    service: Declaration,
    settings: Settings | None,
    store: EventStore | None,
    bus: EventBus | None,
    hosted: Callable[[RunningService], AbstractAsyncContextManager[Any]],
) -> AsyncIterator[RunningService]:
    """What `Service.running` does. `hosted(running)` is entered before the first join, and yields the resources that
    handlers may ask for."""
    configure_by_default()
    settings, around = settings or Settings(), SURROUNDINGS.get()
    at_work: Callable[[], bool] = lambda: True  # noqa: E731 - until there is one to ask
    async with AsyncExitStack() as stack:
        if store is None:
            store = await open_when_available(stack, lambda: open_store(settings.store), "the event store")
        if bus is None:
            bus = await stack.enter_async_context(open_bus(settings.bus))
            if settings.embedded_bus:  # no relay of another process can reach it
                relay = Relay(store, bus, marker_seconds=EMBEDDED_MARKERS, needed=lambda: at_work(), seal=settings.seal)
                await stack.enter_async_context(supervised(relay.run()))
                stack.push_async_callback(relay.part)
        if around.database is not None:
            database = await stack.enter_async_context(around.database(service))
        else:
            url = settings.database_of(service.name)
            database = await open_when_available(
                stack, lambda: open_database(url, service.tables), f"the database of service {service.name}"
            )
        trust = Trust(settings.seal, settings.bus_content == "message", settings.ids)
        running = RunningService(service, store, bus, database, clock=around.clock, witness=around.witness, trust=trust)
        at_work = lambda: running.standing_by is None  # noqa: E731
        yielded = await stack.enter_async_context(hosted(running))
        running.resources = Resources(service.name, yielded, around.resources)
        for handler in service.named.values():
            running.resources.check(handler)
        stack.enter_context(Watchdog(service.name, running.working))
        await stack.enter_async_context(present_as(database, service, running.process))
        async with supervised(running.serve(), stop=running.stopping):
            await running.joined.wait()
            yield running
