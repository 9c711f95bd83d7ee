"""One service's queue refuses what the relay publishes, on a real RabbitMQ: the others go on, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from tests.unit.command_line import invoke
from tidings import Event, EventData, EventStore, Relay, Runtime, Service, Settings, open_bus, open_store
from tidings.buses import Subscription
from tidings.delivery.own_clock import OwnClock
from tidings.hosting.gathering import Probe
from tidings.relay.checkpoints import read_last
from tidings.testing.brokers import RabbitMQNode

LIMIT: Final = '{"max-length": 1, "overflow": "reject-publish"}'


class Placed(Event):
    number: int


refused, other = Service("refused"), Service("other")
arrived: Final[dict[str, list[int]]] = {"refused": [], "other": []}


@refused.on(Placed)
async def take(event: Placed) -> None:
    arrived["refused"].append(event.number)


@other.on(Placed)
async def note(event: Placed) -> None:
    arrived["other"].append(event.number)


@pytest.fixture
def settings(rabbitmq_node: RabbitMQNode, harmed_url: str, tmp_path: Path) -> Settings:
    for taken in arrived.values():
        taken.clear()
    return Settings(
        store=f"sqlite:///{tmp_path}/log.db", bus=harmed_url, database=f"sqlite:///{tmp_path}/{{service}}.db"
    )


@asynccontextmanager
async def relaying(settings: Settings) -> AsyncIterator[tuple[EventStore, Relay]]:
    async def known() -> list[Subscription]:
        return [Subscription("refused"), Subscription("other")]

    async with open_store(settings.store) as store, open_bus(settings.bus) as bus:
        relay = Relay(store, bus, marker_seconds=0.1, checkpoint_seconds=0.05, queues=known)
        task = asyncio.create_task(relay.run())
        try:
            yield store, relay
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def place(store: EventStore, begin: int, end: int) -> None:
    for number in range(begin, end):
        await store.append("order-1", [EventData("Placed", json.dumps({"number": number}).encode())])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def status(settings: Settings, monkeypatch: pytest.MonkeyPatch, *more: str) -> str:
    """Return what a command says of these services."""
    monkeypatch.setenv("TIDINGS_BUS", settings.bus)
    monkeypatch.setenv("TIDINGS_STORE", settings.store)
    monkeypatch.setenv("TIDINGS_DATABASE", str(settings.database))
    return invoke(*more, f"{__name__}:refused", f"{__name__}:other").out


async def test_a_queue_that_a_policy_lets_refuse_holds_up_nobody_and_its_service_catches_up(
    rabbitmq_node: RabbitMQNode, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    vhost = urlsplit(settings.bus).path[1:]

    async def policy(*arguments: str) -> None:
        await asyncio.to_thread(rabbitmq_node.rabbitmqctl, *arguments)

    async with relaying(settings) as (store, relay), Runtime(other, settings=settings):
        async with Runtime(refused, settings=settings):
            await place(store, 0, 5)
            await until(lambda: arrived == {"refused": [*range(5)], "other": [*range(5)]})
        await policy("set_policy", "--vhost", vhost, "limit", "^tidings\\.refused$", LIMIT)
        await place(store, 5, 105)
        await until(lambda: len(arrived["other"]) == 105)
        await until(lambda: "'tidings.refused' refuses messages" in (relay.refusals.told or ""))
        async with asyncio.timeout(60):
            while (await read_last(store, "main")).refusing != relay.refusals.told:
                await asyncio.sleep(0.02)
        said = await asyncio.to_thread(status, settings, monkeypatch, "status")
        assert "UNHEALTHY  relay main: queue 'tidings.refused' refuses messages." in said
        assert f"rabbitmqctl list_queues --vhost {vhost} name state policy" in said
        await place(store, 105, 110)
        async with Runtime(refused, settings=settings):  # its markers come again when it has emptied the queue
            await until(lambda: arrived == {"refused": [*range(110)], "other": [*range(110)]})
            await until(lambda: relay.refusals.told is None)
    assert relay.trouble is None


async def test_a_service_reads_the_log_by_itself_while_nothing_comes_and_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a relay, its queue gets nothing: as behind a queue that refuses everything."""
    monkeypatch.setattr("tidings.delivery.own_clock.SILENT_SECONDS", 0.2)
    monkeypatch.setattr("tidings.delivery.own_clock.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("tidings.delivery.intake.SILENCE_SECONDS", 0.2)
    with capture_logs() as logs:
        async with open_store(settings.store) as store, Runtime(refused, settings=settings) as runtime:
            probe = Probe((refused,), runtime)
            for begin in (0, 5):
                await place(store, begin, begin + 5)
                await until(lambda end=begin + 5: arrived["refused"] == [*range(end)])  # type: ignore[misc]
            monkeypatch.setattr("tidings.hosting.checks.MARKER_SECONDS", 0.0)
            await place(store, 10, 11)
            ready = await probe.ready()
            async with relaying(settings):
                await until(lambda: arrived["refused"] == [*range(11)])
    events = [line["event"] for line in logs]
    assert events.count("service.reads_the_log") == 1
    assert "It reads the log by itself meanwhile" in str(ready.document())


async def test_a_process_that_stands_by_leaves_the_log_to_the_one_at_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ counts one consumer of a queue that two consume: the one that waits for its turn is not counted."""
    monkeypatch.setattr("tidings.delivery.own_clock.SILENT_SECONDS", 0.2)
    monkeypatch.setattr("tidings.delivery.own_clock.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("tidings.delivery.intake.SILENCE_SECONDS", 0.2)
    looks, due = 0, OwnClock.due

    async def counted(self: OwnClock, *, chosen: bool) -> int | None:
        nonlocal looks
        upto = await due(self, chosen=chosen)
        looks += not chosen
        return upto

    monkeypatch.setattr(OwnClock, "due", counted)
    goes_on = asyncio.Event()
    begun: list[int] = []

    async def take(event: Placed) -> None:
        begun.append(event.number)
        if event.number:
            await goes_on.wait()

    processes = Service("refused"), Service("refused")
    for process in processes:
        process.on(Placed)(take)
    async with Runtime(processes[0], settings=settings), Runtime(processes[1], settings=settings):
        async with relaying(settings) as (store, _):
            await place(store, 0, 1)
            await until(lambda: begun == [0])
        looks = 0
        async with open_store(settings.store) as store:
            await place(store, 1, 2)
        await until(lambda: begun != [0])
        looks = 0
        await until(lambda: looks >= 10 or begun != [0, 1])
        assert begun == [0, 1], "the process that stands by has run it, too"
        goes_on.set()
