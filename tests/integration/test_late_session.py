"""`context.session()`: a handler waits for something outside first, and takes its part of a transaction late."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.embedded import (
    Followed,
    Happened,
    assert_once_in_order,
    audit,
    embedded,
    followed,
    letters,
    many,
    note,
    rows,
    tables,
)
from tidings import Context, Retry, Service
from tidings.errors import AttemptEnded, ConfigurationError
from tidings.protocol.position import bucket_of

pytestmark = [pytest.mark.served, pytest.mark.postgresql]


async def test_its_effects_happen_once_in_order_whatever_fails(tmp_path: Path) -> None:
    service, failures = Service("audit", tables=tables), dict.fromkeys(range(0, 300, 17), 2)

    @service.on(Happened, retry=Retry(attempts=5, delay=0.001))
    async def handle(event: Happened, context: Context) -> None:
        await asyncio.sleep(0.001)
        async with context.session() as session:
            await note(session, event)
        context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))
        if failures.get(event.n, 0) > 0:
            failures[event.n] -= 1
            raise RuntimeError("not yet: what it wrote is undone")

    events = many(300, 23)
    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert_once_in_order(await followed(world.store), events)
        assert world.running[0].joins == 1


async def test_it_waits_side_by_side_with_others(tmp_path: Path) -> None:
    service, waiting, together = Service("audit", tables=tables), set[int](), asyncio.Event()
    events = [Happened(key=f"k{n}", n=n) for n in range(20)]
    buckets = {bucket_of(event.key) for event in events}

    @service.on(Happened)
    async def handle(event: Happened, context: Context) -> None:
        waiting.add(bucket_of(event.key))
        if waiting == buckets:
            together.set()
        await together.wait()
        async with context.session() as session:
            await note(session, event)

    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)


async def test_a_handler_that_catches_what_its_session_raised_keeps_the_rest(tmp_path: Path) -> None:
    service, tried = Service("audit", tables=tables), list[int]()

    @service.on(Happened, retry=Retry(attempts=2, delay=0.001, hold=None))
    async def handle(event: Happened, context: Context) -> None:
        tried.append(context.attempt)
        async with context.session() as session:
            await note(session, event)
            if event.key == "culprit":
                for _ in range(2):  # the second one has the number of the first
                    await session.execute(sa.insert(audit).values(id=-1, key=None, n=None))

    others = many(20, 5)
    async with embedded(tmp_path, service) as world:
        await world.append(*others[:10], Happened(key="culprit"), *others[10:])
        await world.settled()
        assert_once_in_order(await rows(service), others)
        (letter,) = await letters(service)
        assert letter.attempts == 2


async def test_what_it_waits_for_its_transaction_is_not_its_own_time(tmp_path: Path) -> None:
    service, ended = Service("audit", tables=tables), dict[str, int]()
    second_waits = asyncio.Event()

    async def write(event: Happened, context: Context) -> None:
        if event.key == "second":
            second_waits.set()
        async with context.session() as session:
            await note(session, event)
            if event.key == "first":
                await second_waits.wait()
                await asyncio.sleep(1.5)
        ended[event.key] = context.attempt

    @service.on(Happened, timeout=1)
    async def quick(event: Happened, context: Context) -> None:
        if event.key == "second":
            await write(event, context)

    @service.on(Happened, timeout=30)
    async def slow(event: Happened, context: Context) -> None:
        if event.key == "first":
            await write(event, context)

    events = [Happened(key="first"), Happened(key="second")]
    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert ended == {"first": 1, "second": 1}


async def test_it_ends_with_the_attempt_and_is_none_outside_a_service(tmp_path: Path) -> None:
    service, left = Service("audit", tables=tables), list[Context]()

    @service.on(Happened)
    async def handle(event: Happened, context: Context) -> None:
        left.append(context)

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        with pytest.raises(AttemptEnded):
            left[0].session()
    alone = Context("s", "h", left[0].log, left[0].event, {}, 1)
    with pytest.raises(ConfigurationError, match="while a service runs"):
        alone.session()
