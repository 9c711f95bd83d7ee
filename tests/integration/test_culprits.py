"""Each incident of a night: `/ready` names its cause, with what to do, and folds what follows from it under it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.embedded import (
    Followed,
    Happened,
    StoreAround,
    World,
    audit,
    auditing,
    embedded,
    note,
    tables,
    until,
)
from tidings import ANY, EventData, EventStore, Hold, Relay, Retry, Runtime, Service, Settings
from tidings.delivery.owned import PROBED, OwnStore
from tidings.errors import BusUnavailable, StoreUnavailable, StreamForbidden
from tidings.hosting.gathering import Probe
from tidings.stores import Appended, Expected

pytestmark = pytest.mark.timeout(60)


def wrong(document: dict[str, Any]) -> list[str]:
    """Return the names of the causes, in order."""
    found = [check for check in document["checks"] if not check["ok"]]
    assert all(check["remedy"] for check in found), "each says what to do"
    assert document["checks"][: len(found)] == found, "causes come first"
    return [check["name"] for check in found]


def said(document: dict[str, Any], name: str) -> str:
    (check,) = [check for check in document["checks"] if check["name"] == name]
    return str(check)


class Clock:
    """A clock that follows the event loop and can be moved forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead


async def becomes(probe: Probe, condition: Callable[[dict[str, Any]], bool], seconds: float = 20.0) -> dict[str, Any]:
    """Wait for an answer of /ready that meets the condition, and return it."""
    document: dict[str, Any] = {}
    try:
        async with asyncio.timeout(seconds):
            while True:
                document = (await probe.ready()).document()
                if condition(document):
                    return document
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"the last answer was {document}") from None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.hosting.gathering.FRESH_SECONDS", 0.0)
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.05, 0.2))


@pytest.mark.sqlite("a trigger makes the database refuse")
@pytest.mark.parametrize("why", ["read-only", "full"])
async def test_a_database_that_takes_no_writes_is_blamed_and_not_the_bus(tmp_path: Path, why: str) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        assert (await becomes(probe, lambda found: found["status"] == "ok"))["status"] == "ok"
        async with _refusing(service, why):
            await world.append(Happened(key="second", n=1))
            document = await becomes(probe, lambda found: found["status"] != "ok")
            for _ in range(20):  # also while it joins again, connected or not
                document = (await probe.ready()).document()
                assert wrong(document) == ["audit.database"]
                assert document["status"] == "unready"
                await asyncio.sleep(0.03)
            told = said(document, "audit.database")
            assert "takes no writes" in told
            assert "df -h" in told
            assert "audit.db" in told
        await becomes(probe, lambda found: found["status"] == "ok")


@asynccontextmanager
async def _refusing(service: Service, why: str) -> AsyncIterator[None]:
    """Let the connections of the service's pool write nothing, as on a disk that is full or read-only."""

    def refuse(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            error = sqlite3.OperationalError("attempt to write a readonly database" if why == "read-only" else "full")
            error.sqlite_errorcode = sqlite3.SQLITE_READONLY if why == "read-only" else sqlite3.SQLITE_FULL
            raise error

    writing = service.running_now.database._writing.sync_engine
    sa.event.listen(writing, "before_cursor_execute", refuse)
    try:
        yield
    finally:
        sa.event.remove(writing, "before_cursor_execute", refuse)


@pytest.mark.sqlite("a file that is made read-only")
async def test_an_idle_service_finds_out_that_its_database_takes_no_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no event that would show the outage."""
    monkeypatch.setattr("tidings.hosting.gathering.IDLE_SECONDS", 0.1)
    service = auditing()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        async with _refusing(service, "read-only"):
            assert wrong(await becomes(probe, lambda found: found["status"] != "ok")) == ["audit.database"]
        monkeypatch.setattr("tidings._support.writes.DOUBT_SECONDS", 0.1)
        await becomes(probe, lambda found: found["status"] == "ok")


class Full(StoreAround):
    """A log that can be full: it can be read and takes no appends."""

    full = away = False

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if self.full or self.away:
            raise StoreUnavailable("the event store log.db: database or disk is full")
        return await super().append(stream, events, expected=expected)

    async def head(self) -> int:
        if self.away:
            raise StoreUnavailable("the event store is away")
        return await self.inner.head()


@asynccontextmanager
async def full_world(folder: Path, service: Service) -> AsyncIterator[tuple[World, Full]]:
    made: list[Full] = []

    def wrap(store: EventStore) -> EventStore:
        made.append(Full(store))
        return made[0]

    async with embedded(folder, service, wrap=wrap) as world:
        yield world, made[0]


async def test_a_log_that_takes_no_appends_is_blamed_though_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.gathering.IDLE_SECONDS", 0.1)
    service = auditing()
    async with full_world(tmp_path, service) as (world, store):
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        store.full = True
        with pytest.raises(StoreUnavailable):
            await world.append(Happened(key="second"))
        document = (await probe.ready()).document()
        assert wrong(document) == ["audit.store"]
        assert "takes no appends" in said(document, "audit.store")
        assert "df -h" in said(document, "audit.store")
        store.full = False
        await becomes(probe, lambda found: found["status"] == "ok")


async def test_a_log_elsewhere_that_takes_no_appends_is_noticed_while_nobody_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.gathering.IDLE_SECONDS", 0.1)
    monkeypatch.setattr("tidings.hosting.gathering.QUIET_SECONDS", 0.1)
    monkeypatch.setattr(OwnStore, "is_local", False)
    service = auditing()
    async with full_world(tmp_path, service) as (world, store):
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        store.full = True
        document = await becomes(probe, lambda found: found["status"] != "ok")
        assert wrong(document) == ["audit.store"]
        assert "takes no appends" in said(document, "audit.store")
        store.full = False
        await becomes(probe, lambda found: found["status"] == "ok")


class Counting(StoreAround):
    """A log that counts the appends that only try whether it takes them."""

    tries = 0
    forbidden = False

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        if stream == PROBED:
            self.tries += 1
            if self.forbidden:
                raise StreamForbidden(stream, "to append to")
        return await super().append(stream, events, expected=expected)


@pytest.mark.parametrize("forbidden", [False, True])
async def test_of_all_who_ask_whether_a_log_takes_appends_one_tries(
    tmp_path: Path, forbidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = False
    service, made = auditing(), list[Counting]()

    async def is_quiet(self: OwnStore, seconds: float) -> bool:
        return quiet and await ask(self, seconds)

    def wrap(store: EventStore) -> EventStore:
        made.append(Counting(store))
        return made[0]

    ask = OwnStore.is_quiet
    monkeypatch.setattr(OwnStore, "is_quiet", is_quiet)
    monkeypatch.setattr(OwnStore, "is_local", False)
    async with embedded(tmp_path, service, wrap=wrap) as world:
        made[0].forbidden = forbidden
        await world.append(Happened(key="first"))
        await world.settled()
        own = [OwnStore(made[0]) for _ in range(3)]
        for store in own:
            store.writes.last_at -= 3600
        monkeypatch.setattr("tidings.hosting.gathering.QUIET_SECONDS", 600.0)
        assert [await ask(store, 600.0) for store in own] == [False] * 3, "an event is new"
        assert [await ask(store, -1.0) for store in own] == [True] * 3
        probe = Probe((service,))
        quiet = True
        monkeypatch.setattr("tidings.hosting.gathering.QUIET_SECONDS", -1.0)
        for _ in range(4):
            assert (await probe.ready()).ok
        # Who may not append is not asked again. Each of the others tries, because here no time is too short.
        assert made[0].tries == (1 if forbidden else 4)


async def test_a_log_on_a_full_disk_is_blamed_while_nobody_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        await becomes(probe, lambda found: found["status"] == "ok")
        with monkeypatch.context() as full:
            full.setattr("tidings.stores.sqlite.store.no_room", lambda path: f"the disk of {path} is full")
            document = (await probe.ready()).document()
            assert (document["status"], wrong(document)) == ("unready", ["audit.store"])
            assert "takes no appends: the disk of" in said(document, "audit.store")
        assert (await probe.ready()).document()["status"] == "ok"


@pytest.mark.sqlite("a file on a full disk")
async def test_a_database_on_a_full_disk_is_blamed_while_nothing_is_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        with monkeypatch.context() as full:
            full.setattr("tidings.hosting.gathering.no_room", lambda path: f"the disk of {path} is full")
            document = (await probe.ready()).document()
            assert wrong(document) == ["audit.database"]
            assert "takes no writes: the disk of" in said(document, "audit.database")
        assert (await probe.ready()).document()["status"] == "ok"


async def test_a_store_that_is_away_is_blamed_alone(tmp_path: Path) -> None:
    service = auditing()
    async with full_world(tmp_path, service) as (world, store):
        probe = Probe((service,))
        await world.append(Happened(key="first"))
        await world.settled()
        store.away = True
        document = await becomes(probe, lambda found: found["status"] != "ok")
        assert wrong(document) == ["audit.store"]
        assert "TIDINGS_STORE" in said(document, "audit.store")
        store.away = False
        await becomes(probe, lambda found: found["status"] == "ok")


class Restored(StoreAround):
    """A log that was set back under running services: `end` is its head then, `log` its identity."""

    end: int | None = None
    log: UUID | None = None

    async def head(self) -> int:
        return await self.inner.head() if self.end is None else self.end

    async def log_id(self) -> UUID:
        return self.log or await self.inner.log_id()


@pytest.mark.parametrize("how", ["behind", "another identity"])
async def test_a_log_that_was_restored_under_the_running_service_is_named_at_the_next_look(
    tmp_path: Path, how: str
) -> None:
    made: list[Restored] = []

    def wrap(store: EventStore) -> EventStore:
        made.append(Restored(store))
        return made[0]

    service = auditing()
    async with embedded(tmp_path, service, wrap=wrap) as world:
        probe = Probe((service,))
        await world.append(*(Happened(key=f"k{n}") for n in range(5)))
        await world.settled()
        await until(lambda: world.running[0].floor > 1)
        await becomes(probe, lambda found: found["status"] == "ok")
        if how == "behind":
            made[0].end = 1
        else:
            made[0].log = UUID(int=7)
        document = (await probe.ready()).document()
        assert wrong(document) == ["audit.log"]
        assert document["status"] == "unready"
        told = said(document, "audit.log")
        assert "tidings log adopt" in told
        assert "docs/restoring.md" in told
        assert ("the log now ends at 1" if how == "behind" else str(UUID(int=7))) in told
        made[0].end = made[0].log = None
        await becomes(probe, lambda found: found["status"] == "ok")


async def test_a_service_that_is_behind_blames_no_relay_that_leads(tmp_path: Path) -> None:
    """The markers wait in the service's own queue, behind the events that it has taken."""
    gate = asyncio.Event()

    async def slow(*_: object) -> None:
        await gate.wait()

    service = auditing(effect=slow, prefetch=20)
    clock = Clock()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,), clock=clock)
        await becomes(probe, lambda found: found["status"] == "ok")
        part = world.running[0].partitions[0]
        part._clock = clock
        await world.append(*(Happened(key=f"k{n}") for n in range(60)))
        pipeline = part.pipeline
        assert pipeline is not None
        await until(lambda: pipeline.unsettled >= 20)
        await until(lambda: len(part.at_work()) > 0)
        assert (await probe.ready()).ok
        clock.ahead = 45.0
        document = (await probe.ready()).document()
        assert document["status"] == "ok", "no longer than its handler may honestly take"
        assert "newer ones wait in its queue, behind" in said(document, "audit.markers")
        clock.ahead = 100.0
        document = (await probe.ready()).document()
        assert wrong(document) == ["audit.handlers"]
        (work,) = part.at_work()
        told = said(document, "audit.handlers")
        assert str(work.event.id) in told
        assert "'handle'" in told
        assert f"tidings why {work.event.id}" in told
        gate.set()
        await world.settled()


async def test_a_handler_that_hangs_is_named_with_its_own_event_and_no_other_one(tmp_path: Path) -> None:
    """The check also fails between two attempts, when no handler is running."""
    hangs = asyncio.Event()
    service = Service("audit", tables=tables)

    @service.on(Happened, timeout=0.3, retry=Retry(attempts=50, delay=0.3, maximum=0.3, hold=Hold()))
    async def handle(event: Happened, session: AsyncSession) -> None:
        if event.key == "culprit":
            await hangs.wait()
        await note(session, event)

    clock = Clock()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,), clock=clock)
        await world.append(Happened(key="before"))
        await world.settled()
        await world.append(Happened(key="culprit"), *(Happened(key=f"k{n}") for n in range(10)))
        part = world.running[0].partitions[0]
        await until(lambda: part.pipeline is not None and part.pipeline.oldest is not None)
        await probe.ready()
        clock.ahead = 120.0
        assert part.pipeline is not None
        names = set[str]()
        for _ in range(40):
            document = (await probe.ready()).document()
            assert wrong(document) == ["audit.handlers"]
            told = said(document, "audit.handlers")
            assert "Happened-culprit" in told
            assert "Happened-k" not in told
            names.add("at work" if "at work" in told else "between attempts")
            await asyncio.sleep(0.03)
        assert names == {"at work", "between attempts"}
        hangs.set()
        await world.settled()


async def test_a_relay_that_is_missing_is_blamed_and_one_that_leads_here_is_not(tmp_path: Path) -> None:
    service = auditing()
    clock = Clock()
    async with embedded(tmp_path, service, relay=False) as world:
        probe = Probe((service,), clock=clock)
        await world.append(Happened(key="first"))
        document = (await probe.ready()).document()
        assert wrong(document) == ["audit.markers"]
        assert "tidings relay" in said(document, "audit.markers")

    settings = Settings(
        store=f"sqlite:///{tmp_path}/two.db", bus="memory://two", database=f"sqlite:///{tmp_path}/two-s.db"
    )
    async with Runtime(service, settings=settings) as runtime:
        probe = Probe((service,), runtime)
        await service.append("happened-1", Happened(key="first"))
        await runtime.settled()
        intake = service.running_now.partitions[0].intake
        assert intake is not None
        intake.take = lambda *_: None  # type: ignore[method-assign]
        news = intake.pulse.news
        intake.pulse.marker_at = news.at = news.came_at = asyncio.get_running_loop().time() - 40
        document = (await probe.ready()).document()
        assert wrong(document) == ["audit.markers"]
        told = said(document, "audit.markers")
        assert "The relay of this process leads" in told
        assert "tidings topology diff" in told


async def test_a_bus_that_is_down_is_blamed_once_by_service_and_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = auditing()
    settings = Settings(
        store=f"sqlite:///{tmp_path}/log.db", bus="memory://down", database=f"sqlite:///{tmp_path}/s.db"
    )
    async with Runtime(service, settings=settings) as runtime:
        probe = Probe((service,), runtime)
        await becomes(probe, lambda found: found["status"] == "ok")
        bus: Any = service.running_now._bus

        async def refuse(*_: object, **__: object) -> None:
            raise BusUnavailable("the broker cannot be reached: connection refused")

        with monkeypatch.context() as broken:
            broken.setattr(bus, "provision", refuse)
            bus.drop_connections()
            document = await becomes(probe, lambda found: found["status"] != "ok" and "effects" in str(found))
            assert len(wrong(document)) == 1
            (cause,) = [check for check in document["checks"] if not check["ok"]]
            assert cause["name"] in ("relay.main.bus", "audit.bus")
            assert "connection refused" in str(cause)
            assert "rabbitmq-diagnostics" in cause["remedy"]
            assert [effect["name"] for effect in cause["effects"]] == sorted(
                {"relay.main.bus", "audit.bus"} - {cause["name"]}
            )
        await becomes(probe, lambda found: found["status"] == "ok")


async def test_a_queue_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await becomes(probe, lambda found: found["status"] == "ok")

        async def refuse(*_: object, **__: object) -> None:
            raise BusUnavailable("queue 'tidings.audit' was deleted, and may not be made again")

        with monkeypatch.context() as broken:
            broken.setattr(world.bus, "provision", refuse)
            world.bus.delete_queue("tidings.audit")
            document = await becomes(probe, lambda found: found["status"] != "ok")
            document = await becomes(probe, lambda found: wrong(found) == ["audit.queue"])
            assert "tidings topology diff" in said(document, "audit.queue")
        await becomes(probe, lambda found: found["status"] == "ok")


async def test_a_paused_handler_and_held_events_are_degraded_and_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", (0.1, 0.2))

    async def fail(event: Happened, *_: object) -> None:
        raise LookupError("no such appointment")

    service = auditing(effect=fail, retry=Retry(attempts=2, delay=0.01, hold=Hold(attempts=99, delay=0.05)))

    @service.on(Followed)
    async def other(event: Followed) -> None:
        """Goes on."""

    async with embedded(tmp_path, service) as world:
        probe = Probe((service,))
        await world.append(Happened(key="only"))
        document = await becomes(probe, lambda found: found["status"] == "degraded")
        assert wrong(document) == ["audit.held"]
        assert "1 events are held" in said(document, "audit.held")
        assert "no such appointment" in said(document, "audit.held")
        assert (await probe.ready()).ok, "degraded is ready"
        await world.append(*(Happened(key=f"k{n}") for n in range(40)))
        document = await becomes(probe, lambda found: wrong(found)[:1] == ["audit.attempts"])
        assert document["status"] == "degraded", "another handler works"
        assert wrong(document) == ["audit.attempts"]
        assert [each["name"] for each in document["checks"][0]["effects"]] == ["audit.held"]
        assert "tidings held list" in said(document, "audit.attempts")


async def test_another_process_that_has_the_queue_and_does_nothing_is_named(tmp_path: Path) -> None:
    """Two processes share a bus: this one stands by for one that hangs."""
    hangs = asyncio.Event()

    async def hang(*_: object) -> None:
        await hangs.wait()

    first, second = auditing(effect=hang), auditing(effect=hang)
    settings = Settings(
        store=f"sqlite:///{tmp_path}/log.db", bus="memory://shared", database=f"sqlite:///{tmp_path}/s.db"
    )
    from tidings._support.tasks import supervised
    from tidings.adapters import open_bus, open_store

    clock = Clock()
    async with (
        open_store(settings.store) as store,
        open_bus(settings.bus) as bus,
        first.running(settings, store=store, bus=bus) as one,
        supervised(Relay(store, bus, marker_seconds=0.2, checkpoint_seconds=0.1).run()),
    ):
        await until(lambda: one.marker_age is not None)
        async with second.running(settings, store=store, bus=bus) as two:
            probe = Probe((second,), clock=clock)
            await until(lambda: two.consuming)
            await first.append("happened-1", Happened(key="k"))
            await until(lambda: bool(one.at_work()))
            await probe.ready()
            await until(lambda: two.partitions[0].marker_age is None)
            clock.ahead = 100.0
            document = (await probe.ready()).document()
            assert wrong(document) == ["audit.queue"]
            told = said(document, "audit.queue")
            assert one.process in told
            assert "kill -9" in told
            hangs.set()
            await until(lambda: _handled(first))


async def test_live_fails_for_a_process_that_has_work_and_does_not_move_though_everything_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = auditing()
    clock = Clock()
    async with full_world(tmp_path, service) as (world, store):
        probe = Probe((service,), clock=clock)
        await world.append(Happened(key="first"))
        await world.settled()
        part = world.running[0].partitions[0]
        assert part.pipeline is not None
        clock.ahead += 200
        await until(lambda: part.floor >= part.marker)
        assert (await probe.live()).ok, "there is nothing to do"

        part.pipeline.stages.lanes._pumping = True  # what is accepted is given out no more, as a bug may do it
        intake = part.intake
        assert intake is not None
        await world.append(Happened(key="second"))
        await until(lambda: part.pipeline is not None and part.pipeline.oldest is not None)
        intake.take = lambda *_: None  # type: ignore[method-assign]
        assert (await probe.live()).ok
        clock.ahead += 59
        assert (await probe.live()).ok, "not for a minute yet"
        clock.ahead += 10
        store.away = True
        assert (await probe.live()).ok, "a restart mends no store"
        store.away = False
        found = await probe.live()
        assert not found.ok
        assert [check.name for check in found.checks if not check.ok] == ["audit.still"]
        assert "Happened-second" in str(found.document())
        part.pipeline.stages.lanes._pumping = False
        part.pipeline.stages.lanes.pump()


async def _handled(service: Service) -> bool:
    async with service.engine.connect() as connection:
        return bool(await connection.scalar(sa.select(sa.func.count()).select_from(audit)))


def test_the_remedy_names_the_file_or_the_server() -> None:
    from tidings.operations.remedies import writable

    assert "df -h '/var/lib/inventory.db'" in writable("/var/lib/inventory.db")


@pytest.mark.parametrize(
    ("url", "client"),
    [
        (
            "postgresql+asyncpg://stock:secret@db.example:5433/in%20stock?connections=10",
            "psql -h db.example -p 5433 -U stock -d 'in stock'",
        ),
        ("postgresql+asyncpg://stock@/shop?host=/var/run/postgresql", "psql -h /var/run/postgresql -U stock -d shop"),
        ("postgresql+asyncpg://stock@[::1]/shop", "psql -h ::1 -U stock -d shop"),
        ("postgresql+asyncpg:///shop", "psql -d shop"),
        ("sqlite:///shop.db", ""),
    ],
)
def test_the_remedy_opens_the_database_as_the_service_does(url: str, client: str) -> None:
    from tidings.operations.remedies import client_for, writable

    assert client_for(sa.make_url(url)) == client
    if client:
        assert f"{client} -c 'SHOW transaction_read_only' -c" in writable("postgresql://masked", client)
