"""The rows of a replay: what it lowers and never raises, whom it fences, and where it begins."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from tidings import Event, EventData, EventStore, Service, open_store
from tidings.database.dead_letters import Letter
from tidings.database.engine import Database, open_database
from tidings.database.held_rows import HeldRows
from tidings.database.inbox import Inbox
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import floors, metadata, replays, watermarks
from tidings.delivery.batch import Batch
from tidings.delivery.progress import Progress
from tidings.errors import Fenced
from tidings.operations.replay import NothingToReplay, Start, find_start, plan, send_back
from tidings.protocol.position import ALL_BUCKETS, bucket_of
from tidings.stores import EVERYTHING, Filter, RecordedEvent

LOG = UUID("6f0a3f0e-6b0d-4d7e-9d0c-7a1d1b6e5c11")
NAME = "shop"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Placed(Event):
    number: int


class Mailed(Event):
    number: int


shop = Service(NAME)


@shop.on(Placed)
async def take(event: Placed) -> None: ...


@shop.on(Mailed, replay=False)
async def mail(event: Mailed) -> None: ...


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(f"sqlite:///{tmp_path}/shop.db") as opened:
        yield opened


def start(before: int) -> Start:
    return Start(before + 1, before, datetime(2026, 1, 1, tzinfo=UTC))


def inbox(database: Database, buckets: range = ALL_BUCKETS) -> Inbox:
    return Inbox(database, NAME, LOG, buckets)


async def settle(database: Database, marks: dict[int, int], floor: int) -> None:
    """Store the watermarks and the floor of a service that has come this far."""
    joined = inbox(database)
    await joined.join()
    async with database.transaction() as connection:
        await joined.watermarks.move(connection, {bucket: (-1, position) for bucket, position in marks.items()})
        await joined.floor.raise_to(connection, floor)


async def state(database: Database, table: sa.Table, column: str) -> dict[int, int]:
    key = table.c.first_bucket if table is floors else table.c.bucket
    async with database.reading() as connection:
        rows = await connection.execute(sa.select(key, table.c[column]))
        return {row[0]: row[1] for row in rows}


async def test_watermarks_and_floor_are_lowered_to_the_start_and_what_stood_there_is_remembered(
    database: Database,
) -> None:
    await settle(database, {0: 3, 1: 10, 2: 30}, 20)
    await send_back(database, shop, LOG, start(10))
    marks = await state(database, watermarks, "position")
    assert [marks[bucket] for bucket in range(4)] == [3, 10, 10, -1]
    assert await state(database, floors, "position") == {0: 10}
    upto = await state(database, replays, "upto")
    assert [upto[bucket] for bucket in range(4)] == [20, 20, 30, 20]
    remembered = await inbox(database).join()
    assert remembered.replay.covers(2, 30)
    assert not remembered.replay.covers(2, 31)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("replay"), st.integers(-1, 40)),
            st.tuples(st.just("floor"), st.integers(0, 40)),
            st.tuples(st.integers(0, 3), st.integers(0, 40)),
        ),
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_whatever_was_done_before_no_replay_raises_anything_or_forgets_what_was_settled(
    steps: list[tuple[Any, int]],
) -> None:
    asyncio.run(_walk(steps))


async def _walk(steps: list[tuple[Any, int]]) -> None:
    async with open_database("sqlite://") as database:
        settled = dict.fromkeys(range(4), -1)
        for what, to in steps:
            joined = inbox(database)
            remembered = await joined.join()
            if what == "replay":
                marks, floor = remembered.watermarks, remembered.floor
                try:
                    await send_back(database, shop, LOG, start(to))
                except NothingToReplay:
                    assert max(settled.values()) <= to
                after = await inbox(database).join()
                assert after.floor in (floor, min(floor, to))
                for bucket in range(4):
                    assert after.watermarks[bucket] in (marks[bucket], min(marks[bucket], to))
                    reached = max(after.watermarks[bucket], after.floor)
                    assert all(after.replay.covers(bucket, n) for n in range(reached + 1, settled[bucket] + 1))
                continue
            async with database.transaction() as connection:
                if what == "floor":
                    await joined.floor.raise_to(connection, to)
                    settled = {bucket: max(upto, to) for bucket, upto in settled.items()}
                elif to > remembered.watermarks[what]:
                    await joined.watermarks.move(connection, {what: (remembered.watermarks[what], to)})
                    settled[what] = max(settled[what], to)


@pytest.mark.parametrize("before", [-1, 4, 9], ids=["all", "lowered", "watermark_stands_as_before"])
async def test_a_process_that_joined_before_can_neither_move_a_watermark_nor_store_a_floor(
    database: Database, before: int
) -> None:
    await settle(database, {7: 9}, 12)
    old = inbox(database)
    remembered = await old.join()
    await send_back(database, shop, LOG, start(before))
    for bucket in (7, 8):
        with pytest.raises(Fenced):
            async with database.transaction() as connection:
                await old.watermarks.move(connection, {bucket: (remembered.watermarks[bucket], 13)})
    async with database.transaction() as connection:
        with pytest.raises(Fenced, match="a replay was asked for"):
            await old.watermarks.fence(connection)
    fresh = inbox(database)
    remembered = await fresh.join()
    async with database.transaction() as connection:
        await fresh.watermarks.fence(connection)
        await fresh.watermarks.move(connection, {7: (remembered.watermarks[7], 13)})


async def test_a_process_that_joined_before_raises_no_floor_in_a_transaction_that_moves_nothing(
    database: Database,
) -> None:
    await settle(database, {7: 9}, 12)
    old = inbox(database)
    progress = Progress(old, HeldRows(NAME, LOG, ALL_BUCKETS), await old.join(), time.monotonic)
    progress.floor = 15  # a marker told an idle process so
    await send_back(database, shop, LOG, start(4))
    with pytest.raises(Fenced, match="a replay was asked for"):
        async with database.transaction() as connection:
            await progress.write(connection, Batch(), floor_now=True)
    assert await state(database, floors, "position") == {0: 4}


@pytest.mark.parametrize("at_once", [1, 1000])
async def test_what_waits_or_was_given_up_before_a_replay_is_not_emitted_again(
    database: Database, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.database.scope.PER_STATEMENT", at_once)
    await settle(database, {7: 9}, 12)
    await send_back(database, shop, LOG, start(4))
    joined = inbox(database)
    await joined.join()
    waits, given_up, fresh, beyond = (
        StagedEvent(7, cause, "mails", EventData("Mailed", b"{}")) for cause in (5, 6, 7, 13)
    )
    async with database.transaction() as connection:
        await joined.staged.add(connection, [waits, beyond])
        await joined.dead.add(connection, [Letter.of_staged(given_up, 1, "too large")])
        found = await joined.emitted_before(connection, [waits, given_up, fresh, beyond])
        renamed = StagedEvent(7, 5, "mails", EventData("Mailed", b"{}"), (uuid4(), waits.event.id))
        assert await joined.emitted_before(connection, [renamed, fresh]) == {str(renamed.event.id)}
    assert found == {str(waits.event.id), str(given_up.event.id)}


async def test_the_floor_of_every_range_is_lowered_and_each_bucket_remembers_its_own(database: Database) -> None:
    for half, floor in ((range(128), 50), (range(128, 256), 8)):
        part = inbox(database, half)
        await part.join()
        async with database.transaction() as connection:
            await part.floor.raise_to(connection, floor)
    await send_back(database, shop, LOG, start(20))
    assert await state(database, floors, "position") == {0: 20, 128: 8}
    upto = await state(database, replays, "upto")
    assert (upto[0], upto[127], upto[128], upto[255]) == (50, 50, 8, 8)


async def test_a_database_of_version_2_gets_what_replays_need(tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    async with open_database(f"sqlite:///{file}") as database:
        await inbox(database).join()
    with closing(sqlite3.connect(file)) as old:
        for table, column in (
            ("tidings_watermarks", "replays"),
            ("tidings_held", "replayed"),
            ("tidings_dead", "replayed"),
            ("tidings_floors", "active"),
            ("tidings_staged", "aliases"),
        ):
            old.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        old.execute("DROP TABLE tidings_replay")
        old.execute("UPDATE tidings_schema SET version = 2")
        old.commit()
    async with open_database(f"sqlite:///{file}") as database:
        remembered = await inbox(database).join()
        async with database.transaction() as connection:
            await inbox(database).floor.raise_to(connection, 5)
            await inbox(database).staged.add(
                connection, [StagedEvent(0, 1, "s", EventData("X", b""), (UUID(int=3), LOG))]
            )
        assert [row.aliases for row in await inbox(database).read_staged()] == [(UUID(int=3), LOG)]
        await send_back(database, shop, LOG, start(2))
        assert (await inbox(database).join()).floor == 2
    assert remembered.floor == -1
    assert "tidings_replay" in metadata.tables


# ---- where it begins ---------------------------------------------------------------------


def data(number: int, type: str = "Placed") -> EventData:
    return EventData(type, f'{{"number":{number}}}'.encode(), b"{}", id=uuid4())


async def test_it_begins_at_the_first_event_at_or_above_a_position_and_knows_the_one_before() -> None:
    async with open_store("memory://") as store:
        found = [(await store.append(f"order-{n}", [data(n)])).position for n in range(4)]
        await store.append("tidings_relay-main", [data(9)])
        first = await find_start(store, 0)
        assert first is not None
        assert (first.position, first.before) == (found[0], -1)
        exact = await find_start(store, found[2])
        assert exact is not None
        assert (exact.position, exact.before) == (found[2], found[1])
        between = await find_start(store, found[1] + 1)
        assert between is not None
        assert (between.position, between.before) == (found[2], found[1])
        assert await find_start(store, found[3] + 1) is None, "only what services receive counts"


class At:
    """A store whose events were recorded a second apart, with some of them removed."""

    def __init__(self, inner: EventStore, began: datetime, removed: frozenset[int] = frozenset()) -> None:
        self.inner = inner
        self.began = began
        self.removed = removed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        async for event in self.inner.read_all(after=after, backwards=backwards, limit=limit, filter=filter):
            if event.position not in self.removed:
                recorded = self.began + timedelta(seconds=event.position)
                yield event._replace(ticks=(recorded - EPOCH) // timedelta(microseconds=1) * 10)


async def test_it_begins_at_the_first_event_recorded_at_or_after_a_time() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    async with open_store("memory://") as inner:
        found = [(await inner.append(f"order-{n}", [data(n)])).position for n in range(4)]
        store: Any = At(inner, began)
        for late, expected in ((0.0, found[2]), (-0.5, found[2]), (0.5, found[3])):
            at = await find_start(store, began + timedelta(seconds=found[2] + late))
            assert at is not None
            assert at.position == expected
        assert await find_start(store, began + timedelta(days=1)) is None


async def test_a_plan_says_what_the_log_has_no_longer(database: Database) -> None:
    async with open_store("memory://") as inner:
        log = await inner.log_id()
        done = await inner.append("order-1", [data(n) for n in range(5)])
        last = (await inner.append("order-2", [data(9)])).position
        joined = Inbox(database, NAME, log, ALL_BUCKETS)
        await joined.join()
        async with database.transaction() as connection:
            await joined.floor.raise_to(connection, last)
        begin = await find_start(inner, 0)
        assert begin is not None
        whole = await plan(inner, database, shop, begin)
        assert (whole.run, whole.missing, whole.missing_streams) == (6, 0, [])
        store: Any = At(inner, datetime(2026, 1, 1, tzinfo=UTC), frozenset({done.position - 3, done.position - 4}))
        lacking = await plan(store, database, shop, begin)
        assert (lacking.run, lacking.missing, lacking.missing_streams) == (4, 2, ["order-1"])


async def test_a_plan_knows_of_a_removed_event_at_which_a_watermark_stands(database: Database) -> None:
    async with open_store("memory://") as inner:
        log = await inner.log_id()
        done = [(await inner.append(f"order-{n}", [data(n)])).position for n in range(3)]
        joined = Inbox(database, NAME, log, ALL_BUCKETS)
        await joined.join()
        async with database.transaction() as connection:
            await joined.watermarks.move(connection, {bucket_of(f"order-{n}"): (-1, at) for n, at in enumerate(done)})
        begin = await find_start(inner, 0)
        assert begin is not None
        store: Any = At(inner, datetime(2026, 1, 1, tzinfo=UTC), frozenset({done[1]}))
        assert (await plan(store, database, shop, begin)).missing == 1
