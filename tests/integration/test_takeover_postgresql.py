"""A queue leaves a process and comes back while notes of what it begins are being written: nobody waits for ever."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.databases import database_url
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    auditing,
    count,
    embedded,
    many,
    rows,
    until,
)
from tidings.database.engine import Database, connected
from tidings.database.tables import begun, floors
from tidings.protocol.position import carried

pytestmark = pytest.mark.usefixtures("on_postgresql")

EVENTS = many(120, 11)
SLOW_DISK = (
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$",
    "CREATE TRIGGER slow AFTER INSERT ON tidings_begun FOR EACH STATEMENT EXECUTE FUNCTION slow()",
)


async def slow_notes(database: Database) -> None:
    async with database.engine.begin() as connection:
        for statement in SLOW_DISK:
            await connection.exec_driver_sql(statement)


async def another_was_here(database: Database, suspect: int, bucket: int) -> None:
    """Act as another process that took the range over, began an event, and crashed."""
    async with database.transaction() as connection:
        await connection.execute(floors.update().values(active="another"))
        await connection.execute(begun.delete().where(begun.c.position == suspect))
        row = (await connection.execute(sa.select(floors.c.service, floors.c.log))).first()
        assert row is not None
        note = {"service": row.service, "log": row.log, "position": suspect, "bucket": bucket, "times": 1}
        await connection.execute(begun.insert().values(note))


async def test_a_queue_that_goes_and_comes_back_while_notes_are_written_stops_nothing(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world, connected(database_url(tmp_path, "audit")) as tool:
        running = world.running[0]
        await world.append(Happened(key="k0", n=-1))
        await world.settled()
        await slow_notes(running.database)
        await world.append(*EVENTS)
        (partition,) = running.partitions
        buckets = {event.position: carried(event) async for event in world.store.read_all() if event.type == "Happened"}
        for suspect in sorted(buckets)[-4:]:
            bucket = buckets[suspect]
            assert bucket is not None
            await another_was_here(tool, suspect, bucket)
            await world.bus.delete([partition.subscription])

            def writes_notes() -> bool:
                guard = partition.pipeline.succession if partition.pipeline else None
                return guard is not None and bool(guard.caution.notes.own)

            async def goes_on() -> bool:
                return writes_notes() or len(await rows(service)) > len(EVENTS)

            await until(goes_on)
        await world.settled(40)
        assert_once_in_order(await rows(service), [Happened(key="k0", n=-1), *EVENTS])

        async def none_is_left() -> bool:
            return await count(service, begun) == 0

        await until(none_is_left)


async def test_notes_are_written_many_at_once(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k0", n=-1))
        await world.settled()
        await slow_notes(world.running[0].database)
        async with connected(database_url(tmp_path, "audit")) as tool, tool.transaction() as connection:
            await connection.execute(floors.update().values(active="another"))
        await world.bus.delete([world.running[0].partitions[0].subscription])
        began = time.monotonic()
        await world.append(*(Happened(key=f"key{n}", n=n) for n in range(300)))
        await world.settled(40)
        assert len(await rows(service)) == 301
        took = time.monotonic() - began
        assert took < 15, f"{took:.1f} s: one transaction for each note takes 30 s"
