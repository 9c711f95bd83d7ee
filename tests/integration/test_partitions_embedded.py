"""A divided service: processes come and go, it is resized under traffic, and whoever interrupts that loses nothing.

The processes of these tests share one loop, one bus in memory and one database; real ones are in `tests/faults`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    auditing,
    emitting,
    followed,
    many,
    note,
    rows,
    settings_for,
    tables,
    until,
)
from tests.integration.served import open_log
from tidings import Context, EventData, EventStore, Relay, Service, Settings, open_bus
from tidings._support.tasks import supervised
from tidings.buses import Subscription
from tidings.buses.memory import MemoryBus
from tidings.database.engine import Database, open_database
from tidings.database.layout import Layout, layout_of, ranges_of, resize
from tidings.database.tables import watermarks
from tidings.errors import ConfigurationError, Fenced
from tidings.hosting.running import RunningService
from tidings.modelling.codec import encode
from tidings.operations.verify import verify
from tidings.protocol.position import bucket_of

pytestmark = pytest.mark.postgresql


@pytest.fixture(autouse=True)
def _attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.hosting.running.LOOK_SECONDS", 0.05)


def written(event: Happened) -> EventData:
    return encode(event, id=uuid4())


class Around:
    """A bus that passes everything on. Tests override the methods that should fail."""

    def __init__(self, bus: MemoryBus) -> None:
        self.inner = bus

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Site:
    """One log, a bus with a relay, one database, and processes of one service that come and go."""

    def __init__(self, settings: Settings, store: EventStore, bus: MemoryBus, database: Database) -> None:
        self.settings = settings
        self.store = store
        self.bus = bus
        self.database = database

    @asynccontextmanager
    async def process(self, service: Service, bus: Any = None) -> AsyncIterator[RunningService]:
        async with service.running(self.settings, store=self.store, bus=bus or self.bus) as running:
            yield running

    async def append(self, events: Sequence[Happened], pause: float = 0.0) -> None:
        for event in events:
            await self.store.append(f"Happened-{event.key}", [written(event)])
            await asyncio.sleep(pause)

    async def settled(self, service: Service) -> None:
        async def ok() -> bool:
            return (await verify(self.store, [(service, self.database)])).ok

        await until(ok, 90)

    async def layout(self) -> Layout:
        async with self.database.reading() as connection:
            found = await layout_of(connection, "audit")
        assert found is not None
        return found

    async def shares(self) -> dict[str | None, int]:
        """Return process to number of partitions that it is at work on."""
        async with self.database.reading() as connection:
            return Counter(row.active for row in await ranges_of(connection, "audit", await self.store.log_id()))

    async def queues(self) -> set[str]:
        """Return the names of the service's queues that exist, undivided or of partitions."""
        numbered = [Subscription("audit", index, 256) for index in range(256)]
        found = await self.bus.inspect([Subscription("audit"), *numbered])
        return {thing.name for thing in found if thing.kind == "queue" and thing.state == "fits"}


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    settings = settings_for(folder)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_log(folder))
        bus = await stack.enter_async_context(open_bus(settings.bus))
        assert isinstance(bus, MemoryBus)
        database = await stack.enter_async_context(open_database(database_url(folder, "audit"), tables))
        relay = Relay(store, bus, marker_seconds=0.1, checkpoint_seconds=0.05)
        await stack.enter_async_context(supervised(relay.run()))
        yield Site(settings, store, bus, database)


def calling(seen: list[tuple[str, int]], *, seconds: float = 0.0, **options: Any) -> Service:
    """Declare a service whose effects are outside any database, so that a second run is visible."""
    service = Service("audit", tables=tables, **options)

    @service.on(Happened)
    async def call(event: Happened) -> None:
        seen.append((event.key, event.n))
        await asyncio.sleep(seconds)

    return service


async def test_a_divided_service_does_everything_once_in_order(tmp_path: Path) -> None:
    service, events = emitting_in(4), many(400, 23)
    async with site(tmp_path) as here, here.process(service) as running:
        assert [len(part.subscription.buckets) for part in running.partitions] == [64] * 4
        await here.append(events)
        await here.settled(service)
        assert_once_in_order(await rows(service), events)
        assert_once_in_order(await followed(here.store), events)
        assert await here.queues() == {f"tidings.audit.{index}" for index in range(4)}
        assert running.joins == 1
        last = await here.store.append("Happened-k1", [written(Happened(key="k1", n=1000))])
        assert await running.handled(last.position, "k1")
        assert await running.reached(last.position)
        assert running.floor >= last.position
        assert await running.settled() >= last.position


def emitting_in(count: int | None) -> Service:
    service = emitting()
    service.partitions = count
    return service


async def test_each_of_two_processes_gets_half_of_the_partitions_and_keeps_it(tmp_path: Path) -> None:
    one, two, events = auditing(partitions=8), auditing(partitions=8), many(600, 41)
    async with site(tmp_path) as here, here.process(one) as first:
        await here.append(events[:200])
        assert list((await here.shares()).values()) == [8]
        async with here.process(two) as second:
            feeding = asyncio.create_task(here.append(events[200:], pause=0.002))

            async def even() -> bool:
                shares = await here.shares()
                return sorted(shares.values()) == [4, 4] and None not in shares

            await until(even)
            await until(lambda: first.consuming and second.consuming)
            joins = [part.joins for part in (*first.partitions, *second.partitions)]
            await feeding
            assert await even()
            assert [part.joins for part in (*first.partitions, *second.partitions)] == joins, "nobody moves any more"
            await here.settled(one)
        assert_once_in_order(await rows(one), events)


async def test_processes_come_and_go_and_nothing_is_run_twice_even_outside_of_the_database(tmp_path: Path) -> None:
    """Each process ends cleanly: its handlers are done before another process begins."""
    seen: list[tuple[str, int]] = []
    events, processes = many(900, 37), [calling(seen, seconds=0.002, partitions=4) for _ in range(5)]
    async with site(tmp_path) as here:
        feeding = asyncio.create_task(here.append(events, pause=0.003))
        before = AsyncExitStack()
        await before.enter_async_context(here.process(processes[0]))
        for following in processes[1:]:
            stack = AsyncExitStack()
            await stack.enter_async_context(here.process(following))

            async def shared() -> bool:
                shares = await here.shares()
                return len(shares) == 2 and None not in shares

            await until(shared)
            await before.aclose()
            before = stack
        await feeding
        await here.settled(processes[-1])
        await before.aclose()
    assert_once_in_order(seen, events)


async def test_a_partition_is_given_up_only_when_its_slowest_handler_has_ended(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    gate = asyncio.Event()

    def slow() -> Service:
        service = Service("audit", tables=tables, partitions=2)

        @service.on(Happened)
        async def call(event: Happened) -> None:
            seen.append((event.key, event.n))
            await gate.wait()

        return service

    one, two, events = slow(), slow(), [Happened(key=f"k{n}", n=n) for n in range(40)]
    async with site(tmp_path) as here, here.process(one):
        await here.append(events)
        await until(lambda: len(seen) == len(events))
        async with here.process(two) as second:
            await until(lambda: second.consuming)

            async def asked() -> bool:
                async with here.database.reading() as connection:
                    found = await ranges_of(connection, "audit", await here.store.log_id())
                return any(row.asked for row in found)

            await until(asked)
            assert len(await here.shares()) == 1, "the other one waits"
            gate.set()

            async def shared() -> bool:
                return sorted((await here.shares()).values()) == [1, 1]

            await until(shared)
            await here.settled(one)
    assert_once_in_order(seen, events)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_standby_does_not_disturb_the_active_one(tmp_path: Path, count: int) -> None:
    """With one more process than partitions, that one has nothing to do, and takes nothing from the others."""
    processes, events = [emitting_in(count) for _ in range(count + 1)], many(300, 19)
    async with site(tmp_path) as here, AsyncExitStack() as stack:
        running = [await stack.enter_async_context(here.process(service)) for service in processes[:count]]

        async def even() -> bool:
            shares = await here.shares()
            return None not in shares and sorted(shares.values()) == [1] * count

        await until(even)
        await until(lambda: all(process.consuming for process in running))
        joins = [[part.joins for part in process.partitions] for process in running]
        standby = await stack.enter_async_context(here.process(processes[-1]))
        await here.append(events)
        await here.settled(processes[0])
        assert await even()
        after = [[part.joins for part in process.partitions] for process in running]
        assert after == joins, "nobody was fenced, or gave anything up"
        assert standby.joins == 1
        assert standby.marker_age is None, "it was given nothing"
        assert_once_in_order(await rows(processes[0]), events)
        assert_once_in_order(await followed(here.store), events)


async def test_resizing_under_traffic_loses_repeats_and_reorders_nothing(tmp_path: Path) -> None:
    services, events = [emitting_in(None) for _ in range(2)], many(900, 31)
    async with site(tmp_path) as here, here.process(services[0]) as first, here.process(services[1]) as second:
        feeding = asyncio.create_task(here.append(events, pause=0.003))
        for to in (4, 2, 1):
            await asyncio.sleep(0.2)
            before, after = await resize(here.database, "audit", to)
            assert before.count != after.count == to

            async def rebound(to: int = to) -> bool:
                layout = await here.layout()
                laid_out = [len(running.partitions) for running in (first, second)]
                return not layout.queues_are_old and laid_out == [to, to] and first.consuming and second.consuming

            await until(rebound)
        await feeding
        await here.settled(services[0])
        assert_once_in_order(await rows(services[0]), events)
        assert_once_in_order(await followed(here.store), events)
        await until(lambda: first.consuming and second.consuming)
        assert await here.queues() == {"tidings.audit"}, "no queue of another layout is left"


class Killed(Exception):
    """Raised where the process ends."""


class Fatal(Around):
    """A bus that kills its process at the n-th step of rebuilding queues. Each deletion and each provision is a
    step."""

    def __init__(self, bus: MemoryBus, step: int) -> None:
        super().__init__(bus)
        self.left = step
        self.rebinding = False

    async def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        self.rebinding = True
        for subscription in subscriptions:
            await self._step()
            await self.inner.delete([subscription])

    async def provision(self, subscription: Subscription | None = None) -> None:
        if self.rebinding:
            await self._step()
        await self.inner.provision(subscription)


async def killed(here: Site, bus: Fatal) -> None:
    async with here.process(auditing(), bus) as doomed:
        await until(lambda: doomed.consuming)
        raise Killed


@pytest.mark.sqlite("about who has which queue")
@pytest.mark.parametrize("step", range(10))
async def test_a_resizing_that_is_killed_at_any_step_is_done_by_the_next_process(tmp_path: Path, step: int) -> None:
    """1 to 2 to 3 partitions: queues are deleted and created one by one. In the last cases the process dies after all
    steps."""
    events, service = many(240, 17), auditing()
    async with site(tmp_path) as here:
        async with here.process(auditing()):
            await here.append(events[:60])
        await resize(here.database, "audit", 2)
        async with here.process(auditing()):
            await here.append(events[60:120])
        await resize(here.database, "audit", 3)
        await here.append(events[120:180])
        with pytest.raises(Killed):
            await killed(here, Fatal(here.bus, step))
        async with here.process(service):
            await here.append(events[180:])
            await here.settled(service)
            assert_once_in_order(await rows(service), events)
            assert await here.queues() == {f"tidings.audit.{index}" for index in range(3)}
            assert not (await here.layout()).queues_are_old
            bound = {part.queue: set(part.buckets) for part in (await here.layout()).subscriptions}
            assert here.bus.bindings() == bound, "no queue is bound to what belonged to it before"


async def test_a_queue_that_a_process_of_the_old_layout_makes_again_is_taken_away(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        async with here.process(auditing()):
            pass
        await resize(here.database, "audit", 2)
        async with here.process(auditing()):
            await until(here_has(here, {"tidings.audit.0", "tidings.audit.1"}))
        await here.bus.provision(Subscription("audit"))
        await here.bus.provision(Subscription("audit", 2, 3))
        async with here.process(auditing()):
            await until(here_has(here, {"tidings.audit.0", "tidings.audit.1", "tidings.audit.2"}))
        await resize(here.database, "audit", 3)
        await resize(here.database, "audit", 2)
        async with here.process(auditing()):
            await until(here_has(here, {"tidings.audit.0", "tidings.audit.1"}))


async def test_a_process_that_has_not_heard_of_a_resizing_makes_no_queue_of_the_old_layout_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others that heard of it have taken the queue away, and this process may die before it hears of it."""
    monkeypatch.setattr("tidings.hosting.running.LOOK_SECONDS", 3600.0)
    async with site(tmp_path) as here, here.process(auditing()) as running:
        await until(lambda: running.consuming)
        await resize(here.database, "audit", 2)
        here.bus.delete_queue("tidings.audit")
        await until(lambda: isinstance(running.partitions[0].lost, Fenced))
        assert await here.queues() == set()


def here_has(here: Site, queues: set[str]) -> Any:
    async def found() -> bool:
        return await here.queues() == queues

    return found


async def test_a_process_that_declares_another_number_ends_when_the_service_is_resized(tmp_path: Path) -> None:
    async with site(tmp_path) as here:

        async def resized() -> None:
            async with here.process(auditing(partitions=1)):
                await resize(here.database, "audit", 2)
                await asyncio.Event().wait()

        with pytest.raises(ConfigurationError, match=r"declared with partitions=1, but its database .* says 2"):
            async with asyncio.timeout(20):
                await resized()


async def test_one_partition_that_is_fenced_joins_again_alone(tmp_path: Path) -> None:
    """Another process has moved a watermark: the partition of that bucket joins again, and the others go on."""
    service = Service("audit", tables=tables, partitions=2)

    @service.on(Happened)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        await note(session, event)

    async with site(tmp_path) as here, here.process(service) as running:
        await here.append(many(40, 17))
        await here.settled(service)
        key = next(f"k{n}" for n in range(1000) if bucket_of(f"k{n}") in Subscription("audit", 1, 2).buckets)
        last = await here.store.append(f"Happened-{key}", [written(Happened(key=key, n=1))])
        assert await running.handled(last.position, key)
        async with here.database.transaction() as connection:
            moved = watermarks.update().where(watermarks.c.bucket == bucket_of(key)).values(position=last.position - 1)
            await connection.execute(moved)
        await here.append([Happened(key=key, n=2)])
        await until(lambda: [part.joins for part in running.partitions] == [1, 2])
        await here.settled(service)
