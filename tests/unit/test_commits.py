"""Commits: who waits for whom, and what a stop does not wait for. Database and progress are stand-ins that note."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

import tidings.delivery.acknowledgement
import tidings.delivery.commits
from tidings._support.timers import Timers
from tidings._support.writes import Writes
from tidings.database.receipts import Receipts
from tidings.delivery.acknowledgement import Acknowledgement
from tidings.delivery.batch import Batch, Pending
from tidings.delivery.commits import LOOK_SECONDS, MANY, Commits
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.inflight import InFlight, State, Step
from tidings.delivery.ledger import Ledger
from tidings.modelling.handlers import Handler, Retry
from tidings.stores import RecordedEvent


class Database:
    writes = Writes()
    turn = nullcontext()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        yield


class Progress:
    """Progress whose floor is due at once if it is asked for now, and otherwise never."""

    def __init__(self) -> None:
        self.floor = self.stored = self.caught = -1
        self.written_items: list[int] = []
        self.receipts = Receipts()

    @property
    def floor_is_stored(self) -> bool:
        return self.stored >= self.floor

    def floor_is_due(self, now: bool) -> bool:
        return now and not self.floor_is_stored

    async def write(self, connection: None, batch: Batch, *, floor_now: bool) -> None:
        if floor_now:
            self.stored = self.floor

    def written(self, batch: Batch) -> None:
        self.written_items.append(len(batch.finished))


class Groups:
    """Has nothing to run."""

    def __len__(self) -> int:
        return 0

    async def run(self, connection: Any, ran: list[InFlight]) -> None:
        pass


class Stage:
    def __init__(self, prefetch: int) -> None:
        self.progress, self.timers, self.pending = Progress(), Timers(), Pending()
        progress: Any = self.progress
        groups: Any = Groups()
        joined: Any = SimpleNamespace(
            site=SimpleNamespace(database=Database(), memory=FailureMemory(), clock=time.monotonic)
        )
        release: Any = SimpleNamespace(begins=lambda: 0.0, committed=lambda batch, began: None)
        self.taken = Acknowledgement(progress, self.pending, self.timers, prefetch)
        ledger = Ledger(joined, progress, release, self.taken)
        self.commits = Commits(joined, self.pending, groups, progress, ledger, self.taken)


@asynccontextmanager
async def commits(prefetch: int) -> AsyncIterator[Stage]:
    stage = Stage(prefetch)
    running = asyncio.create_task(stage.commits.run())
    try:
        yield stage
    finally:
        running.cancel()
        await asyncio.wait((running,))
        stage.timers.close()


def item(position: int) -> InFlight:
    async def handle() -> None:
        raise AssertionError("nobody runs it here")

    handler = Handler("handle", handle, (), (), Retry(), 1.0, threaded=False)
    event = RecordedEvent(position, "s", 0, "T", b"{}", b"", True, bytes(16), 0)
    return InFlight(event, position % 256, handler)


def finish(stage: Stage, items: list[InFlight]) -> None:
    for one in items:
        one.to(State.TAKEN)
        one.to(State.DONE)
        stage.pending.finish(one)


async def test_one_that_was_full_has_room_when_a_quarter_of_it_is_settled_and_is_full_no_more() -> None:
    async with commits(prefetch=4) as stage:
        items = [item(n) for n in range(8)]
        for one in items:
            assert not stage.taken.full
            stage.taken.take(one)
        assert stage.taken.full
        waiting = asyncio.create_task(stage.taken.room())
        finish(stage, items[:1])
        await until(lambda: len(stage.taken) == 7)
        assert not waiting.done()
        assert stage.taken.full
        finish(stage, items[1:2])
        await asyncio.wait_for(waiting, 5)
        assert not stage.taken.full, "who comes next would wait for something to be settled, and there may be nothing"


async def test_what_was_taken_is_settled_in_its_order_whatever_ends_first() -> None:
    settled: list[int] = []
    consumer: Any = SimpleNamespace(settle_through=settled.append)
    async with commits(prefetch=10) as stage:
        items = [item(n) for n in range(3)]
        for tag, one in enumerate(items):
            one.value = Step(consumer, tag)
            stage.taken.take(one)
        stage.taken.settle(Step(floor=7))
        finish(stage, items[1:])
        await until(lambda: stage.progress.written_items == [2])
        assert settled == []
        finish(stage, items[:1])
        await until(lambda: settled == [2])
        assert stage.progress.floor == 7


async def test_a_stop_lingers_for_nobody_and_stores_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidings.delivery.commits, "LINGER_SECONDS", 3600)
    monkeypatch.setattr(tidings.delivery.acknowledgement, "FLOOR_SECONDS", 3600)
    async with commits(prefetch=10) as stage:
        one = item(1)
        stage.taken.take(one)
        stage.taken.settle(Step(floor=1))
        stage.commits.hurry()
        finish(stage, [one])
        await asyncio.wait_for(stage.commits.rest(), 5)
        assert (stage.progress.floor, stage.progress.stored) == (1, 1)


async def test_many_share_a_commit_and_a_few_wait_for_company() -> None:
    async with commits(prefetch=1000) as stage:
        items = [item(n) for n in range(200)]
        for one in items:
            stage.taken.take(one)
        for one in items:  # as handlers do, one after the other, with turns of the loop between
            finish(stage, [one])
            await asyncio.sleep(0)
        await until(lambda: sum(stage.progress.written_items) == 200)
        assert len(stage.progress.written_items) < 20


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_a_large_commit_waits_for_others_while_there_are_any_and_nobody_waits_for_room(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidings.delivery.commits, "LONGEST_SECONDS", 3600)
    async with commits(prefetch=MANY // 2 + 1) as stage:
        stage.commits._took = 3600.0
        items = [item(n) for n in range(MANY + others)]
        for one in items:
            stage.taken.take(one)
        finish(stage, items[:MANY])
        if others == 1:
            await asyncio.sleep(10 * LOOK_SECONDS)
            assert not stage.progress.written_items, "one more can join"
            finish(stage, items[MANY:])
        await until(lambda: bool(stage.progress.written_items))
        assert stage.progress.written_items == [MANY + (others == 1)], "3: a pass waits for room"


async def until(holds: Any) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)
