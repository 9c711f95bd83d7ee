"""A foreign outage or a forbidden stream concerns its event alone; an outage of the own store pauses the service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.integration.embedded import (
    Followed,
    Happened,
    StoreAround,
    count,
    embedded,
    emitting,
    followed,
    letters,
    until,
)
from tidings import ANY, EventData, EventStore, Retry, Runtime, Service, Settings, open_bus, open_store
from tidings.database.engine import open_database
from tidings.database.tables import staged
from tidings.errors import (
    BusUnavailable,
    DatabaseUnavailable,
    Fenced,
    StoreUnavailable,
    StreamForbidden,
)
from tidings.stores import Appended, Expected

pytestmark = pytest.mark.timeout(60)

QUICK = Retry(attempts=2, delay=0.01, hold=None, hold_key=False)


async def second_log(service: Service, other: Service) -> None:
    async with open_store("sqlite:////no/such/folder/archive.db") as archive:
        await archive.head()


async def second_bus(service: Service, other: Service) -> None:
    async with open_bus("amqp://guest:guest@127.0.0.1:1/") as bus, bus.publisher():
        pass


async def second_database(service: Service, other: Service) -> None:
    async with open_database("sqlite:////no/such/folder/other.db"):
        pass


async def raised_itself(service: Service, other: Service) -> None:
    raise StoreUnavailable("the archive is away")


async def raised_from_a_group(service: Service, other: Service) -> None:
    async def fail(error: Exception) -> None:
        raise error

    async with asyncio.TaskGroup() as tasks:
        for error in (BusUnavailable("x"), DatabaseUnavailable("x"), Fenced("x")):
            tasks.create_task(fail(error))


async def another_services_client(service: Service, other: Service) -> None:
    await other.append("nowhere", Happened(key="x"))


async def from_a_thread(service: Service, other: Service) -> None:
    await asyncio.to_thread(lambda: asyncio.run(_append(service)))


async def _append(service: Service) -> None:
    await service.append("from-a-thread", Followed(key="x"))


FOREIGN = [
    second_log,
    second_bus,
    second_database,
    raised_itself,
    raised_from_a_group,
    another_services_client,
    from_a_thread,
]


@pytest.mark.parametrize("use", FOREIGN, ids=lambda use: use.__name__)
async def test_a_foreign_outage_is_the_failure_of_its_event_alone(tmp_path: Path, use: Any) -> None:
    service, other = Service("mirror"), Service("other")
    bad, others = 0, list[str]()

    class Away(StoreAround):
        async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
            raise StoreUnavailable("the log of the other service is away")

    @service.on(Happened, retry=QUICK)
    async def mirror(event: Happened) -> None:
        nonlocal bad
        if event.key == "bad":
            bad += 1
            await use(service, other)
        others.append(event.key)

    settings = Settings(
        store=f"sqlite:///{tmp_path}/log.db", bus="memory://foreign", database=f"sqlite:///{tmp_path}/{{service}}.db"
    )
    elsewhere = Settings(store="memory://foreign", bus="memory://elsewhere", database="sqlite:///:memory:")
    async with open_store(elsewhere.store) as store:
        away: Any = Away(store)
        async with other.running(elsewhere, store=away), Runtime(service, settings=settings) as runtime:
            await service.append("a-bad", Happened(key="bad"))
            for n in range(10):
                await service.append(f"a-{n}", Happened(key=f"k{n}"))
            await runtime.settled(timeout=30)
            assert bad == 2, "each failure is an attempt"
            assert sorted(others) == sorted(f"k{n}" for n in range(10)), "others run once"
            assert service.running_now.joins == 1
            (letter,) = await letters(service)
            assert letter.handler == "mirror"


class Failing(StoreAround):
    """A store that fails for some streams."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.failures: dict[str, StoreUnavailable] = {}
        self.asked: list[str] = []

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        self.asked.append(stream)
        if stream in self.failures:
            raise self.failures[stream]
        return await super().append(stream, events, expected=expected)


@pytest.mark.parametrize("wrapped", ["as it is", "from", "group", "context"])
async def test_an_outage_of_the_own_store_pauses_the_service_whatever_a_handler_makes_of_it(
    tmp_path: Path, wrapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.01, 0.05))
    service = Service("audit")
    around: list[Failing] = []

    @service.on(Happened, retry=QUICK)
    async def pass_on(event: Happened) -> None:
        try:
            await service.append("target", Followed(key=event.key))
        except StoreUnavailable as error:
            if wrapped == "from":
                raise RuntimeError("cannot pass it on") from error
            if wrapped == "group":
                raise ExceptionGroup("several", [ValueError(), error]) from None
            if wrapped == "context":
                raise RuntimeError("cannot pass it on")  # noqa: B904 - as handlers do
            raise

    def wrap(store: EventStore) -> EventStore:
        around.append(Failing(store))
        return around[0]

    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.append(Happened(key="first"))
        await world.settled()
        around[0].failures["target"] = StoreUnavailable("the disk of the log is full")
        await world.append(Happened(key="second"))
        await until(lambda: around[0].asked.count("target") > 6)
        assert world.running[0].joins > 3
        around[0].failures.clear()
        await world.settled()
        assert await letters(service) == [], "an outage is no attempt"


async def test_a_stream_that_is_forbidden_to_a_handler_is_the_failure_of_its_event_alone(tmp_path: Path) -> None:
    service = Service("audit")
    runs: list[str] = []

    @service.on(Happened, retry=QUICK)
    async def pass_on(event: Happened) -> None:
        runs.append(event.key)
        await service.append(f"target-{event.key}", Followed(key=event.key))

    def wrap(store: EventStore) -> EventStore:
        failing = Failing(store)
        failing.failures["target-bad"] = StreamForbidden("target-bad", "to append to")
        return failing

    async with embedded(tmp_path, service, wrap=wrap) as world:
        await world.append(Happened(key="bad"), *(Happened(key=f"k{n}") for n in range(20)))
        await world.settled()
        assert sorted(runs) == sorted(["bad", "bad", *(f"k{n}" for n in range(20))])
        assert world.running[0].joins == 1
        (letter,) = await letters(service)
        assert letter.reason.startswith("StreamForbidden: the store denies its user to append to stream 'target-bad'")


async def test_an_event_emitted_to_a_forbidden_stream_is_dead_with_its_reason_and_others_are_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.staged.FORBIDDEN_ATTEMPTS", 3)
    service = emitting()

    def wrap(store: EventStore) -> EventStore:
        failing = Failing(store)
        failing.failures["followed-bad"] = StreamForbidden("followed-bad", "to append to")
        return failing

    with capture_logs() as logs:
        async with embedded(tmp_path, service, wrap=wrap) as world:
            await world.append(Happened(key="bad"), *(Happened(key=f"k{n}") for n in range(20)))
            await until(lambda: _nothing_is_staged(service))
            await world.settled()
            assert sorted(await followed(world.store)) == sorted((f"k{n}", 0) for n in range(20))
            assert world.running[0].joins == 1
            (letter,) = await letters(service)
            assert letter.kind == "staged"
            assert letter.stream == "followed-bad"
            assert "to append to stream 'followed-bad'" in letter.reason
    waiting = [line for line in logs if line["event"] == "staged.forbidden"]
    assert len(waiting) == 2
    assert all(line["stream"] == "followed-bad" and line["event_id"] for line in waiting)


async def _nothing_is_staged(service: Service) -> bool:
    return await count(service, staged) == 0
