"""A replay of one key, stream or handler: what was chosen and nothing else, in order, amid traffic; and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    World,
    audit,
    auditing,
    count,
    embedded,
    followed,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, Retry, Service
from tidings.database.tables import held
from tidings.errors import ConfigurationError
from tidings.operations.replay import Start, find_start, send_back
from tidings.operations.selective_replay import Picked, ReplayConditions, cancel, pick, run_again

EVENTS = many(60, 6)


async def picked(world: World, service: Service, since: int = 0, **chosen: str) -> Picked:
    start = await find_start(world.store, since)
    assert start is not None
    return await pick(world.store, world.running[0].database, service, start, ReplayConditions(**chosen))


async def again(world: World, service: Service, since: int = 0, **chosen: str) -> int:
    found = await picked(world, service, since, **chosen)
    return await run_again(world.running[0].database, service.name, await world.store.log_id(), found)


@pytest.mark.parametrize("chosen", [{"key": "k2"}, {"stream": "Happened-k2"}, {"key": "k2", "handler": "handle"}])
async def test_what_is_chosen_runs_again_in_order_and_nothing_else(tmp_path: Path, chosen: dict[str, str]) -> None:
    seen: list[bool] = []

    async def effect(event: Happened, context: Context, session: AsyncSession) -> None:
        seen.append(context.replayed)

    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        before = await rows(service)
        assert await again(world, service, 0, **chosen) == 10
        await world.append(Happened(key="k2", n=99), Happened(key="new"))
        await world.settled()
        fresh = (await rows(service))[len(before) :]
        assert [n for key, n in fresh if key == "k2" and n != 99] == [n for key, n in before if key == "k2"]
        assert sorted(row for row in fresh if row[0] != "k2" or row[1] == 99) == [("k2", 99), ("new", 0)]
        assert seen.count(True) == 10
        assert seen.count(False) >= 62, "what was at work while the replay was asked for may have run twice"
        assert await count(service, held) == 0


async def test_one_of_several_handlers_runs_again_from_a_position_on(tmp_path: Path) -> None:
    service = Service("audit", tables=tables)
    calls: list[tuple[str, int]] = []

    @service.on(Happened)
    async def first(event: Happened) -> None:
        calls.append(("first", event.n))

    @service.on(Happened)
    async def second(event: Happened, session: AsyncSession) -> None:
        calls.append(("second", event.n))
        await note(session, event)

    @service.on(Followed, replay=False)
    async def never(event: Followed) -> None:
        calls.append(("never", event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(10)), Followed(key="k", n=10))
        await world.settled()
        positions = [event.position async for event in world.store.read_stream("Happened-k")]
        calls.clear()
        assert await again(world, service, positions[7], handler="second") == 3
        await world.settled()
        assert calls == [("second", 7), ("second", 8), ("second", 9)]
        found = await picked(world, service, key="k")
        assert (len(found.turns), found.passed_over, found.unsettled) == (20, 1, 0)
        with pytest.raises(ConfigurationError, match="no handler 'third'; its handlers: first, second, never"):
            await picked(world, service, handler="third")
        with pytest.raises(ConfigurationError, match="replay=False"):
            await picked(world, service, handler="never")


async def test_what_it_emits_is_appended_once_however_often_it_runs(tmp_path: Path) -> None:
    async def effect(event: Happened, context: Context, session: AsyncSession) -> None:
        context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))

    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        for _ in range(2):
            await again(world, service, handler="handle")
            await world.settled()
        assert len(await rows(service)) == 3 * len(EVENTS)
        assert sorted(await followed(world.store)) == sorted((event.key, event.n) for event in EVENTS)


async def test_what_it_emitted_and_the_store_refused_is_not_given_up_a_second_time(tmp_path: Path) -> None:
    async def effect(event: Happened, context: Context, session: AsyncSession) -> None:
        context.emit(f"followed-{event.key}", Followed(key=event.key))

    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.store.tombstone("followed-k")
        await world.append(Happened(key="k"))
        await world.settled()
        (before,) = await letters(service)
        assert before.kind == "staged"
        assert await again(world, service, key="k") == 1
        await world.settled()
        assert len(await rows(service)) == 2
        assert [letter.id for letter in await letters(service)] == [before.id]


async def test_what_has_not_begun_is_taken_back(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        done = await rows(service)
        log = await world.store.log_id()
    async with embedded(tmp_path, service, relay=False) as world:  # a standby at most: no marker, no message
        database = world.running[0].database
        await world.running[0].joined.wait()
        world.running[0].stopping.set()
        await again(world, service, key="k2")
        assert await count(service, held) == 10
        taken = await cancel(database, "audit", log)
        assert (taken.events, taken.buckets) == (10, 0)
        assert await count(service, held) == 0
        assert (await cancel(database, "audit", log)).events == 0
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert await rows(service) == done


async def test_a_replay_of_everything_is_taken_back_where_it_has_not_come_to(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        done, log = await rows(service), await world.store.log_id()
        start = await find_start(world.store, 0)
        assert isinstance(start, Start)
    async with embedded(tmp_path, service, relay=False) as world:
        database = world.running[0].database
        world.running[0].stopping.set()
        await send_back(database, service, log, start)
        taken = await cancel(database, "audit", log)
        assert taken.buckets > 0
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="k2", n=99))
        await world.settled()
        assert await rows(service) == [*done, ("k2", 99)]


async def test_what_is_held_or_not_handled_yet_is_left_alone(tmp_path: Path) -> None:
    angry = {3}

    async def effect(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.n in angry:
            raise ValueError("not now")

    service = auditing(effect=effect, retry=Retry(attempts=1, hold=Hold(attempts=5, delay=3600.0, maximum=3600.0)))
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(6)))

        async def waits() -> bool:
            return await count(service, held) == 3

        await until(waits)
        found = await picked(world, service, key="k")
        assert (len(found.turns), found.unsettled) == (3, 3)
        assert await again(world, service, key="k") == 3

        async def six() -> bool:
            return await count(service, audit) == 6

        await until(six)
        assert [n for _, n in await rows(service)] == [0, 1, 2, 0, 1, 2]
        await until(waits)


async def test_what_is_to_run_again_blocks_its_key_for_the_process_at_work_too(tmp_path: Path) -> None:
    """Else a later event would go past the one that is held already, as soon as what runs again is done."""
    ran: list[int] = []

    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=5, delay=3600.0, maximum=3600.0)))
    async def refuse_the_second(event: Happened) -> None:
        if event.n == 1:
            raise ValueError("not now")
        ran.append(event.n)

    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(2)))

        async def waits(number: int) -> bool:
            return await count(service, held) == number

        await until(lambda: waits(1))
        assert await again(world, service, key="k") == 1
        await until(lambda: world.running[0].joins > 1)
        await world.append(Happened(key="k", n=2))
        await until(lambda: waits(2))
        await until(lambda: ran == [0, 0])
