"""Harm that overlaps: what each kind means in each state of a service, one by one and in random orders."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Event, Service
from tidings.errors import ConfigurationError
from tidings.testing import World
from tidings.testing.world.condition import FOR_GOOD, Condition


class Counted(Event, key="key"):
    key: str
    n: int


class Counting:
    """A service that writes a row for each event, and knows how many of its processes live."""

    def __init__(self) -> None:
        metadata = sa.MetaData()
        self.rows = sa.Table(
            "rows", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer)
        )
        self.begun = self.living = self.appended = 0

        @asynccontextmanager
        async def lifespan(service: Service) -> AsyncIterator[None]:
            self.begun += 1
            self.living += 1
            assert self.living == 1, "two processes of one service live at once"
            try:
                yield
            finally:
                self.living -= 1

        self.service = Service("counting", tables=metadata, lifespan=lifespan)

        @self.service.on(Counted)
        async def count(event: Counted, session: AsyncSession) -> None:
            await asyncio.sleep(0.5)
            await session.execute(self.rows.insert().values(n=event.n))

    async def tell(self, world: World) -> None:
        await world.append("counted", Counted(key="1", n=self.appended))
        self.appended += 1

    async def handled(self, world: World) -> list[int]:
        async with world.session(self.service) as session:
            return list((await session.scalars(sa.select(self.rows.c.n).order_by(self.rows.c.id))).all())

    async def proves(self, world: World) -> None:
        """Assert that each event has had its effect once, in order."""
        await world.settled()
        assert await self.handled(world) == list(range(self.appended))


def condition(world: World, service: Service) -> Condition:
    return world._seats[service.name].condition


# ---- one by one ------------------------------------------------------------------------


async def test_a_crash_ends_the_pause_of_its_process_and_the_next_one_is_not_paused() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.pause(counting.service, seconds=600)
        await counting.tell(world)
        world.crash(counting.service)
        await world.advance(seconds=10)
        assert await counting.handled(world) == [0]
        assert (counting.begun, world.is_well(counting.service)) == (2, True)


async def test_a_dead_service_has_nothing_to_pause() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.crash(counting.service, restart=5)
        with pytest.raises(ConfigurationError, match=r"'counting' is dead: .* so it has no process to stop"):
            world.pause(counting.service, seconds=1)
        await world.advance(seconds=4)
        assert not world.is_well(counting.service), "the refused pause has not ended the crash"
        await counting.proves(world)
        await world.advance(seconds=4)
        assert counting.begun == 2


async def test_of_two_pauses_the_one_that_ends_later_counts() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        for first, second in ((60, 10), (10, 60)):
            world.pause(counting.service, seconds=first)
            world.pause(counting.service, seconds=second)
            await counting.tell(world)
            await world.advance(seconds=50)
            assert len(await counting.handled(world)) == counting.appended - 1
            await world.advance(seconds=15)
            await counting.proves(world)
    assert counting.begun == 1


async def test_of_two_cuts_the_one_that_ends_later_counts_and_reconnecting_ends_both() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        for seconds in (60, 10):
            world.cut_off(counting.service, seconds=seconds)
        await world.advance(seconds=50)
        assert condition(world, counting.service).cut_until is not None
        await world.advance(seconds=15)
        assert world.is_well(counting.service)
        world.cut_off(counting.service, seconds=5)
        world.reconnect(counting.service)
        world.cut_off(counting.service)
        await world.advance(seconds=60)
        assert not world.is_well(counting.service), "the end of the first cut is not the end of the second"
        world.reconnect(counting.service)
        await counting.tell(world)
        await counting.proves(world)


async def test_a_service_that_is_cut_off_and_crashes_is_still_cut_off() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.cut_off(counting.service)
        world.crash(counting.service)
        await counting.tell(world)
        await world.advance(minutes=5)
        assert await counting.handled(world) == []
        world.reconnect(counting.service)
        await counting.proves(world)
        assert counting.begun == 2


async def test_a_service_that_is_cut_off_for_good_cannot_be_started() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.crash(counting.service, restart=None)
        world.cut_off(counting.service)
        with pytest.raises(ConfigurationError, match=r"call world\.reconnect\(counting\) before"):
            await world.start(counting.service)
        world.cut_off(counting.service, seconds=5)
        with pytest.raises(ConfigurationError, match=r"call world\.reconnect\(counting\) before"):
            await world.start(counting.service)
        world.reconnect(counting.service)
        world.cut_off(counting.service, seconds=5)
        await world.start(counting.service)
        await counting.tell(world)
        await counting.proves(world)


async def test_a_dead_service_that_is_started_is_not_started_again_when_it_was_to() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.crash(counting.service, restart=10)
        await world.start(counting.service)
        assert world.is_well(counting.service)
        await world.advance(seconds=30)
        await counting.tell(world)
        await counting.proves(world)
        assert counting.begun == 2


async def test_the_last_crash_says_when_a_dead_service_starts() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.crash(counting.service, restart=1)
        world.crash(counting.service, restart=30)
        await world.advance(seconds=20)
        assert counting.begun == 1
        await world.advance(seconds=20)
        assert counting.begun == 2
        world.crash(counting.service)
        world.crash(counting.service, restart=None)
        await world.advance(hours=1)
        assert counting.begun == 2
        await world.start(counting.service)


async def test_two_starts_at_once_are_one() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        world.crash(counting.service, restart=None)
        await asyncio.gather(world.start(counting.service), world.start(counting.service))
        assert counting.begun == 2
        with pytest.raises(ConfigurationError, match="runs: only one that was killed"):
            await world.start(counting.service)


async def test_relays_that_are_killed_twice_are_followed_by_one() -> None:
    counting = Counting()
    async with World(counting.service) as world:
        await counting.tell(world)
        await counting.proves(world)
        world.crash_relay(restart=1)
        world.crash_relay(restart=5)
        await counting.tell(world)
        await counting.proves(world)
        await world.advance(seconds=10)
        assert len(world.logs("relay.leading")) == 2


async def test_a_service_that_cannot_start_again_fails_the_test_and_stays_dead() -> None:
    starts = list[int]()

    @asynccontextmanager
    async def once(service: Service) -> AsyncIterator[None]:
        starts.append(1)
        if len(starts) == 2:
            raise OSError("no gateway today")
        yield

    service = Service("one", lifespan=once)
    async with World(service) as world:
        world.crash(service)
        with pytest.raises(OSError, match="no gateway today"):
            await world.advance(seconds=10)
        assert not world.is_well(service)
        await world.start(service)
        assert world.is_well(service)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, "5", True])
async def test_harm_lasts_a_number_of_seconds(wrong: Any) -> None:
    counting = Counting()
    async with World(counting.service) as world:
        harms: list[Callable[[], None]] = [
            lambda: world.pause(counting.service, seconds=wrong),
            lambda: world.cut_off(counting.service, seconds=wrong),
            lambda: world.crash(counting.service, restart=wrong),
            lambda: world.crash_relay(restart=wrong),
        ]
        for harm in harms:
            with pytest.raises(ConfigurationError, match=r"give virtual seconds, such as"):
                harm()
        for wrong_number in (0, -1, 1.5):
            with pytest.raises(ConfigurationError, match=r"give a whole number, 1 or more"):
                world.lose_next(wrong_number)  # type: ignore[arg-type]
            with pytest.raises(ConfigurationError, match=r"give a whole number, 1 or more"):
                world.fail("count", times=wrong_number)  # type: ignore[arg-type]
        assert world.is_well(counting.service)
        await counting.tell(world)
        await counting.proves(world)


# ---- in random orders ------------------------------------------------------------------


class Model:
    """What is to be so, by a clock of seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rises: float | None = None
        """When the next process starts; None if there is one."""
        self.goes_on = self.connected = 0.0

    def apply(self, what: str, seconds: float | None) -> None:
        end = FOR_GOOD if seconds is None else self.now + seconds
        match what:
            case "wait":
                self.now = end
                if self.rises is not None and self.rises <= self.now:
                    self.rises = None
            case "crash":
                self.rises, self.goes_on = end, 0.0
            case "start":
                self.rises = None
            case "pause":
                self.goes_on = max(self.goes_on, end)
            case "cut off":
                self.connected = end if self.connected <= self.now else max(self.connected, end)
            case "reconnect":
                self.connected = 0.0


WAITS = st.tuples(st.just("wait"), st.sampled_from([2.5, 7.5, 40.0]))
HARM = st.tuples(
    st.sampled_from(["crash", "start", "pause", "cut off", "reconnect", "relay"]),
    st.sampled_from([None, 0.0, 1.0, 6.0, 30.0]),
)


@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.lists(st.one_of(WAITS, HARM), min_size=2, max_size=10))
def test_whatever_is_done_in_whatever_order_each_state_ends_when_it_should(steps: list[Any]) -> None:
    asyncio.run(play(steps))


async def play(steps: list[tuple[str, float | None]]) -> None:
    counting, model = Counting(), Model()
    service = counting.service
    async with World(service) as world:
        for what, seconds in steps:
            dead, cut = model.rises is not None, model.connected > model.now
            if what in ("pause", "relay") and seconds is None:
                continue
            if what == "start" and (not dead or model.connected == FOR_GOOD):
                with pytest.raises(ConfigurationError):
                    await world.start(service)
                continue
            if what == "start" and cut:
                continue  # it takes until it is connected
            if what == "pause" and not world.is_well(service) and condition(world, service).dead:
                with pytest.raises(ConfigurationError):
                    world.pause(service, seconds=seconds or 0)
                continue
            match what:
                case "wait":
                    await asyncio.sleep(seconds or 0)
                case "crash":
                    world.crash(service, restart=seconds)
                case "start":
                    await world.start(service)
                case "pause":
                    world.pause(service, seconds=seconds or 0)
                case "cut off":
                    world.cut_off(service, seconds=seconds)
                case "reconnect":
                    world.reconnect(service)
                case "relay":
                    world.crash_relay(restart=seconds or 0)
            model.apply(what, seconds)
            await counting.tell(world)
            found = condition(world, service)
            assert (found.paused_until is not None) == (model.goes_on > model.now), steps
            assert (found.cut_until is not None) == (model.connected > model.now), steps
            if model.rises is not None:
                assert found.dead, steps
        world.reconnect(service)
        await asyncio.sleep(60)
        if condition(world, service).dead:
            await world.start(service)
        await counting.proves(world)
        assert counting.living == 1
        assert world.is_well(service)
