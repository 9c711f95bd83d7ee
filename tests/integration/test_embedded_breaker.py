"""A handler that always fails is paused alone: its events are held and tried key by key, everything else goes on."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import Followed, Happened, assert_once_in_order, audit, many, note, tables
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import held
from tidings.hosting.running import RunningService
from tidings.operations.report import ServiceReport
from tidings.testing import World


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each virtual second costs a look at everything."""
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", (0.05, 0.2))


def process(world: World) -> RunningService:
    running = world._seats["audit"].running
    assert running is not None
    return running


async def append(world: World, *events: Happened | Followed) -> None:
    for event in events:
        await world.append(f"{type(event).__name__.lower()}-{event.key}", event)


async def until(world: World, condition: Callable[[ServiceReport], object]) -> None:
    """Let virtual time pass until something is so."""
    async with asyncio.timeout(100_000):
        while not condition((await world.verify()).services[0]):
            await asyncio.sleep(0.2)


async def rows(world: World, service: Service) -> list[tuple[str, int]]:
    async with world.session(service) as session:
        query = sa.select(audit.c.key, audit.c.n).order_by(audit.c.id)
        return [(key, n) for key, n in (await session.execute(query)).all()]


class Trouble:
    """Makes the handler of `Happened` fail for these keys; without keys, for all."""

    def __init__(self, *keys: str) -> None:
        self.keys: set[str] | None = set(keys) or None
        self.mended = False
        self.tried: list[str] = []

    def meet(self, event: Happened) -> None:
        self.tried.append(event.key)
        if not self.mended and (self.keys is None or event.key in self.keys):
            raise LookupError("no such appointment")


def two_handlers(trouble: Trouble, *, transactional: bool = True, retry: Retry | None = None) -> Service:
    service = Service("audit", tables=tables)
    retry = retry or Retry(attempts=3, delay=0.01, hold=Hold(attempts=50, delay=0.05, maximum=0.2))

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        trouble.meet(event)

    async def without(event: Happened) -> None:
        trouble.meet(event)

    service.on(Happened, name="bad", retry=retry)(with_session if transactional else without)

    @service.on(Followed)
    async def good(event: Followed, session: AsyncSession) -> None:
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    return service


@pytest.mark.parametrize("transactional", [True, False])
async def test_other_handlers_and_keys_go_on_while_one_handler_is_paused(transactional: bool) -> None:
    trouble = Trouble()
    service = two_handlers(trouble, transactional=transactional)
    good = [Followed(key=f"good-{n % 7}", n=n) for n in range(50)]
    async with World(service) as world:
        world.tolerate("bad")
        await append(world, *(Happened(key=f"bad-{n}", n=n) for n in range(40)))
        await until(world, lambda part: process(world).paused)
        assert list(process(world).paused_handlers) == ["bad"]
        assert "no such appointment" in (process(world).paused or "")
        await until(world, lambda part: part.held_count == 40)
        tried = len(trouble.tried)
        await append(world, *(Happened(key=f"late-{n}", n=n) for n in range(100)))
        await until(world, lambda part: part.held_count == 140)
        assert len(trouble.tried) - tried < 40, "they are held without an attempt, but for some trials"
        await append(world, *good)
        await world.settled()
        assert sorted(await rows(world, service)) == sorted((event.key, event.n) for event in good)
        report = (await world.verify()).services[0]
        assert (report.pending_count, report.held_count) == (0, 140), "what is not tried is held, and can be skipped"
        assert process(world).paused is not None


async def test_trials_go_from_key_to_key_and_each_says_what_failed_and_what_is_next() -> None:
    """Half of the handler's events can succeed: those that cannot do not hide a recovery."""
    bad = [f"bad-{n}" for n in range(20)]
    trouble = Trouble(*bad)
    service = two_handlers(trouble)
    async with World(service) as world:
        world.tolerate("bad")
        await append(world, *(Happened(key=key) for key in bad))
        await until(world, lambda part: process(world).paused)
        await until(world, lambda part: len(world.logs("handler.trial_failed")) >= 6)
        await append(world, *(Happened(key=f"good-{n}") for n in range(20)))
        await until(world, lambda part: part.pending_count == 0 and part.held_count == 20)
        assert len(await rows(world, service)) == 20
        trouble.mended = True
        await until(world, lambda part: part.ok)
        assert len(await rows(world, service)) == 40
        assert process(world).paused is None
        trials = world.logs("handler.trial_failed")
        assert len({line["key"] for line in trials[:6]}) >= 5, "each trial is of another key"
        for line in trials:
            assert line["handler"] == "bad"
            assert line["reason"] == "LookupError: no such appointment"
            assert line["level"] == "warning"
            assert line["next_trial_in"] > 0
            assert {"event_id", "stream", "position", "trial", "next"} <= line.keys()
        assert world.logs("handler.paused")[0]["handler"] == "bad"
        assert world.logs("handler.resumed")


@pytest.mark.parametrize("hold", [Hold(attempts=2, delay=0.01), None])
async def test_trials_count_so_that_poison_is_dead_in_the_end(hold: Hold | None) -> None:
    trouble = Trouble()
    service = two_handlers(trouble, retry=Retry(attempts=2, delay=0.01, hold=hold, hold_key=False))
    async with World(service) as world:
        world.tolerate("bad")
        events = [Happened(key=f"bad-{n}") for n in range(24)]
        await append(world, *events)
        await until(world, lambda part: process(world).paused)
        await until(world, lambda part: part.dead_count == len(events))
        assert await world.held(service) == []
        expected = 2 + (hold.attempts if hold else 0)
        letters = await world.dead(service)
        assert {letter.attempts for letter in letters} <= {2, expected, expected - 1}
        assert all(letter.handler == "bad" for letter in letters)
        assert all(trouble.tried.count(event.key) >= 2 for event in events), "each had its quick attempts, too"


async def test_each_handler_keeps_its_order_per_key_while_one_is_paused() -> None:
    """Events of one key have two handlers: neither waits for the other, and both keep their order."""
    trouble = Trouble()
    service = two_handlers(trouble)
    numbers: dict[str, int] = defaultdict(int)
    events: list[Happened | Followed] = []
    for n in range(400):
        key = f"k{n * 7919 % 40}"
        kind: Any = Happened if n * 31 % 3 else Followed
        events.append(kind(key=key, n=numbers[key]))
        numbers[key] += 1
    async with World(service) as world:
        world.tolerate("bad")
        for event in events[:200]:
            await world.append(f"mixed-{event.key}", event)
        await until(world, lambda part: process(world).paused)
        for event in events[200:300]:
            await world.append(f"mixed-{event.key}", event)
        await until(world, lambda part: len(trouble.tried) > 80)
        trouble.mended = True
        for event in events[300:]:
            await world.append(f"mixed-{event.key}", event)
        await until(world, lambda part: part.ok)
        found = await rows(world, service)
        for kind in (Happened, Followed):
            own = {(event.key, event.n) for event in events if isinstance(event, kind)}
            expected = [Happened(key=key, n=n) for key, n in own]
            assert_once_in_order([row for row in found if row in own], expected)
        assert len(found) == len(events)


async def test_a_paused_handler_whose_events_were_all_dropped_is_tried_with_the_next_one() -> None:
    trouble = Trouble()
    service = two_handlers(trouble)
    async with World(service) as world:
        world.tolerate("bad")
        await append(world, *(Happened(key=f"bad-{n}") for n in range(30)))
        await until(world, lambda part: process(world).paused)
        await until(world, lambda part: part.held_count == 30)
        async with world.session(service) as session:
            await session.execute(held.delete())
        trouble.mended = True
        await until(world, lambda part: process(world).paused)
        await append(world, Happened(key="new", n=1))
        await until(world, lambda part: part.ok)
        assert await rows(world, service) == [("new", 1)]
        assert process(world).paused is None


@pytest.mark.parametrize("transactional", [True, False])
async def test_what_was_held_for_a_paused_handler_outlives_a_restart(transactional: bool) -> None:
    trouble, events = Trouble(), many(60, 30)
    service = two_handlers(trouble, transactional=transactional)
    async with World(service) as world:
        world.tolerate("bad")
        await append(world, *events)
        await until(world, lambda part: part.held_count == 60)
        world.crash(service)
        trouble.mended = True
        trouble.tried.clear()
        await until(world, lambda part: part.ok)
        if transactional:
            assert_once_in_order(await rows(world, service), events)
        assert len(trouble.tried) == len(events)


async def test_context_attempt_counts_trials() -> None:
    seen: dict[int, list[int]] = defaultdict(list)
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=3, delay=0.01), hold_key=False))
    async def bad(event: Happened, context: Context) -> None:
        seen[context.position].append(context.attempt)
        raise LookupError

    async with World(service) as world:
        world.tolerate(bad)
        await append(world, *(Happened(key=f"bad-{n}") for n in range(22)))
        await until(world, lambda part: part.dead_count == 22)
        assert all(attempts == list(range(1, len(attempts) + 1)) for attempts in seen.values())
