"""Common slips in the use of a world: each is refused at once, with what to write instead."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast
from unittest.mock import create_autospec

import pytest
import sqlalchemy as sa

from tidings import Aggregate, Event, Runtime, Service, evolves
from tidings.errors import ConfigurationError
from tidings.testing import World


class Ordered(Event, key="order"):
    order: str


class Order(Aggregate):
    def place(self) -> None:
        self.record(Ordered(order=self.id))

    @evolves(Ordered)
    def _ordered(self, event: Ordered) -> None: ...


class Mailer:
    def send(self) -> str:
        return "real"


class Quiet(Mailer):
    def send(self) -> str:
        return "fake"


class Printer(Protocol):
    def print(self) -> None: ...


class Paper:
    def print(self) -> None: ...


metadata = sa.MetaData()
rows = sa.Table("rows", metadata, sa.Column("key", sa.String, primary_key=True))


@asynccontextmanager
async def lifespan(service: Service) -> Any:
    yield Mailer()


def made() -> Service:
    service = Service("shop", tables=metadata)

    @service.on(Ordered)
    async def handle(event: Ordered) -> None: ...

    return service


def wrong(value: object) -> Any:
    """Give what type checkers would refuse."""
    return cast("Any", value)


# ---- making and opening ----------------------------------------------------------------


def test_services_are_given_one_by_one_as_objects() -> None:
    with pytest.raises(ConfigurationError, match=r"World\(\[Service\('shop'\)\]\): give the services one by one"):
        World(wrong([made()]))
    with pytest.raises(ConfigurationError, match=r"World\('svc:s'\): that is no service"):
        World(wrong("svc:s"))


async def test_a_world_without_any_service_has_nothing_to_wait_for() -> None:
    async with World() as world:
        with pytest.raises(ConfigurationError, match=r"settled\(\): this World has no service"):
            await world.settled()
        with pytest.raises(ConfigurationError, match=r"advance\(\): this World has no service"):
            await world.advance(days=1)


USES: dict[str, Callable[[World, Service], Any]] = {
    "append": lambda world, service: world.append("order-1", Ordered(order="1")),
    "change": lambda world, service: world.change(service.repository(Order), "1", Order.place),
    "settled": lambda world, service: world.settled(),
    "advance": lambda world, service: world.advance(days=1),
    "verify": lambda world, service: world.verify(),
    "events": lambda world, service: world.events(),
    "store": lambda world, service: world.store,
    "held": lambda world, service: world.held(service),
    "dead": lambda world, service: world.dead(service),
    "timeline": lambda world, service: world.timeline(1),
    "crash": lambda world, service: world.crash(service),
    "crash_relay": lambda world, service: world.crash_relay(),
    "lose_next": lambda world, service: world.lose_next(),
    "client": lambda world, service: world.client(wrong(None)),
}


@pytest.mark.parametrize("made", [World, Runtime])
def test_a_with_that_lacks_its_async_says_what_to_write(made: Callable[[], Any]) -> None:
    name = made.__name__
    with pytest.raises(TypeError, match=rf"write 'async with {name}\(\.\.\.\) as {name.lower()}:'"), made():
        pass


@pytest.mark.parametrize("name", USES)
async def test_a_world_is_used_within_its_block(name: str) -> None:
    async def use(world: World) -> None:
        found = USES[name](world, service)
        if asyncio.iscoroutine(found):
            await found

    service = made()
    world = World(service)
    with pytest.raises(ConfigurationError, match="is not open: write 'async with World"):
        await use(world)
    async with world:
        pass
    with pytest.raises(ConfigurationError, match="is closed: use it within its block"):
        await use(world)


# ---- what is asked of it ---------------------------------------------------------------


async def test_arguments_that_cannot_be_meant_are_refused() -> None:
    service = made()
    orders = service.repository(Order)
    async with World(service) as world:
        with pytest.raises(ConfigurationError, match="the stream's name comes first"):
            await world.append(wrong(Ordered(order="1")), wrong("order-1"))
        with pytest.raises(ConfigurationError, match=r"events\(of='Ordered'\): give the class"):
            world.events(of=wrong("Ordered"))
        with pytest.raises(ConfigurationError, match=r"events\('shop'\): that is no service"):
            world.events(by=wrong("shop"))
        with pytest.raises(ConfigurationError, match=r"change\(Order, \.\.\.\): give the repository"):
            await world.change(wrong(Order), "1", Order.place)
        with pytest.raises(ConfigurationError, match=r"change\(orders, '1001', Order\.place\)"):
            await world.change(orders, "1", wrong(Order()).place)
        with pytest.raises(ConfigurationError, match="name a method of the aggregate"):
            await world.change(orders, "1", wrong("place"))
        with pytest.raises(ConfigurationError, match=r"world\('shop'\): that is no service"):
            world.crash(wrong("shop"))
        with pytest.raises(ConfigurationError, match=r"Service\('shop'\) is no handler of a service"):
            world.fail(wrong(service))


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
async def test_time_goes_forward_by_a_number_of_seconds(seconds: float) -> None:
    async with World(made()) as world:
        with pytest.raises(ConfigurationError, match="time only goes forward"):
            await world.advance(seconds=seconds)
        with pytest.raises(ConfigurationError, match="say how much"):
            await world.advance()


async def test_waiting_within_a_session_is_refused_and_the_session_is_named() -> None:
    service = made()
    async with World(service) as world:
        async with world.session(service) as session:
            await session.execute(rows.insert().values(key="1"))
            await world.append("order-1", Ordered(order="1"))
            for wait in (world.settled, lambda: world.advance(days=1), lambda: world.held(service)):
                with pytest.raises(
                    ConfigurationError, match=r"end the block of world\.session\(shop\) before you call"
                ):
                    await wait()
            with pytest.raises(ConfigurationError, match="before you enter another"):
                async with world.session(service):
                    pass
        await world.settled()
        async with world.session(service) as session:
            assert (await session.scalars(sa.select(rows.c.key))).all() == ["1"]


async def test_several_failing_handlers_are_named_in_the_title() -> None:
    async def refuse(event: Ordered) -> None:
        raise KeyError(event.order)

    services = Service("shop"), Service("stock")
    for service in services:
        service.on(Ordered)(refuse)
    async with World(*services) as world:
        await world.append("order-1", Ordered(order="1"))
        with pytest.raises(ExceptionGroup, match=r"handlers failed: shop\.refuse, stock\.refuse"):
            await world.settled()


# ---- resources -------------------------------------------------------------------------


def mailing(sent: list[str]) -> Service:
    service = Service("mailing", lifespan=lifespan)

    @service.on(Ordered)
    async def mail(event: Ordered, mailer: Mailer) -> None:
        sent.append(mailer.send())

    return service


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (
            {Quiet: Quiet()},
            r"\{Quiet: ...\}: no handler of mailing asks for it.* they ask: Mailer \(by mailing\.mail\)",
        ),
        ({"Mailer": Quiet()}, r"\{'Mailer': ...\}: no handler"),
        ({Mailer: Quiet}, r"Quiet is a class.* write \{Mailer: Quiet\(\.\.\.\)\}"),
        ({Mailer: 3}, r"3 is no Mailer, for which handler 'mailing\.mail' asks"),
    ],
)
async def test_a_resource_that_would_replace_nothing_or_is_of_another_type_is_refused(
    resources: dict[Any, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        World(mailing([]), resources=resources)


async def test_subclasses_mocks_and_whatever_a_protocol_may_mean_are_resources() -> None:
    sent = list[str]()
    mock = create_autospec(Mailer, instance=True)
    mock.send.return_value = "mock"
    for fake in (Quiet(), mock):
        async with World(mailing(sent), resources={Mailer: fake}) as world:
            await world.append("order-1", Ordered(order="1"))
            await world.settled()
    assert sent == ["fake", "mock"]
    service = Service("printing")

    @service.on(Ordered)
    async def show(event: Ordered, printer: Printer) -> None:
        printer.print()

    async with World(service, resources={Printer: Paper()}) as world:
        await world.append("order-1", Ordered(order="1"))
        assert (await world.settled()).ok
