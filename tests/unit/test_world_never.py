"""What never ends in a world: lifespans that wait for ever, handlers that ignore their cancellation. Each is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import pytest
from fastapi import FastAPI

from tidings import Event, Service
from tidings.errors import ConfigurationError
from tidings.testing import World
from tidings.testing.world.blocking import Blocked


class Ordered(Event, key="order"):
    order: str


def waiting(at: str) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """A lifespan that waits for ever: at its beginning or at its end."""

    @asynccontextmanager
    async def waits(of: object) -> AsyncIterator[None]:
        if at == "begin":
            await asyncio.Event().wait()
        yield
        if at == "end":
            await asyncio.Event().wait()

    return waits


@pytest.mark.parametrize("at", ["begin", "end"])
async def test_a_lifespan_that_waits_for_ever_is_named(at: str) -> None:
    tasks = asyncio.all_tasks()
    says = rf"the lifespan of service 'one', waiting\.<locals>\.waits \(.*, line \d+\), does not {at}: for 60 s"
    with pytest.raises(ConfigurationError, match=says):
        async with World(Service("one", lifespan=waiting(at))) as world:
            assert at == "end"
            await world.advance(hours=1)
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("restart", [None, 1.0])
async def test_a_killed_service_whose_lifespan_never_ends_is_named(restart: float | None) -> None:
    @asynccontextmanager
    async def lives(of: object) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.Event().wait()

    tasks, service = asyncio.all_tasks(), Service("one", lifespan=lives)
    with pytest.raises(ConfigurationError, match=r"the lifespan of service 'one', .* does not end"):
        async with World(service) as world:
            world.crash(service, restart=restart)
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("at", ["begin", "end"])
async def test_an_application_whose_lifespan_waits_for_ever_is_told_so(at: str) -> None:
    tasks = asyncio.all_tasks()
    with pytest.raises(ConfigurationError, match=rf"the application's lifespan does not {at}: for 65 s"):
        async with World(Service("one")) as world, world.client(FastAPI(lifespan=waiting(at))):
            assert at == "end"
    assert asyncio.all_tasks() == tasks


async def test_a_service_of_an_application_whose_lifespan_waits_for_ever_is_named() -> None:
    tasks, service = asyncio.all_tasks(), Service("one", lifespan=waiting("begin"))
    with pytest.raises(ConfigurationError, match=r"the lifespan of service 'one', .* does not begin"):
        async with World() as world, world.client(FastAPI(lifespan=service.lifespan)):
            pytest.fail("it has begun")
    assert asyncio.all_tasks() == tasks


async def test_a_service_that_starts_again_may_be_cut_off_for_long() -> None:
    service = Service("one")
    async with World(service) as world:
        world.crash(service, restart=None)
        world.cut_off(service, seconds=600)
        await world.start(service)
        assert world.is_well(service)


def test_a_handler_that_ignores_its_cancellation_is_named_and_its_loop_closes() -> None:
    service = Service("one")

    @service.on(Ordered, timeout=2)
    async def deaf(event: Ordered) -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    async def run() -> None:
        async with World(service) as world:
            world.tolerate()
            await world.append("order-1", Ordered(order="1"))
            await world.settled()

    with pytest.raises(Blocked, match=r"handler 'deaf' of service one .* it catches each CancelledError and goes on"):
        asyncio.run(run())
