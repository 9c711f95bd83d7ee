"""`verify --deep` recounts everything from the log, and every row that somebody changed by hand is found out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from tests.integration.embedded import Followed, Happened, embedded, emitting, settings_for, until
from tidings import ANY, EventData, EventStore, RecordedEvent, Service
from tidings.adapters import open_store
from tidings.database.engine import Database, open_database
from tidings.database.tables import dead, floors, held, staged, watermarks
from tidings.modelling.handlers import Retry
from tidings.operations.recount import Recount, recount
from tidings.operations.replay import find_start, send_back
from tidings.protocol.position import carried

pytestmark = pytest.mark.postgresql


def shop() -> Service:
    """One of the emitted events is dead, and its key waits."""
    service = emitting()

    @service.on(Followed, retry=Retry(attempts=1, hold=None, hold_key=True, permanent=(ValueError,)))
    async def refuse(event: Followed) -> None:
        if event.key == "bad":
            raise ValueError("bad")

    return service


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[EventStore, Database]]:
    settings = settings_for(folder)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        yield store, database


async def count(store: EventStore, database: Database) -> Recount:
    return await recount(store, [(shop(), database)])


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[tuple[EventStore, Database]]:
    """Four events, three of which caused an emitted one. One of the emitted events is dead, and the fourth event waits
    behind it."""
    async with embedded(tmp_path, shop()) as world:
        await world.append(Happened(key="good"), Happened(key="bad"), Happened(key="good", n=1))
        await world.settled()
        await world.append(Happened(key="bad", n=1))
        running = world.running[0]
        while not (await world.report()).services[0].held_count:
            await running.reached(10**9, timeout=0.05)
    async with opened(tmp_path) as found:
        yield found


async def change(database: Database, *statements: sa.Update | sa.Delete | sa.Insert) -> None:
    async with database.transaction() as connection:
        for statement in statements:
            await connection.execute(statement)


async def first_emitted(store: EventStore) -> RecordedEvent:
    async for event in store.read_all():
        if b"tidingsHandler" in event.metadata:
            return event
    raise AssertionError("a handler emitted something")


Place = tuple[EventStore, Database]


async def test_the_log_confirms_every_row_of_a_service_that_works(place: Place) -> None:
    found = await count(*place)
    (tally,) = found.services
    assert (tally.events, tally.handled, tally.held, tally.dead, tally.pending) == (7, 5, 1, 1, 0)
    assert (found.wrong, found.notes) == ([], [])
    assert found.ok
    assert "of 7 events of its types 5 are handled, 1 held, 1 dead, 0 pending" in str(found)


async def test_what_requests_emitted_needs_no_cause_and_may_be_in_the_log_once_only(tmp_path: Path) -> None:
    service = shop()
    async with embedded(tmp_path, service) as world:
        for key, idempotency_key in (("good", None), ("better", "request-1"), ("better", "request-1")):
            async with service.transaction(idempotency_key=idempotency_key) as (_, emit):
                emit(f"happened-{key}", Happened(key=key))
        await world.settled()
    async with opened(tmp_path) as (store, database):
        found = await count(store, database)
        assert (found.wrong, found.notes) == ([], [])
        assert found.ok
        first = await first_emitted(store)
        await store.append(
            "copies", [EventData(type=first.type, data=first.data, metadata=first.metadata, id=first.id)], expected=ANY
        )
        assert "it is in the log twice" in str(await count(store, database))


async def test_progress_tells_how_far_the_log_was_read(place: Place) -> None:
    store, database = place
    for first in range(4):
        await store.append(f"noise-{first}", [EventData("Noise", b"{}") for _ in range(500)])
    told: list[tuple[int, int, int]] = []
    await recount(store, [(shop(), database)], lambda *numbers: told.append(numbers))
    assert [events for events, _, _ in told] == [1000, 2000]
    assert all(position <= end for _, position, end in told)


async def test_an_event_above_floor_and_watermark_is_pending(place: Place) -> None:
    store, database = place
    await change(database, floors.update().values(position=-1), watermarks.update().values(position=-1))
    await change(database, held.delete(), dead.delete())
    (tally,) = (await count(store, database)).services
    assert (tally.handled, tally.pending) == (0, 7)


@pytest.mark.parametrize("table", [held, dead], ids=["held", "dead"])
@pytest.mark.parametrize("column", ["event_id", "type", "stream"])
async def test_a_row_that_is_not_the_event_at_its_position_is_wrong(place: Place, table: sa.Table, column: str) -> None:
    store, database = place
    await change(database, table.update().values({column: str(uuid4())}))
    found = await count(store, database)
    assert not found.ok
    assert found.wrong_count == 1
    assert "is not the event that the log has there: " in found.wrong[0]


async def test_a_held_row_above_its_watermark_would_run_twice(place: Place) -> None:
    store, database = place
    await change(database, floors.update().values(position=-1), watermarks.update().values(position=-1))
    found = await count(store, database)
    assert found.wrong_count == 2
    assert "the event would be handled once more" in found.wrong[0]


async def test_rows_beyond_the_end_of_the_log_are_wrong(place: Place) -> None:
    store, database = place
    await change(
        database,
        held.update().values(position=10**6),
        watermarks.update().where(watermarks.c.position > 0).values(position=10**6 + 1),
    )
    found = await count(store, database)
    assert any("names position 1000000, and the log ends at" in text for text in found.wrong)
    assert any("watermark" in text and "1000001" in text for text in found.wrong)


async def test_a_watermark_that_names_an_event_of_another_bucket_is_wrong(place: Place) -> None:
    store, database = place
    events = [event async for event in store.read_all() if carried(event) is not None]
    last = events[-1]
    other = ((carried(last) or 0) + 1) % 256
    await change(database, watermarks.update().where(watermarks.c.bucket == other).values(position=last.position))
    found = await count(store, database)
    (wrong,) = found.wrong
    assert wrong.startswith(f"audit: the watermark of bucket {other} names {last.type} {last.id} at {last.stream}@")
    assert wrong.endswith("which is not of that bucket")


async def test_an_emitted_event_that_is_in_the_log_twice_is_found(place: Place) -> None:
    store, database = place
    emitted = await first_emitted(store)
    again = EventData(emitted.type, emitted.data, emitted.metadata, id=emitted.id)
    await store.append("somewhere-else", [again], expected=ANY)
    found = await count(store, database)
    (wrong,) = found.wrong
    assert f"somewhere-else@0, position {await store.head()}, emitted by audit." in wrong
    assert f"has the id of the event at position {emitted.position}: it is in the log twice" in wrong


async def test_a_copy_is_wrong_once_and_noted_from_then_on_while_proving_goes_on(tmp_path: Path) -> None:
    service = emitting()
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="good"))
        await world.settled()

        async def is_stored() -> bool:
            report = await world.report()
            return report.services[0].floor >= report.position

        async def proof(since: int | None = None) -> Recount:
            await world.settled()
            await until(is_stored)
            return await recount(world.store, [(service, world.running[0].database)], since=since)

        before = (await proof()).proved["audit"]
        emitted = await first_emitted(world.store)
        copy = EventData(emitted.type, emitted.data, emitted.metadata, id=emitted.id)
        for number in range(3):
            await world.store.append(f"copies-{number}", [copy], expected=ANY)
            await proof(since=before)  # reads too little to find it, and must not keep it from being found
            first, again = await proof(), await proof()
            assert [f"copies-{number}@0" in text for text in first.wrong] == [True]
            assert again.wrong == []
            assert len(again.notes) == number + 1
            assert all("in the log twice, as an earlier proof has said" in text for text in again.notes)
            assert again.ok
            assert not first.ok
            assert (await proof(since=again.proved["audit"])).ok


async def test_an_emitted_event_without_its_cause_is_noted(place: Place) -> None:
    store, database = place
    lost = str(uuid4())
    metadata = json.dumps({"tidingsHandler": "audit.handle", "$causationId": lost}).encode()
    await store.append("followed-x", [EventData("Followed", b'{"key": "x"}', metadata)])
    found = await count(store, database)
    assert found.notes_count == 1
    assert f"names cause {lost}, which is not in the log before it" in found.notes[0]


async def test_a_staged_row_whose_event_is_in_the_log_is_left_over(place: Place) -> None:
    store, database = place
    emitted = await first_emitted(store)
    row: dict[str, Any] = {
        "service": "audit",
        "log": str(await store.log_id()),
        "bucket": 1,
        "cause": 10**6,
        "event_id": str(emitted.id),
        "stream": emitted.stream,
        "type": emitted.type,
        "data": b"{}",
        "metadata": b"{}",
        "is_json": True,
    }
    await change(database, staged.insert().values(row))
    found = await count(store, database)
    assert any("is in the log already" in text for text in found.notes)
    assert any("the cause of staged Followed" in text for text in found.wrong)


async def test_a_replay_that_has_not_come_back_contradicts_nothing(place: Place) -> None:
    store, database = place
    start = await find_start(store, 4)
    assert start is not None
    await send_back(database, shop(), await store.log_id(), start)
    found = await count(store, database)
    assert found.wrong == []
    assert found.services[0].pending > 0
