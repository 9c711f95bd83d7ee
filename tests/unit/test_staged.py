"""Which staged events are appended without a look, and that the others are found wherever their streams have them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidings import ANY, NO_STREAM, EventData, EventStore, open_store
from tidings.database.staged_events import StagedEvent
from tidings.delivery.resolution import LONG, Ids, Resolver
from tidings.delivery.staged import FRESH_SECONDS, Stager
from tidings.errors import StoreUnavailable, WrongExpectedVersion
from tidings.stores import Appended, Expected, RecordedEvent

EMITTED = b'{"tidingsHandler":"shop.take"}'


def event(id_: UUID | None = None) -> EventData:
    return EventData("Told", b"{}", EMITTED, id=id_ or uuid4())


# ---- ids ---------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=16, max_size=16)), st.lists(st.binary(min_size=16, max_size=16)))
def test_a_set_of_ids_holds_what_was_added_and_nothing_else(added: list[bytes], asked: list[bytes]) -> None:
    ids = Ids()
    for id_bytes in added:
        ids.add(id_bytes)
    assert len(ids) == len(added)
    assert all(id_bytes in ids for id_bytes in added)
    assert {id_bytes for id_bytes in asked if id_bytes in ids} == set(added) & set(asked)


def test_the_end_of_one_id_and_the_beginning_of_the_next_are_not_an_id() -> None:
    ids, shelf = Ids(), b"ab"
    ids.add(shelf + b"x" * 8 + shelf + b"y" * 4)
    ids.add(shelf + b"y" * 14)
    assert shelf + b"y" * 4 + shelf + b"y" * 8 not in ids
    assert shelf + b"y" * 14 in ids


# ---- finding, whatever became of the stream -------------------------------------------------

STREAMS = st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("others"), STREAMS, st.integers(1, 6)),
        st.tuples(st.just("emit"), STREAMS, st.integers(0, 9)),
        st.tuples(st.just("again"), STREAMS, st.integers(0, 99)),
        st.tuples(st.just("again"), STREAMS, st.integers(0, 99)),
        st.tuples(st.just("truncate"), STREAMS, st.integers(1, 9)),
        st.tuples(st.just("delete"), STREAMS, st.just(0)),
        st.tuples(st.just("meet"), STREAMS, st.integers(0, 99)),
    ),
    min_size=5,
    max_size=30,
)


@given(STEPS, st.sampled_from([2, 10, 1000]))
@settings(max_examples=100)
def test_an_event_is_in_the_log_once_however_often_and_whenever_it_is_resolved(
    steps: list[tuple[str, str, int]], remembered: int
) -> None:
    asyncio.run(_walk(steps, remembered))


async def _walk(steps: list[tuple[str, str, int]], remembered: int) -> None:
    with patch("tidings.delivery.resolution.LONG", 3):
        async with open_store(f"memory://{uuid4()}") as store:
            await store.log_id()
            resolver, rows = Resolver(store, remembered=remembered), dict[str, list[StagedEvent]](a=[], b=[])
            for what, stream, n in steps:
                match what:
                    case "others":
                        await store.append(stream, [EventData("Other", b"") for _ in range(n)])
                    case "emit":
                        row = StagedEvent(n, await store.head(), stream, event())
                        rows[stream].append(row)
                        if n > 6:
                            await _append(store, resolver, row)
                    case "again" if rows[stream]:
                        await _append(store, resolver, rows[stream][n % len(rows[stream])])
                    case "meet" if rows[stream]:
                        row = rows[stream][n % len(rows[stream])]
                        await _append(store, resolver, row, partial(store.append, stream, [EventData("Other", b"")]))
                    case "truncate":
                        await store.set_metadata(stream, {"$tb": n})
                    case "delete":
                        try:
                            await store.delete(stream)
                        except WrongExpectedVersion:
                            continue  # it has no events
            for row in (*rows["a"], *rows["b"]):
                await _append(store, resolver, row)
            found = Counter([recorded.id async for recorded in store.read_all() if recorded.type == "Told"])
    assert found == Counter(row.event.id for of_stream in rows.values() for row in of_stream)


async def _append(
    store: EventStore, resolver: Resolver, row: StagedEvent, between: Callable[[], Any] | None = None
) -> None:
    actual = -1
    for _ in range(20):
        async with resolver.turn(row.stream):
            place = await resolver.resolve(row, actual)
            if place is None:
                return
            assert place.expected is not ANY
            if between is not None:
                await between()
                between = None
            try:
                event = replace(row.event, id=place.identity)
                resolver.appended(row, place, await store.append(row.stream, [event], expected=place.expected))
            except WrongExpectedVersion as error:
                actual = error.actual
                continue
        return
    raise AssertionError("it is refused for ever")


async def test_of_a_stream_that_is_known_in_part_what_is_older_newer_or_hidden_by_now_is_read_too() -> None:
    async with open_store(f"memory://{uuid4()}") as store:
        resolver = Resolver(store)
        await store.log_id()

        async def others(count: int) -> None:
            await store.append("told", [EventData("Other", b"") for _ in range(count)])

        async def row(*, appended: bool) -> StagedEvent:
            made = StagedEvent(0, await store.head(), "told", event())
            if appended:
                await store.append("told", [made.event])
            return made

        await others(LONG)
        old = await row(appended=True)
        await others(LONG)
        middle, late = await row(appended=False), await row(appended=False)
        await others(LONG)
        await _append(store, resolver, middle)  # the stream is known back to the causes of these two
        await _append(store, resolver, old)
        await others(3)
        await _append(store, resolver, late)
        await others(1)
        hidden, absent = await row(appended=True), await row(appended=False)
        await store.delete("told")
        for each in (hidden, absent, old, middle, late):
            await _append(store, resolver, each)
        found = [recorded.id async for recorded in store.read_all() if recorded.type == "Told"]
    assert sorted(found) == sorted(each.event.id for each in (old, middle, late, hidden, absent))


# ---- one reading for many ---------------------------------------------------------------------


class Counting:
    """A store that counts reads of streams and keeps the expected versions of appends."""

    def __init__(self, inner: EventStore) -> None:
        self.inner = inner
        self.read = 0
        self.expected: list[Expected] = []
        self.failing = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        self.expected.append(expected)
        if self.failing:
            self.failing -= 1
            raise StoreUnavailable("away")
        return await self.inner.append(stream, events, expected=expected)

    async def read_stream(self, stream: str, **how: Any) -> AsyncIterator[RecordedEvent]:
        async for recorded in self.inner.read_stream(stream, **how):
            self.read += 1
            yield recorded


MANY = 1000


@pytest.mark.parametrize("present", ["all", "none", "every other"])
async def test_many_events_for_one_long_stream_cost_about_one_reading_of_it(present: str) -> None:
    async with open_store(f"memory://{uuid4()}") as inner:
        store: Any = Counting(inner)
        causes = [(await inner.append("causes", [EventData("Asked", b"")])).position for _ in range(MANY)]
        rows = [StagedEvent(n % 256, cause, "told", event()) for n, cause in enumerate(causes)]
        for n, row in enumerate(rows):
            there = present == "all" or (present == "every other" and n % 2)
            await inner.append("told", [row.event if there else EventData("Other", b"")])
        done: list[UUID] = []
        await _run(Stager(store, Told(done)), rows, done)
        assert sorted(done) == sorted(row.event.id for row in rows)
        assert store.read <= 2 * MANY
        found = Counter([recorded.id async for recorded in inner.read_stream("told") if recorded.type == "Told"])
    assert found == Counter(row.event.id for row in rows)


# ---- what may be appended without a look ----------------------------------------------------------


class Told:
    """Keeps what was appended; nothing is ever given up."""

    def __init__(self, done: list[UUID]) -> None:
        self.done = done

    def appended(self, id: UUID) -> None:
        self.done.append(id)

    def given_up(self, id: UUID, letter: object) -> None:
        raise AssertionError(letter)


async def _run(stager: Stager, rows: Sequence[StagedEvent], done: list[UUID], *, since: float | None = None) -> None:
    """Stage these events, and wait until they are appended."""
    wanted = len(done) + len(rows)
    stager.add(rows, since=since)
    running = asyncio.create_task(stager.run())
    try:
        async with asyncio.timeout(60):
            while len(done) < wanted:
                await asyncio.sleep(0.001)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Bench:
    """A stager whose clock stands still, on a store that records its calls."""

    def __init__(self, inner: EventStore) -> None:
        self.store: Any = Counting(inner)
        self.now = 100.0
        self.done: list[UUID] = []
        self.stager = Stager(self.store, Told(self.done), clock=lambda: self.now)
        self.stager.begin()

    async def emits(self, cause: int, *, since: float | None = 100.0, stream: str = "told") -> list[Expected]:
        """Return the expected versions with which an event of this cause is appended."""
        self.store.expected.clear()
        await _run(self.stager, [StagedEvent(0, cause, stream, event())], self.done, since=since)
        return list(self.store.expected)

    async def cause(self) -> int:
        return int((await self.store.inner.append("causes", [EventData("Asked", b"")])).position)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with open_store(f"memory://{uuid4()}") as store:
        yield Bench(store)


async def test_what_was_in_the_log_before_the_first_own_append_is_looked_for_and_what_came_later_is_not(
    bench: Bench,
) -> None:
    old = [await bench.cause() for _ in range(3)]
    assert await bench.emits(old[1]) == [NO_STREAM]
    new = await bench.cause()
    assert await bench.emits(old[2]) == [0]
    assert await bench.emits(new) == [ANY]


async def test_who_takes_over_looks_again_for_what_was_in_the_log_by_then(bench: Bench) -> None:
    await bench.emits(await bench.cause())
    between = await bench.cause()
    bench.stager.begin()
    assert await bench.emits(between) == [0]
    assert await bench.emits(await bench.cause()) == [ANY]


@pytest.mark.parametrize("age", [None, FRESH_SECONDS, 3600.0])
async def test_a_row_that_another_process_may_have_tried_is_looked_for(bench: Bench, age: float | None) -> None:
    await bench.emits(await bench.cause())
    since = None if age is None else bench.now - age
    assert await bench.emits(await bench.cause(), since=since) == [0]


async def test_a_row_is_appended_without_a_look_at_most_once(bench: Bench) -> None:
    await bench.emits(await bench.cause())
    bench.store.failing = 1
    assert await bench.emits(await bench.cause()) == [ANY, 0]


async def test_a_store_may_be_away_for_hours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.delivery.staged.RETRY_SECONDS", (1e-9, 1e-9))
    await bench.emits(await bench.cause())
    bench.store.failing = 1_100  # pauses that double would by now be longer than a float can say
    assert await bench.emits(await bench.cause()) == [ANY, *[0] * 1_100]


async def test_an_event_that_was_found_says_nothing_of_how_new_the_log_is(bench: Bench) -> None:
    cause, told = await bench.cause(), event()
    await bench.store.inner.append("told", [told])
    await _run(bench.stager, [StagedEvent(0, cause, "told", told)], bench.done, since=100.0)
    assert await bench.emits(await bench.cause()) == [0]


async def test_an_event_appended_under_a_former_name_of_its_handler_is_found(bench: Bench) -> None:
    cause, told = await bench.cause(), event()
    await bench.store.inner.append("told", [told])
    row = StagedEvent(0, cause, "told", event(), (uuid4(), told.id))
    await _run(bench.stager, [row], bench.done, since=None)
    assert bench.store.expected == []
