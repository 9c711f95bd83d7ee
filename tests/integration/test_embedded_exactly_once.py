"""Effects happen once, in order per key, whatever bus, process and rivals do."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.integration.databases import answers, on_server
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    auditing,
    embedded,
    emitting,
    followed,
    many,
    rows,
    settings_for,
    until,
)
from tests.integration.served import open_log
from tidings import Context, Relay, Retry, Service, open_bus
from tidings._support.tasks import supervised
from tidings.database.inbox import Inbox
from tidings.delivery.intake import Intake
from tidings.operations.verify import verify
from tidings.protocol.message import Message
from tidings.protocol.position import ALL_BUCKETS, carried

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

ROOT = Path(__file__).parents[2]


async def test_every_event_takes_effect_once_in_order_with_and_without_a_session(tmp_path: Path) -> None:
    with_session, without = auditing(), Service("plain")
    seen: list[tuple[str, int]] = []

    @without.on(Happened)
    async def see(event: Happened, context: Context) -> None:
        await asyncio.sleep(random.random() / 1000)
        seen.append((event.key, event.n))

    events = many(2000, 37)
    async with embedded(tmp_path, with_session, without) as world:
        for start in range(0, len(events), 500):
            await world.append(*events[start : start + 500])
        await world.settled()
        assert_once_in_order(await rows(with_session), events)
        assert_once_in_order(seen, events)
        assert [running.joins for running in world.running] == [1, 1]


class Misbehaving:
    """A bus that drops, repeats and delays messages. Delayed ones come out of order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.held: list[Message] = []

    def __call__(self, queue: str, message: Message) -> Iterable[Message]:
        chance = self.random.random()
        if chance < 0.05:
            return
        if chance < 0.10:
            self.held.append(message)
            return
        yield message
        if chance > 0.9:
            yield message
        if chance > 0.85:
            while self.held:
                yield self.held.pop()


@pytest.mark.parametrize("seed", range(3))
async def test_a_bus_that_drops_repeats_reorders_and_loses_its_queue_costs_passes_only(
    tmp_path: Path, seed: int
) -> None:
    service, chance = auditing(prefetch=200), random.Random(seed)
    events = many(1500, 23)
    async with embedded(tmp_path, service) as world:
        world.bus.tamper(Misbehaving(seed))
        for start in range(0, len(events), 100):
            await world.append(*events[start : start + 100])
            if chance.random() < 0.2:
                world.bus.delete_queue("tidings.audit")
            elif chance.random() < 0.2:
                world.bus.drop_connections()
            await asyncio.sleep(0.01)
        await world.settled()
        assert_once_in_order(await rows(service), events)


async def test_a_service_stopped_and_started_many_times_goes_on_where_it_was(tmp_path: Path) -> None:
    service, events, chance = emitting(), many(1200, 19), random.Random(4)
    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*events)
    for _ in range(8):
        async with embedded(tmp_path, service) as world:
            before, more = len(await rows(service)), chance.randint(1, 150)
            enough = min(before + more, len(events))

            async def reached(enough: int = enough) -> bool:
                return len(await rows(service)) >= enough

            await until(reached)
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert_once_in_order(await followed(world.store), events)


@pytest.mark.sqlite("long; test_postgresql.py does it there")
@pytest.mark.parametrize("when", ["anywhere", "before", "after"])
async def test_a_process_killed_with_sigkill_loses_and_repeats_nothing(tmp_path: Path, when: str) -> None:
    """A store with hooks `before` and `after` the append of an emitted event, which comes after the commit that staged
    it."""
    events, chance = many(300 if on_server() else 800, 17), random.Random(5)
    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*events)

    async def audited() -> int:
        return sum(await answers(tmp_path, "SELECT count(*) FROM audit"))

    async def has(enough: int) -> bool:
        return await audited() >= enough

    for attempt in range(4):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.embedded",
            str(tmp_path),
            when if attempt < 3 else "never",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        if attempt == 3:
            output, _ = await child.communicate()
            assert child.returncode == 0
            assert b"settled" in output
        elif when == "anywhere":
            assert child.stdout is not None
            await child.stdout.readline()
            enough = min(await audited() + chance.randint(1, 150), len(events) - 20)
            await until(partial(has, enough))
            child.kill()
            await child.communicate()
        else:
            await child.communicate()
            assert child.returncode == -9

    service = emitting()
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert_once_in_order(await rows(service), events)
        assert_once_in_order(await followed(world.store), events)


@pytest.mark.sqlite("long; test_postgresql.py does it there")
async def test_of_two_processes_of_one_service_the_compare_and_set_lets_one_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.02, 0.1))
    one, zombie, events = auditing(), auditing(), many(300 if on_server() else 1000, 29)
    first, second = settings_for(tmp_path), settings_for(tmp_path)
    async with (
        open_log(tmp_path) as store,
        open_bus(first.bus) as bus,
        open_bus(second.bus) as other_bus,
        one.running(first, store=store, bus=bus) as running,
        zombie.running(second, store=store, bus=other_bus) as risen,
        supervised(Relay(store, bus, name="a", marker_seconds=0.2, checkpoint_seconds=0.1).run()),
        supervised(Relay(store, other_bus, name="b", marker_seconds=0.2, checkpoint_seconds=0.1).run()),
    ):
        for event in events:
            await one.append(f"Happened-{event.key}", event)

        async def ok() -> bool:
            return (await verify(store, [(one, running.database)])).ok

        await until(ok, 90)
        assert_once_in_order(await rows(one), events)
        assert running.joins + risen.joins > 2, "nobody was fenced: the test shows nothing"


class Already(Exception):
    """Raised when an event is handled a second time, as by a unique key."""


@pytest.mark.parametrize("number", [4, 100], ids=["a few", "so many that the breaker opens"])
@pytest.mark.parametrize("transactional", [True, False])
async def test_events_that_another_process_has_done_meanwhile_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transactional: bool, number: int
) -> None:
    """The other process was cut off from the bus. It finishes the events that it had accepted while this one begins the
    same events."""
    done = False
    take_over = Intake._take_over

    async def take_over_from_one_at_work(self: Intake) -> None:
        nonlocal done
        await take_over(self)
        if not done:
            done = True
            inbox = Inbox(running.database, service.name, await world.store.log_id(), ALL_BUCKETS)
            remembered, moves = await inbox.join(), dict[int, tuple[int, int]]()
            async for event in world.store.read_all():
                if (bucket := carried(event)) is not None:
                    moves[bucket] = (remembered.watermarks[bucket], event.position)
            async with running.database.transaction() as connection:
                await inbox.watermarks.move(connection, moves)

    async def refuse(*_: object) -> None:
        if done:
            raise Already

    if transactional:
        service = auditing(effect=refuse, retry=Retry(attempts=5, delay=0.05))
    else:
        service = Service("audit")
        service.on(Happened, retry=Retry(attempts=5, delay=0.05))(_calling(refuse))
    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*many(number, 40))
        await world.settled()
    monkeypatch.setattr(Intake, "_take_over", take_over_from_one_at_work)
    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            (running,) = world.running
            await until(lambda: running.joins == 2 and running.floor >= number)
            assert running.paused is None
    told = [line["event"] for line in logs]
    assert "event.retrying" in told, "nothing failed: the test shows nothing"
    assert "event.held" not in told
    assert "event.dead" not in told


def _calling(function: Callable[..., Awaitable[None]]) -> Callable[[Happened], Awaitable[None]]:
    async def handle(event: Happened) -> None:
        await function()

    return handle
