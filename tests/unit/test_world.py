"""`tidings.testing.World`: what it settles, what it shows, what it raises, and how it ends."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import sleep as nap
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import NO_STREAM, Aggregate, Context, Event, Retry, Service, StreamAppend, evolves
from tidings.delivery.revival import Revival
from tidings.errors import ConfigurationError, HandlerTimeout, StoreUnavailable, WrongExpectedVersion
from tidings.operations.report import Report
from tidings.stores import Ability
from tidings.testing import Unsettled, World


class Ordered(Event, key="order"):
    order: str


class Packed(Event, key="order"):
    order: str


class Shipped(Event, key="order"):
    order: str


class Gateway:
    """A resource."""

    def __init__(self, name: str) -> None:
        self.name = name


class Chain:
    """Two services: packing emits what shipping hears."""

    def __init__(self) -> None:
        metadata = sa.MetaData()
        self.rows = sa.Table("packed", metadata, sa.Column("order", sa.String, primary_key=True))
        self.packing, self.shipping = Service("packing", tables=metadata), Service("shipping")
        self.shipped: list[str] = []

        @self.packing.on(Ordered)
        async def pack(event: Ordered, context: Context, session: AsyncSession) -> None:
            await session.execute(self.rows.insert().values(order=event.order))
            context.emit(f"parcel-{event.order}", Packed(order=event.order))

        @self.shipping.on(Packed)
        async def ship(event: Packed, context: Context) -> None:
            self.shipped.append(event.order)
            context.emit(f"parcel-{event.order}", Shipped(order=event.order))

        self.pack, self.ship = pack, ship


def one(handle: Callable[..., Any], **options: Any) -> Service:
    """A service with one handler of `Ordered`."""
    service = Service("one")
    service.on(Ordered, **options)(handle)
    return service


async def nothing(event: Ordered) -> None:
    """Handle an event without any effect."""


async def test_a_whole_cascade_is_quiet_when_it_is_settled() -> None:
    chain = Chain()
    async with World(chain.packing, chain.shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        report = await world.settled()
        assert report.ok
        assert world.events(of=Shipped) == [Shipped(order="1")]
        assert chain.shipped == ["1"]
        async with world.session(chain.packing) as session:
            assert (await session.scalars(sa.select(chain.rows.c.order))).all() == ["1"]


@pytest.mark.parametrize(
    "trust", [{"TIDINGS_BUS_KEYS": "ab" * 32}, {"TIDINGS_BUS_CONTENT": "log"}, {"TIDINGS_ID_KEYS": "cd" * 32}], ids=str
)
async def test_a_world_trusts_its_bus_as_the_environment_says(
    trust: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in trust.items():
        monkeypatch.setenv(name, value)
    chain = Chain()
    async with World(chain.packing, chain.shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        assert (await world.settled()).ok
        assert chain.shipped == ["1"]
        assert not world.logs("message.refused")


async def test_what_the_log_holds_is_found_by_class_stream_and_author() -> None:
    chain = Chain()
    async with World(chain.packing, chain.shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.append("order-2", Ordered(order="2"))
        await world.settled()
        assert [event.type for event in world.events(stream="parcel-2")] == ["Packed", "Shipped"]
        assert {event.type for event in world.events(by=chain.packing)} == {"Packed"}
        assert {event.type for event in world.emitted(chain.shipping)} == {"Shipped"}
        assert world.events(of=Packed, stream="parcel-1", by=chain.packing) == [Packed(order="1")]
        (first,) = world.events(stream="order-1")
        timeline = await world.timeline(first.position)
        assert await world.timeline(first) == timeline
        assert [event.type for event in timeline.event.tree()] == ["Packed", "Shipped"]
        assert any(line["service"] == "shipping" for line in world.logs("service.joined"))


class Order(Aggregate):
    state = "new"

    def place(self) -> None:
        self.record(Ordered(order=self.id))

    def pack(self) -> None:
        self.record(Packed(order=self.id))

    @evolves(Ordered)
    def _ordered(self, event: Ordered) -> None:
        self.state = "ordered"

    @evolves(Packed)
    def _packed(self, event: Packed) -> None:
        self.state = "packed"


async def test_an_aggregate_is_created_and_changed() -> None:
    service = one(nothing)
    orders = service.repository(Order)
    async with World(service) as world:
        await world.change(orders, "1", Order.place)
        await world.change(orders, "1", Order.pack)
        await world.settled()
        assert (await orders.load("1")).state == "packed"


# ---- errors of handlers ----------------------------------------------------------------


async def test_what_a_handler_raises_is_raised_in_the_test_with_its_own_traceback() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError("no such article")

    async with World(one(refuse)) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(KeyError, match="no such article") as caught:
            await world.settled()
        assert "refuse" in [entry.name for entry in caught.traceback]
        assert "handler 'refuse' of service 'one'" in caught.value.__notes__[0]
        world.tolerate(KeyError)


async def test_errors_of_several_handlers_are_raised_together() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError(event.order)

    async with World(one(refuse)) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.append("order-2", Ordered(order="2"))
        with pytest.raises(ExceptionGroup) as caught:
            await world.settled()
        assert len(caught.value.exceptions) == 2


async def test_what_is_tolerated_is_tried_again_and_held_in_virtual_time() -> None:
    attempts: list[float] = []

    async def refuse(event: Ordered) -> None:
        attempts.append(asyncio.get_running_loop().time())
        if len(attempts) < 7:
            raise KeyError("not yet")

    service = one(refuse, retry=Retry(attempts=3))
    async with World(service) as world:
        world.tolerate(KeyError)
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        assert len(attempts) == 3
        (held,) = await world.held(service)
        assert "not yet" in held.reason
        await world.advance(hours=1)
        assert len(attempts) == 7
        assert attempts == sorted(attempts)
        assert not await world.held(service)
        assert (await world.settled()).ok


async def test_tolerating_one_handler_does_not_excuse_another() -> None:
    service = Service("one")

    @service.on(Ordered)
    async def first(event: Ordered) -> None:
        raise KeyError("first")

    @service.on(Ordered)
    async def second(event: Ordered) -> None:
        raise ValueError("second")

    async with World(service) as world:
        world.tolerate(first)
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(ValueError, match="second"):
            await world.settled()
        world.tolerate("one.second")


async def test_what_is_held_and_not_tolerated_fails_at_once_and_says_who_stands_where() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError("no such article")

    async with World(one(refuse, retry=Retry(attempts=1))) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(KeyError):
            await world.settled()
        with pytest.raises(Unsettled, match=r"1 held in service 'one'(?s:.*)no such article"):
            await world.settled()
        world.tolerate(KeyError)


async def test_a_dead_letter_fails_the_test_unless_it_is_tolerated() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError("never")

    service = one(refuse, retry=Retry(permanent=(KeyError,)))
    async with World(service) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(KeyError):
            await world.settled()
        with pytest.raises(Unsettled, match="1 dead in service 'one'"):
            await world.settled()
    async with World(service) as world:
        world.tolerate(refuse)
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        (letter,) = await world.dead(service)
        assert letter.handler == "refuse"


async def test_an_unknown_handler_is_named_with_those_that_there_are() -> None:
    chain = Chain()
    async with World(chain.packing, chain.shipping) as world:
        with pytest.raises(ConfigurationError, match=r"'unpack' is no handler .*packing\.pack, shipping\.ship"):
            world.tolerate("unpack")


# ---- time ------------------------------------------------------------------------------


async def test_a_handler_that_sleeps_costs_no_time() -> None:
    began = time.monotonic()

    async def rest(event: Ordered) -> None:
        await asyncio.sleep(3600)

    async with World(one(rest, timeout=4000)) as world:
        loop = asyncio.get_running_loop()
        before, wall = loop.time(), time.time()
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        assert loop.time() - before >= 3600
        assert time.time() - wall >= 3600
    assert time.monotonic() - began < 3000
    assert abs(loop.time() - time.monotonic()) < 3000, "the loop has its own time again"


async def test_a_handler_that_waits_for_what_never_comes_is_over_its_time_at_once() -> None:
    async def wait(event: Ordered) -> None:
        await asyncio.Event().wait()

    async with World(one(wait)) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(HandlerTimeout, match="wait"):
            await world.settled()
        world.tolerate(wait)


async def test_a_sleep_that_blocks_the_loop_is_named() -> None:
    async def block(event: Ordered) -> None:
        time.sleep(86_400)  # noqa: ASYNC251

    async with World(one(block)) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(Exception, match=r"handler 'block' of service 'one' calls time\.sleep\(86400\)"):
            await world.settled()
        world.tolerate(block)


async def test_a_sleep_that_was_imported_by_its_name_is_named_too() -> None:
    async def block(event: Ordered) -> None:
        nap(86_400)  # noqa: ASYNC251

    async with World(one(block)) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(Exception, match=r"handler 'block' of service 'one' calls time\.sleep\(86400\)"):
            await world.settled()
        world.tolerate(block)


@pytest.mark.parametrize("sleep", [lambda: time.sleep(86_400), lambda: nap(86_400)], ids=["time.sleep", "imported"])
async def test_a_plain_handler_sleeps_in_virtual_time_too(sleep: Callable[[], None]) -> None:
    done: list[str] = []

    def rest(event: Ordered) -> None:
        sleep()
        done.append(event.order)

    async with World(one(rest, timeout=100_000)) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        assert done == ["1"]


async def test_the_real_sleep_is_back_after_a_world_also_where_it_was_imported_meanwhile() -> None:
    real, late = time.sleep, ModuleType("imported_meanwhile")
    with mock.patch.dict(sys.modules, {late.__name__: late}):
        async with World():
            assert nap is time.sleep is not real
            late.__dict__["sleep"] = time.sleep
        assert late.__dict__["sleep"] is nap is time.sleep is real


async def test_timers_of_lifespans_and_of_the_test_fire_in_order_over_months() -> None:
    fired: list[str] = []

    @asynccontextmanager
    async def hourly(service: Service) -> AsyncIterator[None]:
        async def tick() -> None:
            for _ in range(3):
                await asyncio.sleep(30 * 86_400)
                fired.append("month")

        task = asyncio.create_task(tick())
        yield
        task.cancel()

    service = Service("one", lifespan=hourly)
    service.on(Ordered)(nothing)
    async with World(service) as world:
        asyncio.get_running_loop().call_later(45 * 86_400, fired.append, "test")
        await world.advance(days=50)
        assert fired == ["month", "test"]
        await world.advance(days=50)
        assert fired == ["month", "test", "month", "month"]


# ---- resources -------------------------------------------------------------------------


@asynccontextmanager
async def unreachable(service: Service) -> AsyncIterator[Gateway]:
    raise OSError("there is no gateway here")
    yield Gateway("real")


async def test_resources_are_replaced_by_type_and_their_lifespan_is_not_needed() -> None:
    used: list[str] = []

    async def pay(event: Ordered, gateway: Gateway) -> None:
        used.append(gateway.name)

    service = Service("one", lifespan=unreachable)
    service.on(Ordered)(pay)
    async with World(service, resources={Gateway: Gateway("fake")}) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        assert used == ["fake"]


# ---- misuse ----------------------------------------------------------------------------


async def test_a_service_whose_lifespan_raises_keeps_the_world_from_opening_and_leaves_nothing() -> None:
    service = Service("one", lifespan=unreachable)
    chain = Chain()
    before = asyncio.all_tasks()
    with pytest.raises(OSError, match="there is no gateway here"):
        async with World(chain.packing, service):
            pytest.fail("it is open")
    assert asyncio.all_tasks() == before
    assert abs(asyncio.get_running_loop().time() - time.monotonic()) < 3000
    async with World(chain.packing):
        pass


async def test_a_world_opens_once() -> None:
    world = World(one(nothing))
    async with world:
        pass
    with pytest.raises(ConfigurationError, match="was opened before"):
        await world.__aenter__()


async def test_two_worlds_in_one_loop_are_refused() -> None:
    async with World(one(nothing)):
        with pytest.raises(ConfigurationError, match="another World is open"):
            await World(Service("two")).__aenter__()


async def test_a_service_named_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="name each service once"):
        await World(Service("one"), Service("one")).__aenter__()


async def test_a_test_that_ends_with_events_under_way_fails() -> None:
    chain = Chain()
    with pytest.raises(Unsettled, match=r"end it with 'await world\.settled\(\)'"):
        async with World(chain.packing) as world:
            await asyncio.sleep(60)
            await world.append("order-1", Ordered(order="1"))


async def test_an_error_that_was_heard_excuses_nothing_else() -> None:
    async def refuse(event: Ordered) -> None:
        if event.order == "1":
            raise KeyError("heard")

    with pytest.raises(Unsettled, match="end it with"):
        async with World(one(refuse)) as world:
            await world.append("order-1", Ordered(order="1"))
            with pytest.raises(KeyError):
                await world.settled()
            await world.append("order-2", Ordered(order="2"))


async def test_all_that_is_held_is_returned() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError("never")

    service = one(refuse, retry=Retry(attempts=1))
    async with World(service) as world:
        world.tolerate(refuse)
        for number in range(30):
            await world.append(f"order-{number}", Ordered(order=str(number)))
        await world.settled()
        assert len(await world.held(service)) == 30


async def test_a_test_that_ends_without_hearing_of_an_error_fails() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError("unheard")

    with pytest.raises(KeyError, match="unheard"):
        async with World(one(refuse)) as world:
            await world.append("order-1", Ordered(order="1"))
            await asyncio.sleep(1)


async def test_the_error_of_a_test_is_not_hidden_by_what_it_leaves_behind() -> None:
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        async with World(Chain().packing) as world:
            await world.append("order-1", Ordered(order="1"))
            raise ZeroDivisionError
    assert asyncio.all_tasks() == before


async def test_a_test_that_is_cancelled_leaves_nothing() -> None:
    entered = asyncio.Event()
    before = asyncio.all_tasks()

    async def run() -> None:
        async with World(Chain().packing):
            entered.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(run())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    assert abs(asyncio.get_running_loop().time() - time.monotonic()) < 3000


def test_it_works_under_asyncio_run() -> None:
    async def run() -> None:
        chain = Chain()
        async with World(chain.packing, chain.shipping) as world:
            await world.append("order-1", Ordered(order="1"))
            await world.settled()
            assert chain.shipped == ["1"]

    asyncio.run(run())


# ---- what time costs -------------------------------------------------------------------


def sleeper(seconds: float, look: Callable[[], None]) -> Service:
    """A service whose lifespan looks at something again and again."""

    @asynccontextmanager
    async def lifespan(service: Service) -> AsyncIterator[None]:
        async def tick() -> None:
            while True:
                look()
                await asyncio.sleep(seconds)

        task = asyncio.create_task(tick())
        yield
        task.cancel()

    service = Service("one", lifespan=lifespan)
    service.on(Ordered)(nothing)
    return service


async def test_a_world_looks_at_its_services_again_only_after_something_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, reports, searches = list[float](), list[float](), list[float]()
    verify, find = World.verify, Revival._find

    async def counted(world: World) -> Report:
        reports.append(time.time())
        return await verify(world)

    async def searched(self: Revival, *args: Any) -> Any:
        searches.append(time.time())
        return await find(self, *args)

    async with World(sleeper(60, lambda: looks.append(time.time()))) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        monkeypatch.setattr(World, "verify", counted)
        monkeypatch.setattr(Revival, "_find", searched)
        looks.clear()
        await world.advance(hours=10)
        end = time.time()
        assert len(looks) == 600
        assert len(reports) < 10
        assert 0 < len(searches) < 10
        assert end - searches[-1] < 2  # the last jump lets everybody look once
        await world.append("order-2", Ordered(order="2"))
        assert await world.settled() == await verify(world)  # of now, not of the last look


async def test_held_events_come_back_in_time_beside_a_task_that_sleeps_briefly() -> None:
    tried = list[float]()

    async def refuse(event: Ordered) -> None:
        tried.append(time.time())
        if len(tried) < 6:
            raise KeyError("not yet")

    service = sleeper(7, lambda: None)
    service.on(Ordered, retry=Retry(attempts=1))(refuse)
    async with World(service) as world:
        world.tolerate(KeyError)
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        await world.advance(minutes=30)
        assert len(tried) == 6
        assert await world.held(service) == []


async def test_who_wakes_a_world_thousands_of_times_is_named() -> None:
    async with World(sleeper(0.2, lambda: None)) as world:
        with pytest.warns(UserWarning, match="5,000 timers in .* task 'tick' of service one sleeps 0.2 s"):
            await world.advance(minutes=20)


async def test_events_over_several_streams_are_handled_and_none_of_an_append_that_is_refused() -> None:
    chain = Chain()
    async with World(chain.packing, chain.shipping) as world:
        done = await chain.packing.append_several(
            StreamAppend("order-1", [Ordered(order="1")], NO_STREAM), StreamAppend("order-2", [Ordered(order="2")])
        )
        assert dict(done.versions) == {"order-1": 0, "order-2": 0}
        with pytest.raises(WrongExpectedVersion, match="order-1"):
            await chain.packing.append_several(
                StreamAppend("order-3", [Ordered(order="3")]), StreamAppend("order-1", expected=NO_STREAM)
            )
        world.cut_off(chain.packing)
        with pytest.raises(StoreUnavailable, match="is cut off"):
            await chain.packing.append_several(StreamAppend("order-4", [Ordered(order="4")]))
        world.reconnect(chain.packing)
        assert await chain.packing.running_now.store.abilities() == frozenset(Ability)
        await world.settled()
        assert sorted(chain.shipped) == ["1", "2"]
