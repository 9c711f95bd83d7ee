"""`verify --repair`: whoever is behind reads the log, and what is settled is not run again."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aio_pika
import pytest

from tests.integration.commands import Command, Commands
from tests.integration.embedded import Happened, StoreAround, assert_once_in_order, auditing, many, rows, settings_for
from tests.integration.processes import until
from tidings import ANY, EventData, EventStore, Relay, Service, Settings, open_bus, open_store
from tidings._support.tasks import supervised
from tidings.buses import EventBus
from tidings.database.engine import Database, open_database
from tidings.database.inbox import Inbox
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import staged
from tidings.errors import StreamNotFound, Unroutable
from tidings.operations.repair import append_staged, publish_marker
from tidings.operations.verify import verify
from tidings.protocol.position import ALL_BUCKETS
from tidings.stores import Appended, Expected

# ---- over a network ------------------------------------------------------------------


@asynccontextmanager
async def running(settings: Settings, *services: Service) -> AsyncIterator[tuple[EventStore, EventBus]]:
    """Run the services without a relay, each with its own connections like a process."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(settings.store))
        for service in services:
            bus = await stack.enter_async_context(open_bus(settings.bus))
            await stack.enter_async_context(service.running(settings, store=store, bus=bus))
        yield store, await stack.enter_async_context(open_bus(settings.bus))


async def append(store: EventStore, *events: Happened) -> int:
    position = -1
    for event in events:
        metadata = json.dumps({"partitionKey": event.key}).encode()
        data = EventData("Happened", event.model_dump_json().encode(), metadata)
        position = (await store.append(f"Happened-{event.key}", [data])).position
    return position


async def settled(store: EventStore, *services: Service) -> None:
    pairs = [(service, service.running_now.database) for service in services]
    async with asyncio.timeout(30):
        while not (await verify(store, pairs)).ok:
            await asyncio.sleep(0.02)


@pytest.mark.postgresql
async def test_a_marker_alone_heals_what_the_bus_never_brought_and_repeats_nothing(
    tmp_path: Path, amqp_url: str
) -> None:
    settings = settings_for(tmp_path, amqp_url)
    first, second, standby = auditing("first"), auditing("second", partitions=3), auditing("first")
    events = many(60, 7)
    async with running(settings, first, second, standby) as (store, bus):
        async with supervised(Relay(store, bus, marker_seconds=0.2, checkpoint_seconds=0.1).run()):
            await append(store, *events[:20])
            await settled(store, first, second)
        # Nobody publishes any more, so nobody hears of these.
        position = await append(store, *events[20:])
        assert not (await verify(store, [(first, first.running_now.database)])).ok
        await publish_marker(bus, await store.log_id(), position)
        await settled(store, first, second)
        # Once more is a duplicate to everybody; the next event tells when it was heard.
        await publish_marker(bus, await store.log_id(), position)
        events.append(Happened(key="k1", n=1000))
        await publish_marker(bus, await store.log_id(), await append(store, events[-1]))
        await settled(store, first, second)
        for service in (first, second):
            assert_once_in_order(await rows(service), events)


async def test_a_marker_that_no_queue_takes_is_an_error_and_not_a_healing(tmp_path: Path, amqp_url: str) -> None:
    async with open_bus(amqp_url) as bus:
        with pytest.raises(Unroutable):
            await publish_marker(bus, uuid4(), 7)


@pytest.fixture
def commands(tmp_path: Path, amqp_url: str) -> Iterator[Commands]:
    settings = {
        "TIDINGS_BUS": amqp_url,
        "TIDINGS_DATABASE": "sqlite:///{service}.db",
        "TIDINGS_SERVICES": "shop:shop",
    }
    with Commands(tmp_path, settings) as opened:
        yield opened


def lines(command: Command) -> list[str]:
    return command.out.splitlines()


async def ends(command: Command, code: int) -> Command:
    assert command.process.returncode == code, command.out + command.err
    return command


async def test_a_purged_queue_without_a_relay_is_healed_in_the_process_that_is_there(
    commands: Commands, amqp_url: str
) -> None:
    service, relay = commands.start("run", "shop"), commands.start("relay")
    await commands.append("Placed", '{"number": 1}')
    await until(lambda: len(commands.handled) == 1, "the first is handled")
    service.signal(signal.SIGTERM)
    assert await service.ended() == 0
    await commands.append("Placed", '{"number": 2}')
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("tidings.shop", passive=True)
        while not queue.declaration_result.message_count:
            queue = await channel.declare_queue("tidings.shop", passive=True)
        relay.signal(signal.SIGTERM)
        assert await relay.ended() == 0
        await queue.purge()
    service = commands.start("run", "shop")
    await until(lambda: "service.connected" in service.err, "it is there again")
    await commands.append("Placed", '{"number": 3}')
    ended = await ends(await commands.run("verify", "--repair"), 0)
    if "service.reads_the_log" not in service.err:  # after 20 s without a message; this machine may be as slow as that
        assert "repair: published a marker: every service that is behind position" in ended.out
        assert lines(ended)[0].startswith("log ")
    assert "all settled" in ended.out
    assert sorted(commands.handled) == [f"placed {n} by version 1" for n in (1, 2, 3)]
    ended = await ends(await commands.run("verify", "--repair"), 0)
    assert "repair: nothing to repair" in ended.out
    assert len(commands.handled) == 3


async def test_with_no_process_at_work_the_marker_waits_for_one(commands: Commands) -> None:
    service = commands.start("run", "shop")
    await until(lambda: "service.connected" in service.err, "it has a queue")
    service.signal(signal.SIGTERM)
    assert await service.ended() == 0
    await commands.append("Placed", '{"number": 1}')
    ended = await ends(await commands.run("verify", "--repair", "--json"), 1)
    found = json.loads(ended.out)
    assert found["repaired"][1] == (
        "shop: no process of it is running; the marker waits in queue tidings.shop: start it"
    )
    assert found["services"][0]["pending_count"] == 1
    commands.start("run", "shop")
    await until(lambda: len(commands.handled) == 1, "the marker that waited has it read the log, without any relay")


async def test_a_service_without_a_queue_is_told_to_start(commands: Commands) -> None:
    await commands.append("Placed", '{"number": 1}')
    ended = await ends(await commands.run("verify", "--repair"), 1)
    assert "repair: no service has a queue on this bus: start the services" in ended.out


# ---- embedded ------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Commands]:
    with Commands(tmp_path, {"TIDINGS_SERVICES": "shop:shop"}) as opened:
        yield opened


async def test_embedded_services_that_nobody_runs_are_run_here_until_all_is_settled(alone: Commands) -> None:
    for number in (1, 2):
        await alone.append("Placed", json.dumps({"number": number}))
        ended = await ends(await alone.run("verify", "--repair"), 0)
        assert "repair: ran shop here, because no other process does" in ended.out
        assert "all settled" in lines(ended)[-3]
        assert list(alone.handled) == [f"placed {n} by version 1" for n in range(1, number + 1)]


async def test_what_another_process_has_is_left_to_it(alone: Commands) -> None:
    service = alone.start("run", "shop")
    await until(lambda: "service.connected" in service.err, "it runs")
    await alone.append("Stuck")
    await until(lambda: list(alone.handled) == ["stuck"], "it is at work")
    ended = await ends(await alone.run("verify", "--repair", "--timeout=1"), 1)
    assert f"not run here: process {service.process.pid} has its database open" in ended.out
    service.process.kill()
    await service.ended()
    ended = await ends(await alone.run("verify", "--repair", "--timeout=8"), 1)
    assert "ran shop here" in ended.out
    assert "not settled yet: 1 pending" in ended.out
    assert list(alone.handled) == ["stuck", "stuck"]


async def test_a_checkpoint_that_cannot_be_read_is_replaced_and_the_rest_is_healed(alone: Commands) -> None:
    await alone.append("Placed", '{"number": 1}')
    await ends(await alone.run("verify", "--repair"), 0)
    async with open_store(f"sqlite:///{alone.folder}/tidings.db") as store:
        await store.append("tidings_relay-main", [EventData("Odd", b"7")])
    await alone.append("Placed", '{"number": 2}')
    ended = await ends(await alone.run("verify", "--repair"), 0)
    assert "repair: relay main: its checkpoint is " in ended.out
    assert list(alone.handled) == [f"placed {n} by version 1" for n in (1, 2)]


# ---- staged events -------------------------------------------------------------------

EMITTED = UUID(int=77)
METADATA = b'{"tidingsHandler":"audit.handle","$causationId":"00000000-0000-4000-8000-000000000001"}'


async def stage(database: Database, store: EventStore, id: UUID = EMITTED) -> None:
    inbox = Inbox(database, "audit", await store.log_id(), ALL_BUCKETS)
    row = StagedEvent(3, 1, "followed-1", EventData("Followed", b"{}", METADATA, id=id))
    async with database.transaction() as connection:
        await inbox.staged.add(connection, [row])


async def left(database: Database) -> int:
    async with database.reading() as connection:
        return len(list(await connection.execute(staged.select())))


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[EventStore, Database]]:
    settings = settings_for(folder)
    async with open_store(settings.store) as store, open_database(settings.database_of("audit")) as database:
        yield store, database


async def of_stream(store: EventStore, stream: str) -> list[UUID]:
    return [event.id async for event in store.read_stream(stream)]


class Watched(StoreAround):
    """A store that notes the expected version of each append."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.expected: list[Expected] = []

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        self.expected.append(expected)
        return await super().append(stream, events, expected=expected)


async def test_a_staged_event_that_nobody_appends_is_appended_once_however_many_repair(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, database):
        await stage(database, store)
        log, watched = await store.log_id(), Watched(store)
        done = await asyncio.gather(*(append_staged(watched, database, "audit", log, seconds=30) for _ in range(3)))
        assert all(refused == [] for _, refused in done)
        assert watched.expected
        assert ANY not in watched.expected, "a store may have forgotten that it has the id"
        assert await of_stream(store, "followed-1") == [EMITTED]
        assert await left(database) == 0


async def test_a_staged_event_that_is_in_its_stream_already_is_not_appended_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, database):
        await append(store, *many(5, 2))
        await store.append("followed-1", [EventData("Followed", b"{}", METADATA, id=EMITTED)])
        await store.append("followed-1", [EventData("Other", b"{}")])
        await stage(database, store)
        assert await append_staged(store, database, "audit", await store.log_id(), seconds=30) == (1, [])
        assert len(await of_stream(store, "followed-1")) == 2
        assert await left(database) == 0


async def test_a_staged_event_that_the_store_refuses_stays_as_it_is_and_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, database):
        await append(store, *many(1, 1))
        await store.append("followed-1", [EventData("Followed", b"{}")])
        await store.tombstone("followed-1")
        await stage(database, store)
        count, (refused,) = await append_staged(store, database, "audit", await store.log_id(), seconds=30)
        assert count == 0
        assert str(EMITTED) in refused
        assert "tombstoned" in refused
        assert await left(database) == 1


async def test_what_was_staged_just_now_is_left_to_its_own_process(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, database):
        await stage(database, store)
        log, late = await store.log_id(), uuid4()
        repairing = asyncio.create_task(append_staged(store, database, "audit", log, seconds=30))
        await asyncio.sleep(0.2)
        with pytest.raises(StreamNotFound):  # it may be a fresh row of the service's own
            await of_stream(store, "followed-1")
        await stage(database, store, late)
        assert await repairing == (1, [])
        assert await of_stream(store, "followed-1") == [EMITTED]
        assert await left(database) == 1


def facts(command: Command) -> Any:
    return json.loads(command.out)


async def test_held_and_dead_events_are_not_run_by_a_repair(alone: Commands) -> None:
    await alone.append("Poisoned", stream="bad-1")
    await alone.append("Placed", '{"number": 1}', stream="bad-1")
    ended = facts(await ends(await alone.run("verify", "--repair", "--json"), 1))
    assert ended["services"][0]["dead_count"] == 1
    (waits,) = ended["repaired"][1:]
    assert waits.startswith("shop: 1 held events wait behind dead letters of their keys")
    await ends(await alone.run("dead", "retry", "--all", "--yes"), 0)
    ended = facts(await ends(await alone.run("verify", "--repair", "--json"), 1))
    assert ended["repaired"] == ["shop: 2 held events run when they are due; nothing needs repair"]
    assert ended["services"][0]["held_count"] == 2
    assert alone.handled == []
