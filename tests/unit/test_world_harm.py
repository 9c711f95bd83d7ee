"""What a test does to a `World`, and that the promises hold all the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Context, Event, Retry, Service
from tidings.errors import ConfigurationError
from tidings.testing import Unsettled, World


class Counted(Event, key="key"):
    key: str
    n: int


class Noted(Event, key="key"):
    key: str
    n: int


def table(name: str, metadata: sa.MetaData) -> sa.Table:
    return sa.Table(name, metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))


class Pair:
    """`counting` writes a row for each event and emits; `noting` writes what it hears, in the order of coming."""

    def __init__(self, *, rest: float = 0.0) -> None:
        metadata, self.others = sa.MetaData(), sa.MetaData()
        self.rows = table("rows", metadata)
        self.notes = table("notes", self.others)
        self.counting, self.noting = Service("counting", tables=metadata), Service("noting", tables=self.others)
        self.attempts = 0

        @self.counting.on(Counted)
        async def count(event: Counted, context: Context, session: AsyncSession) -> None:
            self.attempts += 1
            await session.execute(self.rows.insert().values(n=event.n))
            await asyncio.sleep(rest)
            context.emit(f"notes-{event.key}", Noted(key=event.key, n=event.n))

        @self.noting.on(Noted)
        async def note(event: Noted, session: AsyncSession) -> None:
            await session.execute(self.notes.insert().values(n=event.n))

        self.count = count

    async def proves(self, world: World, count: int) -> None:
        """Assert that each event has had each effect once, in order."""
        await world.settled()
        expected = list(range(count))
        for service, table in ((self.counting, self.rows), (self.noting, self.notes)):
            async with world.session(service) as session:
                found = (await session.scalars(sa.select(table.c.n).order_by(table.c.id))).all()
            assert list(found) == expected, service.name
        assert [event.n for event in world.events(of=Noted)] == expected


async def tell(world: World, first: int, count: int) -> None:
    for n in range(first, first + count):
        await world.append("counted", Counted(key="1", n=n))


async def test_a_service_that_crashes_in_the_middle_does_everything_once() -> None:
    pair = Pair(rest=5.0)
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 3)
        await asyncio.sleep(7)
        assert pair.attempts == 2, "it is in the middle of the second"
        world.crash(pair.counting)
        await pair.proves(world, 3)
        assert pair.attempts > 3, "what was not committed came again"


async def test_a_service_that_is_dead_for_good_is_named() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        world.crash(pair.counting, restart=None)
        await tell(world, 0, 1)
        with pytest.raises(Unsettled, match=r"1 pending in service 'counting'(?s:.*)counting is dead: the test has"):
            await world.settled()
        await world.start(pair.counting)
        await pair.proves(world, 1)
        with pytest.raises(ConfigurationError, match="runs: only one that was killed"):
            await world.start(pair.counting)


async def test_a_relay_that_crashes_is_followed_by_another() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 2)
        world.crash_relay()
        await tell(world, 2, 2)
        await pair.proves(world, 4)
        assert len(world.logs("relay.leading")) == 2


async def test_a_paused_service_goes_on_where_it_was() -> None:
    pair = Pair(rest=5.0)
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 2)
        await asyncio.sleep(1)
        world.pause(pair.counting, seconds=600)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(300)
        assert pair.attempts == 1
        await pair.proves(world, 2)
        assert asyncio.get_running_loop().time() - began >= 600
        assert pair.attempts == 2, "nothing was done again"


async def test_a_service_that_is_cut_off_comes_back() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 1)
        await world.settled()
        world.cut_off(pair.noting, seconds=20)
        await tell(world, 1, 2)
        await pair.proves(world, 3)
        world.cut_off(pair.noting)
        await tell(world, 3, 1)
        with pytest.raises(Unsettled, match=r"service noting is cut off"):
            await world.settled()
        world.reconnect(pair.noting)
        await pair.proves(world, 4)


async def test_lost_messages_are_read_from_the_log() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        world.lose_next(2)
        await tell(world, 0, 3)
        await pair.proves(world, 3)
        world.lose_next()
        await tell(world, 3, 1)
        await pair.proves(world, 4)
        assert {line["service"] for line in world.logs("pass.started")} == {"counting", "noting"}


async def test_the_last_message_that_is_lost_is_missed_by_the_marker() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 1)
        await world.settled()
        world.lose_next(1)
        await tell(world, 1, 1)
        await pair.proves(world, 2)


async def test_a_message_that_comes_twice_or_in_the_wrong_order_changes_nothing() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        done = await world.append("counted", Counted(key="1", n=0))
        world.duplicate(done)
        await pair.proves(world, 1)
        world.duplicate(done)
        await pair.proves(world, 1)
        world.reorder()
        await tell(world, 1, 4)
        await pair.proves(world, 5)
        assert pair.attempts == 5


async def test_a_handler_fails_as_often_as_the_test_says() -> None:
    pair = Pair()
    async with World(pair.counting, pair.noting) as world:
        world.fail(pair.count, times=2, error=OSError("the disk is full"))
        await tell(world, 0, 1)
        await pair.proves(world, 1)
        assert [line["reason"] for line in world.logs("event.retrying")] == ["OSError: the disk is full"] * 2
        world.fail("counting.count", times=None)
        await tell(world, 1, 1)
        await world.settled()
        (held,) = await world.held(pair.counting)
        assert held.reason == "Injected: the test lets this handler fail"


async def test_held_events_survive_a_crash_and_fire_when_they_are_due() -> None:
    service, done = Service("one"), list[int]()

    @service.on(Counted, retry=Retry(attempts=1))
    async def handle(event: Counted) -> None:
        done.append(event.n)

    async with World(service) as world:
        world.fail(handle, times=3)
        await tell(world, 0, 1)
        await world.settled()
        world.crash(service)
        await world.advance(hours=1)

        assert done == [0]
        assert not await world.held(service)


# ---- web applications ------------------------------------------------------------------


def application(service: Service) -> FastAPI:
    api = FastAPI(lifespan=service.lifespan)

    @api.post("/{key}")
    async def place(key: str) -> dict[str, int]:
        done = await service.append("counted", Counted(key=key, n=0))
        return {"position": done.position}

    return api


@pytest.mark.parametrize("given", [True, False])
async def test_a_web_application_runs_its_service_in_the_world(given: bool) -> None:
    pair = Pair()
    services = (pair.counting, pair.noting) if given else (pair.noting,)
    async with World(*services) as world, world.client(application(pair.counting)) as http:
        assert (await http.post("/1")).status_code == 200
        await pair.proves(world, 1)


async def test_an_application_whose_lifespan_raises_says_so() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("no lifespan today")

    before = asyncio.all_tasks()
    async with World(Service("one")) as world:
        with pytest.raises(OSError, match="no lifespan today"):
            await world.client(broken).__aenter__()
    assert asyncio.all_tasks() == before
