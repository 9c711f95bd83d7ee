"""Held events in operators' hands, while the service runs: retried, skipped, dropped; any event skipped anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    World,
    assert_once_in_order,
    auditing,
    count,
    embedded,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import dead, held, skips
from tidings.operations.dead import DeadLetters
from tidings.operations.held import HeldNotFound, HeldOperations
from tidings.operations.selection import Selection
from tidings.operations.skip import NotSkippable, Skip, skip, skip_state
from tidings.stores import RecordedEvent

pytestmark = pytest.mark.postgresql

NEVER = Retry(attempts=1, hold=Hold(attempts=5, delay=3600.0, maximum=3600.0))


class Moody:
    """An effect that fails for the first event of some keys, with different errors."""

    def __init__(self, *keys: str) -> None:
        self.angry = set(keys)

    async def __call__(self, event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key in self.angry and event.n < 30:
            raise (KeyError if event.key.startswith("a") else ValueError)(f"{event.key} is in a mood")


async def operations(world: World) -> HeldOperations:
    running = world.running[0]
    return HeldOperations(running.database, running.service.name, await world.store.log_id())


def holds(service: Service, number: int, table: sa.Table = held) -> Callable[[], Awaitable[bool]]:
    async def found() -> bool:
        return await count(service, table) == number

    return found


async def event_at(world: World, stream: str, version: int) -> RecordedEvent:
    async for event in world.store.read_stream(stream, start=version, limit=1):
        return event
    raise AssertionError("it is not there")


EVENTS = [Happened(key=f"{letter}{key}", n=n) for n in range(3) for letter in "ab" for key in range(4)]


async def test_what_is_retried_runs_at_once_and_its_followers_behind_it_in_order(tmp_path: Path) -> None:
    moody = Moody(*(event.key for event in EVENTS))
    service = auditing(effect=moody, retry=NEVER)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await until(holds(service, len(EVENTS)))
        here = await operations(world)
        (seen,) = await here.by_handler()
        assert (seen.handler, seen.events) == ("handle", 8)
        assert "is in a mood" in seen.reason
        assert await here.count(Selection(error="keyerror")) == 4
        assert await here.count(Selection(error="mood", key="b1")) == 1
        assert await here.count(Selection(stream="Happened-a1")) == 3
        assert await here.count(Selection(handler="nobody")) == 0
        assert await here.count(Selection(since=seen.since)) == len(EVENTS)
        assert await here.count(Selection(until=seen.since)) == 0
        moody.angry.clear()
        assert await here.retry(Selection(error="KeyError")) == 4
        await until(holds(service, 12))
        assert_once_in_order(await rows(service), [event for event in EVENTS if event.key.startswith("a")])
        assert await here.retry(limit=1) == 1
        await until(holds(service, 9))
        assert await here.retry() == 9
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)


@pytest.mark.parametrize("verb", ["skip", "drop"])
async def test_what_is_skipped_or_dropped_lets_its_followers_go_on(tmp_path: Path, verb: str) -> None:
    service = auditing(effect=Moody("a0"), retry=NEVER)
    events = [Happened(key="a0", n=n) for n in (0, 30, 31)]
    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await until(holds(service, 3))
        here = await operations(world)
        (first, *_) = await here.list()
        assert await getattr(here, verb)(positions=[first.position]) == 1
        await world.settled()
        assert await rows(service) == [("a0", 30), ("a0", 31)]
        kept = [(row.reason, row.holds_key, row.position, row.attempts) for row in await letters(service)]
        assert kept == ([("skipped by operator", False, first.position, 1)] if verb == "skip" else [])
        if verb == "skip":
            (letter,) = await letters(service)
            assert "KeyError" in letter.detail
            assert "Traceback" in letter.detail
            letters_ = DeadLetters(world.running[0].database, "audit", await world.store.log_id())
            await letters_.retry([letter.id])
            await until(holds(service, 1))


async def test_all_that_are_named_or_none(tmp_path: Path) -> None:
    service = auditing(effect=Moody("a0"), retry=NEVER)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a0"))
        await until(holds(service, 1))
        here = await operations(world)
        (first,) = await here.list()
        for act in (here.retry, here.skip, here.drop):
            with pytest.raises(HeldNotFound, match="does not hold the event at position 999"):
                await act(positions=[first.position, 999])
        assert await count(service, held) == 1
        assert await here.find(first.event_id) == await here.find(("Happened-a0", 0)) == first.position


@pytest.mark.parametrize("verb", ["skip", "drop"])
async def test_an_event_that_is_at_work_at_that_moment_has_no_effect(tmp_path: Path, verb: str) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    service = Service("plain")

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=9, delay=0.05)))
    async def handle(event: Happened, context: Context) -> None:
        if context.attempt == 1:
            raise ValueError("at first")
        begun.set()
        await go.wait()

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k"))
        await asyncio.wait_for(begun.wait(), 20)
        here = await operations(world)
        assert await getattr(here, verb)() == 1
        go.set()
        await until(lambda: world.running[0].joins > 1)
        await world.settled()
        assert await count(service, held) == 0
        assert await count(service, dead) == (1 if verb == "skip" else 0)


# ---- skip, wherever the event stands -----------------------------------------------------


@pytest.mark.parametrize("transactional", [True, False])
async def test_an_event_that_the_service_has_not_reached_has_no_effect(tmp_path: Path, transactional: bool) -> None:
    """The event waits in its lane while an earlier one of its key is retried."""
    service = Service("audit", tables=tables)
    calls: list[int] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def work(event: Happened) -> None:
        if event.n == 0:
            begun.set()
            if not go.is_set():
                raise ValueError("not yet")
        calls.append(event.n)

    async def without(event: Happened) -> None:
        await work(event)

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await work(event)
        await note(session, event)

    retry = Retry(attempts=10_000, delay=0.05, maximum=0.05)
    service.on(Happened, retry=retry)(with_session if transactional else without)
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(4)))
        await asyncio.wait_for(begun.wait(), 20)
        database, log = world.running[0].database, await world.store.log_id()
        poison = await event_at(world, "Happened-k", 2)
        assert await skip_state(database, service, log, poison) is Skip.PENDING
        assert await skip(database, service, log, poison) is Skip.PENDING
        if not transactional:  # what has no session is not undone: it must have heard of the skip
            await until(lambda: world.running[0].joins > 1)
        go.set()
        await world.settled()
        if transactional:
            assert await rows(service) == [("k", 0), ("k", 1), ("k", 3)]
        else:
            assert calls == [0, 1, 3]
        (letter,) = await letters(service)
        assert (letter.position, letter.reason, letter.holds_key) == (poison.position, "skipped by operator", False)
        assert await skip(database, service, log, poison) is Skip.RELEASED
        assert await count(service, skips) == 0
        with pytest.raises(NotSkippable, match="has handled event"):
            await skip(database, service, log, await event_at(world, "Happened-k", 3))


async def test_an_event_that_a_handler_hangs_at_is_skipped_at_once(tmp_path: Path) -> None:
    service = Service("plain")
    begun = asyncio.Event()
    calls: list[int] = []

    @service.on(Happened, timeout=3600)
    async def handle(event: Happened) -> None:
        if event.n == 0:
            begun.set()
            await asyncio.Event().wait()
        calls.append(event.n)

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k"), Happened(key="k", n=1))
        await asyncio.wait_for(begun.wait(), 20)
        database, log = world.running[0].database, await world.store.log_id()
        await skip(database, service, log, await event_at(world, "Happened-k", 0))
        await world.settled()
        assert calls == [1]


async def test_a_skip_is_durable_before_the_service_starts(tmp_path: Path) -> None:
    """A service that dies at every start knows of the skip before it runs anything."""
    first = Service("plain")
    first.on(Followed)(_nothing)
    async with embedded(tmp_path, first) as world:
        await world.append(Followed(key="x"))
        await world.settled()
        await world.append(Happened(key="k"), Happened(key="k", n=1))
        database, log = world.running[0].database, await world.store.log_id()
        poison = await event_at(world, "Happened-k", 0)
        with pytest.raises(NotSkippable, match="has no handler for 'Happened'"):
            await skip(database, first, log, poison)
    later = Service("other")
    calls: list[int] = []

    @later.on(Happened)
    async def handle(event: Happened) -> None:
        calls.append(event.n)

    async with embedded(tmp_path, later, relay=False) as world:
        database, log = world.running[0].database, await world.store.log_id()
        assert await skip(database, later, log, poison) is Skip.PENDING
    async with embedded(tmp_path, later) as world:
        await world.settled()
        assert calls == [1]
        assert [row.reason for row in await letters(later)] == ["skipped by operator"]


async def _nothing(event: Followed) -> None:
    """Nothing to do."""


async def test_held_and_dead_events_are_skipped_where_they_are(tmp_path: Path) -> None:
    service = auditing(effect=Moody("a0", "b0"), retry=Retry(attempts=1, hold=None))
    held_ = Service("held")
    held_.on(Happened, retry=NEVER)(_fails)
    async with embedded(tmp_path, service, held_) as world:
        await world.append(Happened(key="a0"), Happened(key="a0", n=30))
        await until(holds(held_, 2))
        await until(holds(service, 1))
        log, event = await world.store.log_id(), await event_at(world, "Happened-a0", 0)
        assert await skip(world.running[0].database, service, log, event) is Skip.DEAD
        assert await skip(world.running[1].database, held_, log, event) is Skip.HELD
        await until(holds(service, 0))
        assert await rows(service) == [("a0", 30)]
        assert [row.reason for row in await letters(held_)] == ["skipped by operator"]
        await until(holds(held_, 1))


async def _fails(event: Happened) -> None:
    raise ValueError("always")


async def test_a_dead_letter_that_held_nothing_blocks_its_key_for_the_process_at_work_when_it_is_retried(
    tmp_path: Path,
) -> None:
    angry, ran, service = {1}, list[int](), Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=1, hold=None, hold_key=False))
    async def refuse_the_second(event: Happened) -> None:
        if event.n in angry:
            raise ValueError("not now")
        ran.append(event.n)

    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(3)))
        await until(lambda: ran == [0, 2])
        await until(holds(service, 1, dead))
        angry.clear()
        operator = DeadLetters(world.running[0].database, "audit", await world.store.log_id())
        await operator.retry([letter.id for letter in await operator.list()])
        await until(lambda: world.running[0].joins > 1)
        await world.settled()
        assert ran == [0, 2, 1]


async def test_many_held_events_are_moved_in_one_go(tmp_path: Path) -> None:
    service = Service("held")
    service.on(Happened, retry=NEVER)(_fails)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k"), *(Happened(key="k", n=n) for n in range(1, 1203)))
        await until(holds(service, 1203))
        here = await operations(world)
        assert await here.skip(limit=501) == 501
        assert await here.skip() == 702
        assert await count(service, held) == 0
        await world.settled()
        positions = [row.position for row in await letters(service)]
        assert len(set(positions)) == len(positions) == 1203


async def test_skips_amid_traffic_lose_nothing_else_and_repeat_nothing(tmp_path: Path) -> None:
    service = auditing(retry=NEVER)
    events = many(400, 12)
    async with embedded(tmp_path, service) as world:
        skipped = set()
        for start in range(0, len(events), 100):
            await world.append(*events[start : start + 100])
            database, log = world.running[0].database, await world.store.log_id()
            try:
                last = await event_at(world, f"Happened-{events[start + 99].key}", 0)
                async for event in world.store.read_stream(last.stream, backwards=True, limit=1):
                    last = event
                await skip(database, service, log, last)
                skipped.add(Happened.model_validate_json(last.data).n)
            except NotSkippable:
                continue
        await world.settled()
        assert {Happened.model_validate_json(row.data).n for row in await letters(service)} == skipped
        assert_once_in_order(await rows(service), [event for event in events if event.n not in skipped])
