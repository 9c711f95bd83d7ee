"""Replays of embedded services: what runs again and what never does; nothing is lost, reordered or emitted twice."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    StoreAround,
    World,
    audit,
    auditing,
    count,
    embedded,
    emitting,
    followed,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import ANY, Context, EventData, EventStore, Hold, Relay, Retry, Service
from tidings._support.tasks import supervised
from tidings.database.layout import resize
from tidings.database.tables import held, replays, staged
from tidings.operations.dead import DeadLetters
from tidings.operations.held import HeldOperations
from tidings.operations.replay import NothingToReplay, Start, find_start, plan, send_back
from tidings.protocol.position import carried
from tidings.stores import Appended, Expected, RecordedEvent

pytestmark = pytest.mark.postgresql

PATIENT = Retry(attempts=1, hold=Hold(attempts=1000, delay=0.05, factor=1))
MORTAL = Retry(attempts=1, hold=None, hold_key=True)


async def sent_back(world: World, to: int = 0) -> Start:
    running = world.running[0]
    start = await find_start(world.store, to)
    assert start is not None
    await send_back(running.database, running.service, await world.store.log_id(), start)
    return start


async def positions(world: World, name: str = "Happened") -> list[int]:
    return [event.position async for event in world.store.read_all() if event.type == name]


class Diary:
    """The events that two handlers have handled, in order. That of `Followed` has effects outside the database."""

    def __init__(self, retry: Retry = PATIENT) -> None:
        self.ran: list[tuple[int, bool]] = []
        """Number of the event, and whether `context.replayed` was True."""
        self.failing: set[int] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.service = Service("audit", tables=tables)

        async def keep(n: int, context: Context) -> None:
            await self.gate.wait()
            if n in self.failing:
                raise ValueError(f"{n} fails")
            self.ran.append((n, context.replayed))

        @self.service.on(Happened, retry=retry)
        async def inside(event: Happened, context: Context) -> None:
            await keep(event.n, context)

        @self.service.on(Followed, retry=retry, replay=False)
        async def outside(event: Followed, context: Context) -> None:
            await keep(event.n, context)

    async def append(self, world: World, *events: Happened | Followed) -> None:
        """Append events in this order, to any streams."""
        for event in events:
            await self.service.append(f"of-{event.key}", event)


@pytest.mark.parametrize("transactional", [True, False])
async def test_an_idle_running_service_runs_again_what_it_had_settled_from_there_on_in_order(
    tmp_path: Path, transactional: bool
) -> None:
    seen: list[tuple[str, int]] = []
    service = auditing()
    if not transactional:
        service = Service("audit", tables=tables)

        @service.on(Happened)
        async def see(event: Happened) -> None:
            seen.append((event.key, event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(*many(300, 7))
        await world.settled()
        first = await rows(service) if transactional else list(seen)
        middle = (await positions(world))[150]
        await sent_back(world, middle)
        assert not (await world.report()).ok, "what is to be run again is pending"
        await world.settled()
        again = (await rows(service) if transactional else seen)[300:]
        in_log = [(event.key, event.n) for event in await in_order(world)]
        assert len(first) == 300
        assert Counter(again) == Counter(in_log[150:])
        for key in {key for key, _ in again}:
            assert [row for row in again if row[0] == key] == [row for row in in_log[150:] if row[0] == key]
        assert world.running[0].joins == 2


async def test_a_process_that_hears_nothing_at_all_notices_and_begins_with_the_next_marker(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service, relay=False) as world:
        running = world.running[0]
        async with supervised(relay(world).run()):
            await world.append(*many(20, 3))
            await world.settled()
        await sent_back(world)
        await until(lambda: running.joins == 2)
        assert await count(service, audit) == 20
        async with supervised(relay(world).run()):
            await world.settled()
        assert await count(service, audit) == 40


async def test_a_standby_that_joined_before_runs_nothing_of_what_it_is_given_first(tmp_path: Path) -> None:
    diary = Diary()
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(world, *(Happened(key="k", n=n) for n in range(5)))
        await world.settled()
    diary.ran.clear()
    async with embedded(tmp_path, diary.service, relay=False) as world:
        await sent_back(world)
        await diary.append(world, Happened(key="other", n=5))
        async with supervised(relay(world).run()):
            await world.settled()
    assert sorted(diary.ran) == [*((n, True) for n in range(5)), (5, False)]


def relay(world: World) -> Relay:
    return Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1)


async def in_order(world: World) -> list[Happened]:
    return [
        Happened.model_validate_json(event.data) async for event in world.store.read_all() if event.type == "Happened"
    ]


async def test_under_traffic_what_was_settled_runs_exactly_once_more_and_the_rest_exactly_once(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*many(300, 23))
        await world.settled()
        enough = asyncio.Event()
        feeding = asyncio.create_task(_feed(world, enough))
        running = world.running[0]
        await until(lambda: _more_than(service, 500))
        middle = (await positions(world))[200]
        await sent_back(world, middle)
        async with running.database.reading() as connection:
            upto = {row.bucket: row.upto for row in await connection.execute(sa.select(replays))}
        await until(lambda: running.joins == 2)
        enough.set()
        await feeding
        await world.settled()
        expected: Counter[tuple[str, int]] = Counter()
        once = twice = 0
        async for event in world.store.read_all():
            if event.type == "Happened":
                told = Happened.model_validate_json(event.data)
                bucket = carried(event)
                assert bucket is not None
                again = middle <= event.position <= upto[bucket]
                once, twice = once + 1 - again, twice + again
                expected[told.key, told.n] += 1 + again
        assert Counter(await rows(service)) == expected
        assert once > 200, "those below the start, and those that came meanwhile"
        assert twice > 100


async def _feed(world: World, enough: asyncio.Event) -> None:
    for start in itertools.count(300, 30):
        await world.append(*(Happened(key=f"k{n % 23}", n=n) for n in range(start, start + 30)))
        await asyncio.sleep(0.01)
        if enough.is_set():
            return


async def _more_than(service: Service, number: int) -> bool:
    return await count(service, audit) > number


async def test_a_handler_with_outside_effects_is_not_run_again_and_the_others_are_told_of_the_replay(
    tmp_path: Path,
) -> None:
    diary = Diary()
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(world, *(kind(key=f"k{n % 3}", n=n) for n in range(20) for kind in (Happened, Followed)))
        await world.settled()
        assert diary.ran.count((3, False)) == 2
        diary.ran.clear()
        await sent_back(world)
        # Without a session, what is at work in that very moment runs twice, as after a kill: it is done at least once.
        await until(lambda: world.running[0].joins == 2)
        await diary.append(world, Followed(key="k1", n=100), Happened(key="k1", n=101))
        await world.settled()
        assert sorted(diary.ran) == [*((n, True) for n in range(20)), (100, False), (101, False)]


async def test_what_was_emitted_is_appended_only_once_even_where_the_store_forgets_ids(tmp_path: Path) -> None:
    service = emitting()
    blindly: Counter[bytes] = Counter()

    class Forgetful(StoreAround):
        """A store like a real server after a restart: it writes an id a second time for `ANY`."""

        async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
            if expected is ANY:
                blindly.update(event.id.bytes for event in events)
            return await super().append(stream, events, expected=expected)

    def wrap(store: EventStore) -> Any:
        return Forgetful(store)

    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.append(*many(120, 11))
        await world.settled()
        before = await followed(world.store)
        assert len(before) == 120
        await sent_back(world)
        await world.settled()
        assert await count(service, audit) == 240
        assert await followed(world.store) == before
        assert max(blindly.values()) == 1, "nobody appended an id blindly twice"
        assert await count(service, staged) == 0


async def test_what_still_waits_for_its_append_is_not_staged_a_second_time(tmp_path: Path) -> None:
    service = emitting()
    open_ = asyncio.Event()

    class Slow(StoreAround):
        async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
            if stream.startswith("followed-"):
                await open_.wait()
            return await super().append(stream, events, expected=expected)

    def wrap(store: EventStore) -> Any:
        return Slow(store)

    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.append(*many(40, 5))
        await until(lambda: _more_than(service, 39))
        await until(lambda: world.running[0].floor > 0)
        await sent_back(world)
        await until(lambda: _more_than(service, 79))
        assert await count(service, staged) == 40
        open_.set()
        await world.settled()
        assert sorted(await followed(world.store)) == sorted((event.key, event.n) for event in many(40, 5))


async def test_held_events_keep_their_rows_and_run_in_their_turn_in_the_replay(tmp_path: Path) -> None:
    """None of these events was ever handled, so handlers with `replay=False` run, too, and `context.replayed` is
    False."""
    diary = Diary(Retry(attempts=1, hold=Hold(attempts=1000, delay=600, factor=1, maximum=600)))
    diary.failing = {1}
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(
            world,
            Happened(key="k", n=0),
            Happened(key="k", n=1),
            Followed(key="k", n=2),
            Happened(key="k", n=3),
            Happened(key="other", n=4),
        )
        await until(lambda: _held(diary.service, 3))
        await until(lambda: world.running[0].floor > 0)
    assert [n for n, _ in diary.ran if n != 4] == [0]
    diary.failing.clear()
    diary.ran.clear()
    async with embedded(tmp_path, diary.service) as world:
        found = await plan(world.store, world.running[0].database, diary.service, await _start(world))
        assert (found.held, found.dead_again) == (3, 0)
        assert [(share.type, share.run, share.passed_over, share.held) for share in found.shares] == [
            ("Happened", 2, 0, 2),
            ("Followed", 0, 0, 1),
        ]
        await sent_back(world)
        await until(lambda: len(diary.ran) >= 2)
        await HeldOperations(world.running[0].database, "audit", await world.store.log_id()).retry()
        await world.settled()
        of_key = [entry for entry in diary.ran if entry[0] != 4]
        assert of_key == [(0, True), (1, False), (2, False), (3, False)]


async def test_no_held_event_overtakes_what_the_replay_has_before_it(tmp_path: Path) -> None:
    diary = Diary()
    diary.failing = {5}
    reads_on = asyncio.Event()

    class Dawdling(StoreAround):
        """The pass of the replay stops before the fourth event."""

        stops = False

        async def read_all(self, *, after: int = -1, **options: Any) -> AsyncIterator[RecordedEvent]:
            async for event in self.inner.read_all(after=after, **options):
                if event.version == 3 and Dawdling.stops:
                    await reads_on.wait()
                yield event

    def wrap(store: EventStore) -> Any:
        return Dawdling(store)

    async with embedded(tmp_path, diary.service, wrap=wrap) as world:
        await diary.append(world, *(Happened(key="k", n=n) for n in range(6)))
        await until(lambda: _held(diary.service, 1))
        await until(lambda: world.running[0].floor > 0)
        diary.ran.clear()
        Dawdling.stops = True
        await sent_back(world)
        diary.failing.clear()
        await until(lambda: len(diary.ran) >= 3)
        reads_on.set()
        await world.settled()
        assert [n for n, _ in diary.ran] == [0, 1, 2, 3, 4, 5]


async def test_what_was_never_done_is_not_lost_where_the_log_has_it_no_longer(tmp_path: Path) -> None:
    """The row has the whole event, and the floor shows that the replay has passed it."""
    diary = Diary(MORTAL)
    diary.failing = {1, 2}
    removed: set[int] = set()

    class Scavenged(StoreAround):
        async def read_all(self, **options: Any) -> AsyncIterator[RecordedEvent]:
            async for event in self.inner.read_all(**options):
                if event.position not in removed:
                    yield event

    def wrap(store: EventStore) -> Any:
        return Scavenged(store)

    async with embedded(tmp_path, diary.service, wrap=wrap) as world:
        await diary.append(world, *(Happened(key=f"k{n}", n=n) for n in range(4)))
        await until(lambda: _dead(diary.service, 2))
        await until(lambda: world.running[0].floor > 0)
        removed.update((await positions(world))[1:3])
        diary.failing.clear()
        diary.ran.clear()
        await sent_back(world)
        await until(lambda: len(diary.ran) == 4)
        assert sorted(diary.ran) == [(0, True), (1, False), (2, False), (3, True)]
        await until(lambda: _held(diary.service, 0))


async def test_dead_letters_run_again_in_order_but_those_of_replay_false_stay(tmp_path: Path) -> None:
    diary = Diary(MORTAL)
    diary.failing = {1, 11}
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(
            world,
            *(Happened(key="a", n=n) for n in range(3)),
            Followed(key="b", n=10),
            Followed(key="b", n=11),
            Happened(key="b", n=12),
        )
        await until(lambda: _dead(diary.service, 2))
        await until(lambda: _held(diary.service, 2))
        await until(lambda: world.running[0].floor > 0)
        diary.failing.clear()
        diary.ran.clear()
        found = await plan(world.store, world.running[0].database, diary.service, await _start(world))
        assert (found.dead_again, found.dead_stay, found.held) == (1, 1, 2)
        await sent_back(world)
        await until(lambda: len(diary.ran) == 3)
        assert diary.ran == [(0, True), (1, False), (2, False)]
        (letter,) = await letters(diary.service)
        assert letter.type == "Followed"
        await until(lambda: _held(diary.service, 1))
        running = world.running[0]
        dead = DeadLetters(running.database, "audit", await world.store.log_id())
        await dead.retry([letter.id])
        await world.settled()
        assert diary.ran[3:] == [(11, False), (12, False)]


async def test_what_dies_in_a_replay_is_known_as_replayed_when_it_is_retried(tmp_path: Path) -> None:
    diary = Diary(MORTAL)
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(world, Happened(key="a", n=0))
        await world.settled()
        diary.failing = {0}
        await sent_back(world)
        await until(lambda: _dead(diary.service, 1))
        diary.failing.clear()
        (letter,) = await letters(diary.service)
        await DeadLetters(world.running[0].database, "audit", await world.store.log_id()).retry([letter.id])
        await world.settled()
        assert diary.ran == [(0, False), (0, True)]


async def test_an_interrupted_replay_goes_on_at_the_next_start_and_still_passes_over(tmp_path: Path) -> None:
    diary = Diary()
    events = [kind(key="k", n=n) for n in range(30) for kind in (Happened, Followed)]
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(world, *events)
        await world.settled()
        diary.ran.clear()
        diary.gate.clear()
        await sent_back(world)
        await until(lambda: bool(world.running[0].at_work()))
        diary.gate.set()
        await until(lambda: len(diary.ran) > 3)
    async with embedded(tmp_path, diary.service) as world:
        await world.settled()
        assert diary.ran == [(n, True) for n in range(30)]


@pytest.mark.parametrize("second", [0, 40])
async def test_a_second_replay_within_the_first_forgets_nothing_of_what_was_settled(
    tmp_path: Path, second: int
) -> None:
    diary = Diary()
    events = [kind(key="k", n=n) for n in range(30) for kind in (Happened, Followed)]
    async with embedded(tmp_path, diary.service) as world:
        await diary.append(world, *events)
        await world.settled()
    diary.ran.clear()
    async with embedded(tmp_path, diary.service, relay=False) as world:
        await sent_back(world, 0)
        of_happened = await positions(world)
        await sent_back(world, second and of_happened[second // 2])
    async with embedded(tmp_path, diary.service) as world:
        await world.settled()
        assert diary.ran == [(n, True) for n in range(30)], "neither raised to the second, nor anything passed by"


@pytest.mark.parametrize("sizes", [(4, 2), (1, 3)], ids=["divided_before", "divided_within"])
async def test_a_divided_service_is_sent_back_in_every_partition_and_may_be_resized_meanwhile(
    tmp_path: Path, sizes: tuple[int, int]
) -> None:
    diary = Diary()
    before, after = sizes
    async with embedded(tmp_path, diary.service) as world:
        await resize(world.running[0].database, "audit", before)
        await until(lambda: len(world.running[0].partitions) == before)
        await diary.append(world, *(kind(key=f"k{n % 20}", n=n) for n in range(100) for kind in (Happened, Followed)))
        await world.settled()
        assert len(diary.ran) == 200
        diary.ran.clear()
        diary.gate.clear()
        await sent_back(world)
        await until(lambda: bool(world.running[0].at_work()))
        diary.gate.set()
        await until(lambda: len(diary.ran) > 10)
        await resize(world.running[0].database, "audit", after)
        await until(lambda: len(world.running[0].partitions) == after)
        await world.settled()
        done = Counter(diary.ran)
        assert done.keys() == {(n, True) for n in range(100)}
        # What was at work without a session when the partitions were divided anew may have run twice.
        assert done.total() < 130
        await resize(world.running[0].database, "audit", 1)
        await until(lambda: len(world.running[0].partitions) == 1)
        await world.append(Happened(key="last", n=1000))
        await world.settled()
        assert Counter(diary.ran) - done == Counter([(1000, False)])


async def test_an_event_of_a_new_handler_is_run_though_its_bucket_never_moved(tmp_path: Path) -> None:
    """The watermark is unchanged. A lowered floor alone must fence the old process, too."""
    old = auditing()
    async with embedded(tmp_path, old) as world:
        await world.append(*(Followed(key="k", n=n) for n in range(10)))
        await world.settled()
        await until(lambda: world.running[0].floor > 0)
    seen: list[int] = []

    @old.on(Followed)
    async def see(event: Followed) -> None:
        seen.append(event.n)

    async with embedded(tmp_path, old) as world:
        await world.append(Followed(key="k", n=10))
        await world.settled()
        assert seen == [10]
        await sent_back(world, 0)
        await world.append(Followed(key="k", n=11))
        await world.settled()
        assert [n for n in seen if n < 10] == list(range(10))


async def test_where_nothing_was_settled_there_is_nothing_to_replay(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service, relay=False) as world:
        await world.append(Happened(key="a"))
        start = await _start(world)
        with pytest.raises(NothingToReplay):
            await plan(world.store, world.running[0].database, service, start)
        with pytest.raises(NothingToReplay):
            await send_back(world.running[0].database, service, await world.store.log_id(), start)
        assert await count(service, replays) == 0


async def test_a_handler_may_write_what_it_wrote_before_in_a_replay_of_its_own_session(tmp_path: Path) -> None:
    async def twice(event: Happened, context: Context, session: AsyncSession) -> None:
        if context.replayed:
            await note(session, Happened(key="replayed", n=event.n))

    service = auditing(effect=twice)
    async with embedded(tmp_path, service) as world:
        await world.append(*many(10, 2))
        await world.settled()
        await sent_back(world)
        await world.settled()
        assert sorted(n for key, n in await rows(service) if key == "replayed") == list(range(10))


async def _start(world: World) -> Start:
    start = await find_start(world.store, 0)
    assert start is not None
    return start


async def _held(service: Service, number: int) -> bool:
    return await count(service, held) == number


async def _dead(service: Service, number: int) -> bool:
    return len(await letters(service)) == number
