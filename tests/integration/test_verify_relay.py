"""`verify` and the relay's checkpoint; what a look costs when all is well."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.integration.embedded import StoreAround, auditing, embedded, many, settings_for, until
from tidings import ANY, EventData, EventStore, RecordedEvent, open_store
from tidings.database.engine import open_database
from tidings.database.tables import floors, watermarks
from tidings.operations.repair import move_checkpoint
from tidings.operations.report import Report
from tidings.operations.verify import verify
from tidings.relay.checkpoints import checkpoint_stream, read_checkpoint, write_checkpoint
from tidings.stores import EVERYTHING, Filter


class Counting(StoreAround):
    """A store that counts calls and events that are read."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.reads = 0

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        self.reads += 1
        async for event in self.inner.read_all(after=after, backwards=backwards, limit=limit, filter=filter):
            self.reads += 1
            yield event

    async def read_stream(self, stream: str, **options: Any) -> AsyncIterator[RecordedEvent]:
        self.reads += 1
        async for event in self.inner.read_stream(stream, **options):
            self.reads += 1
            yield event

    async def head(self) -> int:
        self.reads += 1
        return await self.inner.head()


async def look(folder: Path, relay: str = "main") -> Report:
    settings = settings_for(folder)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        return await verify(store, [(auditing(), database)], relay=relay)


@pytest.fixture
async def settled(tmp_path: Path) -> Path:
    """A folder with ten events, all settled and published."""
    await settle(tmp_path, 10)
    return tmp_path


async def settle(folder: Path, events: int) -> None:
    async with embedded(folder, auditing()) as world:
        await world.append(*many(events, 5))
        await world.settled()
        position = (await world.report()).position

        async def published() -> bool:
            return await read_checkpoint(world.store, "main") >= position

        await until(published)
    settings = settings_for(folder)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        assert (await verify(store, [(auditing(), database)])).ok


async def cost(folder: Path, events: int) -> int:
    folder.mkdir()  # noqa: ASYNC240
    settings = settings_for(folder)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        position = -1
        for first in range(0, events, 500):
            data = [EventData("Happened", b"{}") for _ in range(min(500, events - first))]
            position = (await store.append(f"things-{first % 7}", data)).position
        await write_checkpoint(store, "main", position)
        own = {"service": "audit", "log": str(await store.log_id())}
        async with database.transaction() as connection:
            # As after a marker: 256 watermarks somewhere below, and the floor at the end.
            marks = [own | {"bucket": bucket, "position": min(bucket, position)} for bucket in range(256)]
            await connection.execute(watermarks.insert(), marks)
            await connection.execute(floors.insert().values(**own, first_bucket=0, last_bucket=255, position=position))
        counting = Counting(store)
        report = await verify(counting, [(auditing(), database)], relay="main")
        assert report.ok
        assert report.position == position
        return counting.reads


async def test_when_all_is_well_a_long_log_costs_no_more_reads_than_a_short_one(tmp_path: Path) -> None:
    assert await cost(tmp_path / "short", 10) == await cost(tmp_path / "long", 10_000) == 5


async def test_a_checkpoint_at_the_end_says_that_everything_is_published(settled: Path) -> None:
    report = await look(settled)
    assert report.ok
    assert report.relay is not None
    assert (report.relay.checkpoint, report.relay.behind) == (report.position, 0)
    assert f"relay main: checkpoint {report.position}, nothing above it" in str(report)


async def test_a_relay_that_is_behind_is_told_and_what_is_settled_all_the_same_is_settled(settled: Path) -> None:
    async with open_store(settings_for(settled).store) as store:
        await write_checkpoint(store, "main", (await look(settled)).position - 3)
    report = await look(settled)
    assert report.ok
    assert "3 events above it are not known to be published" in str(report)


async def test_a_service_that_took_in_no_marker_for_the_checkpoint_is_told_so(settled: Path) -> None:
    settings = settings_for(settled)
    position = (await look(settled)).position
    async with open_database(settings.database_of("audit")) as database, database.transaction() as connection:
        await connection.execute(floors.update().values(position=position - 2))
        await connection.execute(watermarks.update().values(position=-1))
    report = await look(settled)
    assert [event.position for event in report.services[0].pending] == [position - 1, position]
    assert report.relay is not None
    assert f"no marker for the relay's checkpoint {report.relay.checkpoint} was taken in" in str(report)


async def test_a_relay_of_another_name_has_a_checkpoint_of_its_own(settled: Path) -> None:
    assert "relay other: has never stored a checkpoint, 10 events" in str(await look(settled, "other"))


async def test_a_checkpoint_above_the_logs_end_is_wrong_and_is_moved_back(settled: Path) -> None:
    async with open_store(settings_for(settled).store) as store:
        await write_checkpoint(store, "main", 10**6)
        report = await look(settled)
        assert not report.ok
        assert "its checkpoint 1000000 is above the end of the log" in str(report)
        assert await move_checkpoint(store, report) == report.position
        assert (await look(settled)).ok
        assert await move_checkpoint(store, await look(settled)) is None, "one that may be right is left alone"


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'{"position": "7"}', b'{"position": 1e3}', b"[" * 100_000])
async def test_a_checkpoint_that_is_none_is_named_with_its_stream_and_replaced(settled: Path, content: bytes) -> None:
    async with open_store(settings_for(settled).store) as store:
        await store.append(checkpoint_stream("main"), [EventData("Odd", content)], expected=ANY)
        report = await look(settled)
        assert not report.ok
        assert report.relay is not None
        assert report.relay.checkpoint is None
        assert "stream 'tidings_relay-main' holds a checkpoint at version" in str(report)
        assert await move_checkpoint(store, report) == report.position
        assert (await look(settled)).ok


async def test_a_checkpoint_moves_back_no_further_than_what_a_service_lacks(settled: Path) -> None:
    settings = settings_for(settled)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        async with database.transaction() as connection:
            await connection.execute(floors.update().values(position=4))
            await connection.execute(watermarks.update().values(position=4))
        await write_checkpoint(store, "main", 10**6)
        report = await look(settled)
        assert await move_checkpoint(store, report) == 4


async def test_a_stream_of_the_relay_that_was_closed_for_ever_asks_for_another_name(settled: Path) -> None:
    async with open_store(settings_for(settled).store) as store:
        await store.tombstone(checkpoint_stream("main"))
    report = await look(settled)
    assert not report.ok
    assert "Give it another --name" in str(report)


async def test_floors_belong_to_ranges_and_the_lowest_one_says_nothing_of_the_others(settled: Path) -> None:
    settings = settings_for(settled)
    report = await look(settled)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        own = {"service": "audit", "log": str(await store.log_id())}
        async with database.transaction() as connection:
            await connection.execute(floors.delete())
            await connection.execute(watermarks.delete())
            rows = [
                own | {"first_bucket": 0, "last_bucket": 127, "position": report.position},
                own | {"first_bucket": 128, "last_bucket": 255, "position": -1},
            ]
            await connection.execute(floors.insert(), rows)
        from tidings.protocol.position import carried

        upper = [event async for event in store.read_all() if (carried(event) or 0) >= 128]
        (part,) = (await look(settled)).services
        assert part.partitions == 2
        assert 0 < len(upper) < 10
        assert [event.position for event in part.pending] == [event.position for event in upper]


async def test_a_watermark_above_the_logs_end_is_told_with_its_remedy(settled: Path) -> None:
    async with (
        open_database(settings_for(settled).database_of("audit")) as database,
        database.transaction() as connection,
    ):
        await connection.execute(sa.update(watermarks).where(watermarks.c.bucket == 9).values(position=10**6))
    report = await look(settled)
    assert not report.ok
    assert "claims position 1000000, which the log does not reach" in str(report)
    assert "Restore the newer log" in str(report)
    assert not report.services[0].healable


def test_every_fact_of_a_report_is_json() -> None:
    from uuid import uuid4

    from tidings.cli._output import facts
    from tidings.operations.report import RelayReport, ServiceReport

    shown = json.loads(facts(Report(uuid4(), 1, [ServiceReport("shop", 1)], relay=RelayReport("main", 1))))
    assert shown["relay"]["checkpoint"] == 1
