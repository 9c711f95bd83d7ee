"""What operators order about a held event while a handler is at work on it: their word counts, whatever comes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import Happened, World, count, embedded, until
from tests.integration.test_held_operations import holds, operations
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import dead, held
from tidings.operations.replay import find_start, send_back
from tidings.operations.selective_replay import ReplayConditions, pick, run_again

pytestmark = pytest.mark.postgresql

AN_HOUR = 3600.0


class Work:
    """A handler's work at the first event of a key: it fails, the second time not before it is told to."""

    def __init__(self, *, failures: int) -> None:
        self.failures = failures
        self.calls: list[int] = []
        self.at_work, self.go = asyncio.Event(), asyncio.Event()

    def service(self, *, session: bool, attempts: int) -> Service:
        service = Service("audit")
        hold = Hold(attempts=attempts, delay=AN_HOUR, maximum=AN_HOUR)

        async def without(event: Happened, context: Context) -> None:
            await self(event)

        async def with_session(event: Happened, context: Context, session: AsyncSession) -> None:
            await self(event)

        service.on(Happened, name="work", retry=Retry(attempts=1, hold=hold))(with_session if session else without)
        return service

    async def __call__(self, event: Happened) -> None:
        self.calls.append(event.n)
        times = self.calls.count(event.n)
        if event.n == 0 and times == 2:
            self.at_work.set()
            await self.go.wait()
        if event.n == 0 and times <= self.failures:
            raise ValueError(f"failure {times}")


async def at_work_again(world: World, service: Service, work: Work) -> None:
    """Wait until the event is held, and at work once more because an operator retries it."""
    await world.append(Happened(key="k"), Happened(key="k", n=1))
    await until(holds(service, 2))
    here = await operations(world)
    (first, _) = await here.list()
    await here.retry(positions=[first.position])
    await asyncio.wait_for(work.at_work.wait(), 30)


@pytest.mark.parametrize("attempts", [5, 1], ids=["held again", "last attempt"])
async def test_what_is_retried_at_work_is_tried_again_at_once_when_that_attempt_fails(
    tmp_path: Path, attempts: int
) -> None:
    await retry_at_work(tmp_path, session=False, attempts=attempts)


@pytest.mark.usefixtures("on_postgresql")
@pytest.mark.parametrize("attempts", [5, 1], ids=["held again", "last attempt"])
async def test_what_is_retried_within_its_transaction_is_tried_again_at_once_when_that_fails(
    tmp_path: Path, attempts: int
) -> None:
    """On SQLite, the operator waits until it has failed."""
    await retry_at_work(tmp_path, session=True, attempts=attempts)


async def retry_at_work(folder: Path, *, session: bool, attempts: int) -> None:
    work = Work(failures=2)
    service = work.service(session=session, attempts=attempts)
    async with embedded(folder, service) as world:
        await at_work_again(world, service, work)
        here = await operations(world)
        (first, _) = await here.list()
        assert await here.retry(positions=[first.position]) == 1
        work.go.set()
        await world.settled()
        assert work.calls == [0, 0, 0, 1]
        assert await count(service, dead) == 0


@pytest.mark.parametrize("attempts", [5, 1], ids=["held again", "last attempt"])
@pytest.mark.parametrize("verb", ["drop", "skip"])
async def test_what_is_dropped_or_skipped_at_work_does_not_come_back_when_that_attempt_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, attempts: int
) -> None:
    monkeypatch.setattr("tidings.delivery.revival.HELD_SECONDS", 0.02)
    work = Work(failures=9)
    service = work.service(session=False, attempts=attempts)
    async with embedded(tmp_path, service) as world:
        await at_work_again(world, service, work)
        here = await operations(world)
        (first, _) = await here.list()
        assert await getattr(here, verb)(positions=[first.position]) == 1
        for n in range(2, 12):  # with some of these commits, the process reads anew which keys are blocked
            await world.append(Happened(key="other", n=n))
            await until(lambda n=n: n in work.calls)  # type: ignore[misc]
        work.go.set()
        await world.settled()
        assert [n for n in work.calls if n < 2] == [0, 0, 1]
        assert await count(service, held) == 0
        assert await count(service, dead) == (verb == "skip")


async def test_what_another_replay_has_sent_back_since_it_was_picked_runs_once_more(tmp_path: Path) -> None:
    work = Work(failures=0)
    service = work.service(session=True, attempts=5)
    work.go.set()
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(3)))
        await world.settled()
    async with embedded(tmp_path, service, relay=False) as world:
        database, log = world.running[0].database, await world.store.log_id()
        start = await find_start(world.store, 0)
        assert start is not None
        picked = await pick(world.store, database, service, start, ReplayConditions(key="k"))
        assert len(picked.turns) == 3
        await send_back(database, service, log, start)
        assert await run_again(database, "audit", log, picked) == 0
        assert await count(service, held) == 0
    async with embedded(tmp_path, service) as world:
        await world.settled()
    assert work.calls == [0, 1, 2, 0, 1, 2]
