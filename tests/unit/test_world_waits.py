"""What a test waits for in a world: a certain event, time as handlers see it, and a handler that blocks the loop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from types import FrameType
from typing import Any

import pytest

from tidings import Context, Event, Service
from tidings.errors import ConfigurationError
from tidings.testing import Unsettled, World
from tidings.testing.world import blocking


class Ordered(Event, key="order"):
    order: str


class Packed(Event, key="order"):
    order: str


class Shipped(Event, key="order"):
    order: str


def chain() -> tuple[Service, Service]:
    """Packing emits what shipping hears, and shipping emits, too."""
    packing, shipping = Service("packing"), Service("shipping")

    @packing.on(Ordered)
    async def pack(event: Ordered, context: Context) -> None:
        if event.order == "0":
            raise ValueError("there is no order 0")
        context.emit(f"parcel-{event.order}", Packed(order=event.order))

    @shipping.on(Packed)
    async def ship(event: Packed, context: Context) -> None:
        context.emit(f"parcel-{event.order}", Shipped(order=event.order))

    return packing, shipping


def one(handler: Callable[..., Any]) -> Service:
    service = Service("one")
    service.on(Ordered)(handler)
    return service


# ---- a certain event -----------------------------------------------------------------


async def test_a_test_goes_on_when_a_certain_event_is_there_and_others_are_under_way() -> None:
    packing, shipping = chain()
    async with World(packing, shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        assert await world.until(Packed) == Packed(order="1")
        assert world.events(of=Shipped) == []
        assert await world.until(Shipped, by=shipping, stream="parcel-1") == Shipped(order="1")
        assert await world.until(Packed) == Packed(order="1"), "it is there already"
        await world.settled()


async def test_an_event_is_chosen_by_what_is_in_it() -> None:
    packing, shipping = chain()
    async with World(packing, shipping) as world:
        for number in range(3):
            await world.append(f"order-{number + 1}", Ordered(order=str(number + 1)))
        assert await world.until(Shipped, where=lambda event: event.order == "3") == Shipped(order="3")
        await world.settled()


async def test_an_event_that_never_comes_is_not_waited_for() -> None:
    packing, shipping = chain()
    async with World(packing, shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        tasks = asyncio.all_tasks()
        says = "no Shipped of stream 'parcel-2' by service 'shipping' for which `where` is true has come, and nothing "
        says += "moves any more; the log has 1 Ordered, 1 Packed, 1 Shipped"
        with pytest.raises(Unsettled, match=says):
            await world.until(Shipped, stream="parcel-2", by=shipping, where=lambda event: True)
        assert asyncio.all_tasks() == tasks


async def test_an_error_on_the_way_is_raised_where_a_test_waits_for_an_event() -> None:
    packing, shipping = chain()
    async with World(packing, shipping) as world:
        await world.append("order-0", Ordered(order="0"))
        with pytest.raises(ValueError, match="there is no order 0"):
            await world.until(Packed)


async def test_a_slip_in_what_is_waited_for_is_answered_at_once() -> None:
    packing, _ = chain()
    async with World(packing) as world:
        with pytest.raises(ConfigurationError, match="give the class of the events"):
            await world.until("Packed")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="this World is closed"):
        await world.until(Packed)


async def test_a_service_that_is_deployed_later_reads_what_was_there() -> None:
    packing, shipping = chain()
    async with World(packing) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        await world.start(shipping)
        await world.settled()
        assert world.events(of=Shipped) == [Shipped(order="1")]
        with pytest.raises(ConfigurationError, match="'shipping' runs"):
            await world.start(shipping)


async def test_a_service_that_cannot_start_later_is_not_there() -> None:
    packing, _ = chain()
    broken = Service("broken", lifespan=lambda service: 1 / 0)  # type: ignore[arg-type, return-value]
    async with World(packing) as world:
        with pytest.raises(ZeroDivisionError) as raised:
            await world.start(broken)
        assert "service 'broken' could not start in this World" in raised.value.__notes__[0]
        await world.append("order-1", Ordered(order="1"))
        assert [part.service for part in (await world.settled()).services] == ["packing"]


# ---- time, as a handler sees it ----------------------------------------------------------


@pytest.mark.parametrize("travels", [True, False])
async def test_a_handler_sees_the_time_of_the_world_also_by_datetime_now_where_time_machine_is(
    travels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not travels:
        monkeypatch.setitem(sys.modules, "time_machine", None)
    follows = travels and find_spec("time_machine") is not None
    seen: list[datetime] = []

    async def look(event: Ordered, context: Context) -> None:
        seen.extend(
            (
                context.event.recorded_at,
                datetime.fromtimestamp(time.time(), UTC),
                datetime.fromtimestamp(time.time_ns() / 1e9, UTC),
                datetime.now(UTC),
            )
        )

    began = datetime.now(UTC)
    async with World(one(look)) as world:
        await world.advance(days=30)
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
    assert all(moment - began >= timedelta(days=30) for moment in seen[:3])
    assert (seen[3] - began >= timedelta(days=30)) == follows
    for now in datetime.fromtimestamp(time.time_ns() / 1e9, UTC), datetime.now(UTC):
        assert now - began < timedelta(days=1), "it is given back"


# ---- a handler that blocks the loop ------------------------------------------------------


async def spins(event: Ordered) -> None:
    while True:
        pass


async def receives(event: Ordered) -> None:
    one_end, other_end = socket.socketpair()
    with one_end, other_end:
        one_end.recv(1)


@pytest.mark.parametrize("blocks", [spins, receives])
async def test_a_handler_that_blocks_the_loop_is_interrupted_and_named(
    blocks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "LOOK", 0.05)
    tasks, threads = asyncio.all_tasks(), threading.enumerate()
    says = rf"handler '{blocks.__name__}' of service 'one' has kept the event loop .* stands in {blocks.__name__} \("
    with pytest.raises(blocking.Blocked, match=says):
        async with World(one(blocks)) as world:
            await world.append("order-1", Ordered(order="1"))
            await world.settled()
    assert asyncio.all_tasks() == tasks
    assert threading.enumerate() == threads
    assert blocking.SIGNAL is not None
    assert signal.getsignal(blocking.SIGNAL) is signal.SIG_DFL


async def test_who_debugs_a_handler_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "LOOK", 0.02)
    interrupts = list[int]()
    interrupt = blocking.Guard._interrupt

    def counted(guard: blocking.Guard, number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        interrupt(guard, number, frame)

    monkeypatch.setattr(blocking.Guard, "_interrupt", counted)
    debugger: dict[str, Any] = {"__name__": "pdb"}
    exec("def interaction(goes_on):\n    while not goes_on(): pass\n", debugger)

    async def stands(event: Ordered) -> None:
        debugger["interaction"](lambda: len(interrupts) >= 3)

    async with World(one(stands)) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
