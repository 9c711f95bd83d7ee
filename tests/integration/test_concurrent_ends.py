"""Groups that run side by side on PostgreSQL, and what others believe of them: who was at work, and how long ago."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tests.integration.embedded import (
    Happened,
    StoreAround,
    World,
    embedded,
    emitting,
    followed,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import ANY, EventData, EventStore, Retry, Service
from tidings.database.watermarks import Watermarks
from tidings.stores import Appended, Expected

pytestmark = pytest.mark.usefixtures("on_postgresql")


async def test_the_next_attempt_at_an_event_that_failed_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit after a failure looks whether the watermark moved. The next attempt must not move it meanwhile."""
    service, calls = Service("audit", tables=tables), list[int]()
    assert_unmoved, worlds = Watermarks.assert_unmoved, list[World]()

    @service.on(Happened, retry=Retry(attempts=3, delay=0.2, hold=None))
    async def fail_once(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        calls.append(event.n)
        if calls == [event.n]:
            raise ValueError("the first time")

    async def look_late(self: Watermarks, connection: AsyncConnection, marks: Mapping[int, int]) -> None:
        """Let the next attempt go as far as it can before the commit looks."""
        pipeline = worlds[0].running[0].partitions[0].pipeline
        assert pipeline is not None

        async def next_came() -> bool:
            return bool(pipeline.stages.pending.parked) or bool(await rows(service))

        if marks:
            await until(next_came)
        await assert_unmoved(self, connection, marks)

    monkeypatch.setattr(Watermarks, "assert_unmoved", look_late)
    async with embedded(tmp_path, service) as world:
        worlds.append(world)
        await world.append(Happened(key="k"))
        await world.settled()
        assert (calls, world.running[0].joins) == ([0, 0], 1)
        assert await rows(service) == [("k", 0)]


class Noting(StoreAround):
    """A store that notes how emitted events are appended."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.expected: list[Expected] = []

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if stream.startswith("followed-"):
            self.expected.append(expected)
        return await super().append(stream, events, expected=expected)


async def test_what_a_group_stages_after_the_machine_has_slept_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clock counts the sleep, the other one does not: a moment of the one says nothing in terms of the other."""
    clock_gettime = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda clock: clock_gettime(clock) + 3600.0)
    stores, service = list[Noting](), emitting()

    def wrap(store: EventStore) -> EventStore:
        stores.append(Noting(store))
        return stores[-1]

    events = many(200, 40)
    async with embedded(tmp_path, service, wrap=wrap) as world:
        for start in range(0, len(events), 50):
            await world.append(*events[start : start + 50])
            await world.settled()
        assert len(await followed(world.store)) == len(events)
    assert ANY in stores[0].expected
