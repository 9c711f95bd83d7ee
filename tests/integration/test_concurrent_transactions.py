"""Handlers with a session on PostgreSQL, in several transactions at once: what they wait for, and what undoes them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from structlog.testing import capture_logs

from tests.integration.databases import database_url
from tests.integration.embedded import (
    Followed,
    Happened,
    assert_once_in_order,
    audit,
    auditing,
    embedded,
    letters,
    many,
    note,
    rows,
    tables,
)
from tidings import Context, Retry, Service
from tidings.database.engine import connected
from tidings.protocol.position import bucket_of

pytestmark = pytest.mark.usefixtures("on_postgresql")

counters = sa.Table(
    "counters",
    tables,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("total", sa.Integer, nullable=False),
    extend_existing=True,
)


def two_keys() -> tuple[str, str]:
    """Two keys of different buckets."""
    keys = [f"key-{n}" for n in range(20)]
    return keys[0], next(key for key in keys if bucket_of(key) != bucket_of(keys[0]))


def checked_out(service: Service) -> int:
    pool: Any = service.engine.sync_engine.pool
    return int(pool.checkedout())


@pytest.mark.parametrize("wanted", ["session", "connection"])
async def test_a_handler_holds_no_connection_before_its_first_statement(tmp_path: Path, wanted: str) -> None:
    service, waiting, together = Service("audit", tables=tables), [], asyncio.Event()
    events = [Happened(key=f"k{n}", n=n) for n in range(20)]

    async def wait(event: Happened) -> None:
        waiting.append(event.n)
        if len({bucket_of(events[n].key) for n in waiting}) == len({bucket_of(event.key) for event in events}):
            # Of one bucket, one event at a time: these are all that can be at work.
            while checked_out(service):  # a commit of something else, which is soon over
                await asyncio.sleep(0.001)
            together.set()
        await together.wait()

    if wanted == "session":

        @service.on(Happened)
        async def by_session(event: Happened, session: AsyncSession) -> None:
            await wait(event)
            await note(session, event)

    else:

        @service.on(Happened)
        async def by_connection(event: Happened, connection: AsyncConnection) -> None:
            assert connection.dialect.name == "postgresql"
            await wait(event)
            async with connection.begin_nested():
                await connection.execute(sa.insert(audit).values(key=event.key, n=event.n))
            async with connection.stream(sa.select(audit.c.n).where(audit.c.key == event.key)) as found:
                assert [row.n async for row in found][-1] == event.n

    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert world.running[0].joins == 1


async def test_two_groups_that_wait_for_each_others_rows_are_run_again_and_no_attempt_counts(tmp_path: Path) -> None:
    service, attempts = Service("audit", tables=tables), set[int]()
    keys, met = two_keys(), {key: asyncio.Event() for key in two_keys()}

    @service.on(Happened)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        attempts.add(context.attempt)
        if event.key in met:
            mine, other = keys if event.key == keys[0] else keys[::-1]
            add = sa.update(counters).values(total=counters.c.total + 1)
            await session.execute(add.where(counters.c.name == mine))
            met[mine].set()
            await met[other].wait()  # the other group has its first row: this deadlocks
            await session.execute(add.where(counters.c.name == other))
        await note(session, event)

    events = [Happened(key=key, n=n) for n, key in enumerate(keys)]
    async with embedded(tmp_path, service) as world:
        async with service.engine.begin() as connection:
            await connection.execute(sa.insert(counters), [{"name": key, "total": 0} for key in keys])
        with capture_logs() as logs:
            await world.append(*events)
            await world.settled()
        assert_once_in_order(await rows(service), events)
        async with service.engine.connect() as connection:
            assert list(await connection.scalars(sa.select(counters.c.total))) == [2, 2]
        assert [entry["contended"] for entry in logs if entry["event"] == "group.undone"] == [True]
        assert attempts == {1}
        assert await letters(service) == []
        assert world.running[0].joins == 1


async def test_what_cannot_be_serialized_is_run_again_and_no_attempt_counts(tmp_path: Path) -> None:
    service, attempts = Service("audit", tables=tables), set[int]()
    keys, met = two_keys(), {key: asyncio.Event() for key in two_keys()}

    @service.on(Happened)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        attempts.add(context.attempt)
        total = await session.scalar(sa.select(counters.c.total)) or 0
        met[event.key].set()
        for other in met.values():
            await other.wait()  # both have read it
        await session.execute(sa.update(counters).values(total=total + 1))
        await note(session, event)

    url = database_url(tmp_path, "audit")
    async with connected(url) as database, database.transaction() as connection:
        name = make_url(url).database
        await connection.execute(
            sa.text(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'")
        )
    events = [Happened(key=key, n=n) for n, key in enumerate(keys)]
    async with embedded(tmp_path, service) as world:
        async with service.engine.begin() as connection:
            await connection.execute(sa.insert(counters).values(name="all", total=0))
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        async with service.engine.connect() as connection:
            assert await connection.scalar(sa.select(counters.c.total)) == 2
        assert attempts == {1}
        assert await letters(service) == []


async def test_what_stands_behind_an_undone_event_is_cut_off_and_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one key, the first is done and the second waits for something outside, when an event of another key fails and
    so undoes their group."""
    monkeypatch.setattr("tidings.database.engine.SHARE", 15)  # one group at a time
    # However slow the machine is, that one takes both.
    monkeypatch.setattr("tidings.delivery.concurrent_groups.GROUP_SECONDS", 60.0)
    monkeypatch.setattr("tidings.delivery.slow_handlers.SLOW_SECONDS", 60.0)
    key, culprit = two_keys()
    service, cut_off = Service("audit", tables=tables), list[int]()
    holding, asked, second_waits, again = (asyncio.Event() for _ in range(4))

    @service.on(Happened, retry=Retry(attempts=3, delay=0.001))
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == culprit:
            await holding.wait()
            asked.set()
            await session.execute(
                sa.text("SELECT 1")
            )  # it waits until the first has ended, and follows it in its group
            if context.attempt == 1:
                await second_waits.wait()
                raise RuntimeError("undoes its group")
            again.set()
        elif event.n == 2:
            second_waits.set()
            try:
                await again.wait()
            except asyncio.CancelledError:
                cut_off.append(event.n)
                raise
        await note(session, event)
        if event.n == 1:
            holding.set()
            await asked.wait()
            for _ in range(20):  # the culprit asks for the transaction meanwhile
                await asyncio.sleep(0)

    async with embedded(tmp_path, service) as world:
        events = [Happened(key=key, n=1), Happened(key=culprit, n=0), Happened(key=key, n=2)]
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert await letters(service) == []
        assert cut_off == [2]


async def test_a_group_with_a_failure_is_run_again_and_each_effect_is_there_once(tmp_path: Path) -> None:
    failures = dict.fromkeys(range(0, 200, 9), 2)
    calls: dict[int, int] = {}

    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        calls[event.n] = calls.get(event.n, 0) + 1
        if failures.get(event.n, 0) > 0:
            failures[event.n] -= 1
            raise RuntimeError("not yet")

    service, events = auditing(effect=fail, retry=Retry(attempts=5, delay=0.001)), many(200, 23)
    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert await letters(service) == []
        assert world.running[0].joins == 1
        assert max(calls.values()) > 2


async def test_a_handler_that_waits_for_its_late_session_goes_on_after_the_transaction_before_it_was_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler catches an error of the database, so the commit is refused, when another one already has the next place
    in its transaction. That one was never in it, so it is neither run again nor forgotten."""
    monkeypatch.setattr("tidings.database.engine.SHARE", 15)  # one group at a time
    monkeypatch.setattr(
        "tidings.delivery.concurrent_groups.GROUP_SECONDS", 0.0
    )  # it gives its place back when the first has ended
    key, other = two_keys()
    service, late = Service("audit", tables=tables), list[int]()
    holding, asked = asyncio.Event(), asyncio.Event()

    @service.on(Happened)
    async def catch(event: Happened, context: Context, session: AsyncSession) -> None:
        if not asked.is_set():
            with suppress(ProgrammingError):
                await session.execute(sa.text("SELECT nonsense"))
            holding.set()
            await asked.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            return
        await note(session, event)

    @service.on(Followed)
    async def wait(event: Followed, context: Context) -> None:
        late.append(event.n)
        await holding.wait()
        asked.set()
        async with context.session() as session:
            await note(session, Happened(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key=key, n=1), Followed(key=other, n=2))
        await world.settled(20)
        assert_once_in_order(await rows(service), [Happened(key=key, n=1), Happened(key=other, n=2)])
        assert late == [2]
        assert world.running[0].joins == 1
