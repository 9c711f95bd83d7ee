"""Held events where processes, operators and connections meet: takeovers, starts amid deliveries, retries between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    assert_once_in_order,
    audit,
    auditing,
    count,
    embedded,
    letters,
    note,
    rows,
    settings_for,
    tables,
    until,
)
from tests.integration.served import open_log
from tidings import Hold, Relay, Retry, Service, open_bus
from tidings._support.tasks import supervised
from tidings.database.held_events import Line
from tidings.database.held_rows import HeldRows
from tidings.database.tables import dead, held
from tidings.operations.dead import DeadLetters
from tidings.operations.verify import verify

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

LONG = Retry(attempts=1, hold=Hold(attempts=1000, delay=300.0))


@pytest.mark.sqlite("about who has the queue of a bus in one process")
@pytest.mark.parametrize("transactional", [True, False])
async def test_a_standby_leaves_held_events_alone_and_takes_them_over(
    tmp_path: Path, transactional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.02, 0.1))
    monkeypatch.setattr("tidings.delivery.verdicts.HELD_SECONDS", 0.01)
    fails = True
    attempts: list[tuple[str, int]] = []

    def named(process: str) -> Service:
        service = Service("audit", tables=tables)

        async def fail(event: Happened) -> None:
            attempts.append((process, event.n))
            await asyncio.sleep(0.02)
            if fails and event.key == "culprit":
                raise ValueError("not yet")

        async def with_session(event: Happened, session: AsyncSession) -> None:
            await note(session, event)
            await fail(event)

        retry = Retry(attempts=1, hold=Hold(attempts=1000, delay=0.03, factor=1))
        service.on(Happened, retry=retry)(with_session if transactional else fail)
        return service

    active, standby, settings = named("active"), named("standby"), settings_for(tmp_path)
    culprits, others = ([Happened(key=key, n=n) for n in range(10)] for key in ("culprit", "other"))
    async with open_log(tmp_path) as store, open_bus(settings.bus) as bus:
        serving = active.running(settings, store=store, bus=bus)
        await serving.__aenter__()
        async with (
            standby.running(settings, store=store, bus=bus) as risen,
            supervised(Relay(store, bus, marker_seconds=0.05, checkpoint_seconds=0.02).run()),
        ):
            await standby.append("culprit", *culprits[:5])
            await standby.append("other", *others[:5])
            await until(lambda: len(attempts) > 20)
            assert {process for process, _ in attempts} == {"active"}
            await serving.__aexit__(None, None, None)
            await standby.append("culprit", *culprits[5:])
            await standby.append("other", *others[5:])
            await until(_number(standby, held, 10))
            fails = False

            async def settled() -> bool:
                return (await verify(store, [(standby, risen.database)])).ok

            await until(settled)
            if transactional:
                assert_once_in_order(await rows(standby), [*culprits, *others])
            assert risen.joins == 1, "it looked again when it took over, so nothing fenced it"


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_standby_that_takes_over_knows_at_once_what_was_held_meanwhile(
    tmp_path: Path, transactional: bool
) -> None:
    calls: list[tuple[str, int]] = []

    def named(process: str) -> Service:
        service = Service("plain")

        def see(event: Happened) -> None:
            calls.append((process, event.n))
            if event.n == 0:
                raise ValueError("not now")

        if transactional:

            @service.on(Happened, retry=LONG)
            async def handle_in_session(event: Happened, session: AsyncSession) -> None:
                see(event)

        else:

            @service.on(Happened, retry=LONG)
            async def handle(event: Happened) -> None:
                see(event)

        return service

    active, standby, settings = named("active"), named("standby"), settings_for(tmp_path)
    async with open_log(tmp_path) as store, open_bus(settings.bus) as bus, AsyncExitStack() as first:
        await first.enter_async_context(active.running(settings, store=store, bus=bus))
        async with (
            standby.running(settings, store=store, bus=bus) as risen,
            supervised(Relay(store, bus, marker_seconds=0.05, checkpoint_seconds=0.02).run()),
        ):
            await until(lambda: risen.consuming)
            for n in range(2):  # the second waits for the first
                await standby.append("k", Happened(key="k", n=n))
                await until(_number(standby, held, n + 1))
            await first.aclose()
            await standby.append("k", *(Happened(key="k", n=n) for n in range(2, 6)))
            await until(_number(standby, held, 6))
            assert calls == [("active", 0)]
            assert risen.joins == 1


async def test_what_is_delivered_before_it_is_known_which_keys_are_blocked_waits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def plain() -> Service:
        service = Service("plain")

        @service.on(Happened, retry=LONG)
        async def handle(event: Happened) -> None:
            calls.append(event.n)
            if event.n == 0:
                raise ValueError("not now")

        return service

    first, second = plain(), plain()
    async with embedded(tmp_path, first) as world:
        await world.append(Happened(key="k"))
        await until(_number(first, held, 1))
        assert await world.running[0].reached(await world.store.head())
    known = asyncio.Event()
    blocked = HeldRows.blocked

    async def late(self: HeldRows, connection: AsyncConnection) -> dict[int, dict[Line, int]]:
        await known.wait()
        return await blocked(self, connection)

    monkeypatch.setattr(HeldRows, "blocked", late)
    async with embedded(tmp_path, second) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(1, 6)))
        await until(lambda: world.running[0].consuming)
        await asyncio.sleep(0.1)
        assert calls == [0]
        known.set()
        await until(_number(second, held, 6))
        assert calls == [0]


async def test_what_waits_behind_a_dead_letter_does_not_run_when_an_older_one_is_retried(tmp_path: Path) -> None:
    """Two handlers share a key. Dead letters of one do not hold the key, those of the other do."""
    fails = True
    service = Service("audit", tables=tables)

    async def handle(event: Happened | Followed, session: AsyncSession) -> None:
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))
        if fails and event.key == "k" and event.n < 2:
            raise ValueError("no")

    service.on(Followed, name="releases", retry=Retry(attempts=1, hold=None, hold_key=False))(handle)
    service.on(Happened, name="holds", retry=Retry(attempts=1, hold=None))(handle)
    async with embedded(tmp_path, service) as world:
        await world.append(Followed(key="k"), stream="mixed")
        await world.append(Happened(key="k", n=1), Happened(key="k", n=2), stream="mixed")
        await until(_number(service, dead, 2))
        await until(_number(service, held, 1))
        fails = False
        operator = DeadLetters(world.running[0].database, "audit", await world.store.log_id())
        releasing, holding = await operator.list()
        assert (releasing.holds_key, holding.holds_key) == (False, True)
        assert await operator.retry([releasing.id, releasing.id]) == 1
        await until(_number(service, audit, 1))
        assert await rows(service) == [("k", 0)]
        await operator.retry([holding.id])
        await world.settled()
        assert await rows(service) == [("k", 0), ("k", 1), ("k", 2)]


@pytest.mark.sqlite("a database in memory, which is one connection")
async def test_a_handler_that_keeps_the_only_connection_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.verdicts.HELD_SECONDS", 0.01)

    async def linger(event: Happened, context: object, session: AsyncSession) -> None:
        await asyncio.sleep(0.4)

    service, settings = auditing(effect=linger), settings_for(tmp_path)
    settings = settings.model_copy(update={"database": "sqlite://"})
    async with open_log(tmp_path) as store, open_bus(settings.bus) as bus:
        relay = Relay(store, bus, marker_seconds=0.05, checkpoint_seconds=0.02)
        async with service.running(settings, store=store, bus=bus) as running, supervised(relay.run()):
            service.engine.sync_engine.pool._timeout = 0.02  # type: ignore[attr-defined]
            await service.append("k", Happened(key="k"))
            await until(lambda: bool(running.working()))
            await until(lambda: not running.working())
            assert await rows(service) == [("k", 0)]
            assert running.joins == 1


async def test_a_dead_letter_of_the_first_schema_is_retried_under_the_key_that_it_had(tmp_path: Path) -> None:
    fails = True

    async def fail(event: Happened, context: object, session: AsyncSession) -> None:
        if fails:
            raise ValueError("no")

    service = auditing(effect=fail, retry=Retry(attempts=1, hold=None))
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k"), stream="not-the-key")
        await until(_number(service, dead, 1))
        database = world.running[0].database
        async with database.transaction() as connection:
            await connection.execute(sa.update(dead).values(key=None, holds_key=False))
        fails = False
        operator = DeadLetters(database, "audit", await world.store.log_id())
        assert await operator.retry([letter.id for letter in await letters(service)]) == 1
        async with database.reading() as connection:
            keys = list(await connection.scalars(sa.select(held.c.key)))
        assert keys in (["k"], []), "it waits under its key, or was run already"
        await world.settled()
        assert await rows(service) == [("k", 0)]


def _number(service: Service, table: sa.Table, number: int) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return await count(service, table) == number

    return reached
