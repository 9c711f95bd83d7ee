"""What operators order is compared with the log first, wherever it is: what is genuine runs, what is forged does not.

Behind `tidings server`, as in EventStoreDB, positions are offsets: next to an event's there is none to begin at.
"""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.embedded import Effect, Happened, World, auditing, embedded, letters, many, rows, until
from tidings import Context, EventData, Relay, Service
from tidings._support.tasks import supervised
from tidings.operations.dead import DeadLetters
from tidings.operations.genuine import FEW, Contradicted
from tidings.operations.recount import Recount, recount
from tidings.operations.replay import find_start, plan, send_back
from tidings.protocol.message import encode
from tidings.protocol.position import CARRIED, carried
from tidings.stores import RecordedEvent

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

EVENTS = many(20, 4)


def failing(*bad: int) -> tuple[Effect, set[int]]:
    """An effect that fails for these numbers until they are taken out of the set."""
    left = set(bad)

    async def effect(event: Happened, context: Context, session: object) -> None:
        if event.n in left:
            raise RuntimeError("not yet")

    return effect, left


async def operator(world: World) -> DeadLetters:
    return DeadLetters(world.running[0].database, "audit", await world.store.log_id(), world.store)


async def proved(world: World, since: int | None = None) -> Recount:
    running = world.running[0]
    return await recount(world.store, [(running.service, running.database)], since=since)


async def relayed(world: World, *events: Happened) -> list[RecordedEvent]:
    """Append events, and let a relay run until they are settled. Return all that the log carries."""
    await world.append(*events)
    async with supervised(Relay(world.store, world.bus, marker_seconds=0.2, checkpoint_seconds=0.1).run()):
        await world.settled()
    return [event async for event in world.store.read_all(filter=CARRIED) if carried(event) is not None]


async def until_letters(service: Service, number: int) -> list[int]:
    async def there() -> bool:
        return len(await letters(service)) == number

    await until(there)
    return [row.id for row in await letters(service)]


async def forged_beside(world: World, real: RecordedEvent) -> RecordedEvent:
    """Publish a forged event behind a real one, at a position at which the log carries none. Return it.

    No relay may run, because its next marker would pass over that position.
    """
    noise = [await world.store.append("tidings_noise", [EventData("tidings_Noise", b"{}")]) for _ in range(2)]
    where = noise[0].position + 1  # behind tidings server, nothing is there; else it is the second one's
    data = b'{"key":"%s","n":666}' % json.loads(real.data)["key"].encode()
    forged = real._replace(position=where, data=data, id_bytes=uuid4().bytes)
    bucket = carried(real)
    assert bucket is not None
    async with world.publisher() as publisher:
        log = await world.store.log_id()
        await publisher.send(encode(forged, log=log, previous=real.position, bucket=bucket))
    return forged


@pytest.mark.parametrize("few", [FEW, 0])
async def test_letters_that_the_log_confirms_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr("tidings.operations.genuine.FEW", few)
    effect, left = failing(0, 7, 19)
    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await world.settled()
        numbers = await until_letters(service, 3)
        left.clear()
        dead = await operator(world)
        await dead.check(numbers)
        await dead.retry(numbers)

        async def all_done() -> bool:
            return len(await rows(service)) == len(EVENTS)

        await until(all_done)
        assert await letters(service) == []


async def test_a_replay_from_between_two_events_runs_what_comes_from_there_on(tmp_path: Path) -> None:
    effect, left = failing(19)
    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:19])
        await world.append(EVENTS[19])
        await world.settled()
        await until_letters(service, 1)
        events = [event async for event in world.store.read_all(filter=CARRIED) if carried(event) is not None]
        start = await find_start(world.store, events[10].position - 1)
        assert start is not None
        assert (start.position, start.before) in [(events[n].position, events[n - 1].position) for n in (9, 10)]
        database = world.running[0].database
        found = await plan(world.store, database, service, start)
        assert found.forged == []
        left.clear()
        await send_back(database, service, found.log, start)
        wanted = {(event.stream, json.loads(event.data)["n"]) for event in events if event.position >= start.position}

        async def again() -> bool:
            done = await rows(service)
            return len(await letters(service)) == 0 and len(done) == len(events) - 1 + len(wanted)

        await until(again)


@pytest.mark.parametrize("few", [FEW, 0])
async def test_a_forged_event_where_the_log_carries_none_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr("tidings.operations.genuine.FEW", few)
    effect, left = failing(666)
    service = auditing(effect=effect)
    async with embedded(tmp_path, service, relay=False) as world:
        real = await relayed(world, *EVENTS)
        forged = await forged_beside(world, real[-1])
        (number,) = await until_letters(service, 1)
        left.clear()
        with pytest.raises(Contradicted, match=f"tidings dead drop {number} --service audit"):
            await (await operator(world)).check([number])
        start = await find_start(world.store, real[5].position)
        assert start is not None
        found = await plan(world.store, world.running[0].database, service, start)
        assert [(one.kind, one.position) for one in found.forged] == [("dead", forged.position)]
        assert 666 not in [n for _, n in await rows(service)]


async def test_a_proof_names_a_forged_event_and_goes_on_from_any_position(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service, relay=False) as world:
        real = await relayed(world, *EVENTS[:10])

        async def is_proved() -> bool:
            return (await proved(world)).proved.get("audit", -1) > 0

        await until(is_proved)
        upto = (await proved(world)).proved["audit"]
        forged = await forged_beside(world, real[-1])
        done = len(EVENTS[:10])

        async def handled() -> bool:
            return len(await rows(service)) > done

        await until(handled)
        await relayed(world, *EVENTS[10:])
        # One below an event's position is none of an event's, where positions are offsets.
        for since in (None, upto, real[5].position - 1, real[3].position - 1):
            found = await proved(world, since)
            assert any(f"position {forged.position}" in wrong for wrong in found.wrong), (since, found.wrong)
            assert any(wrong.endswith("foreign") for wrong in found.wrong), (since, found.wrong)
