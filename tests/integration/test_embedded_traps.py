"""What a hurried user, or a hostile one, does to a service: it goes on, and says what was wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from pydantic import field_validator
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tidings import Aggregate, Context, Event, EventData, Runtime, Service, Settings, evolves
from tidings.database.tables import floors
from tidings.errors import ConfigurationError
from tidings.modelling.handlers import Retry

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

tables = sa.MetaData()
seen = sa.Table("seen", tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text))


class First(Event, key="name"):
    name: str


class Second(Event, key="name"):
    name: str


class Picky(Event):
    name: str

    @field_validator("name")
    @classmethod
    def _look_up(cls, name: str) -> str:
        return {"good": "good"}[name]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=f"sqlite:///{tmp_path}/events.db",
        bus=f"memory://{uuid4()}",
        database=database_url(tmp_path),
    )


async def test_an_event_that_calls_itself_a_marker_moves_no_floor(settings: Settings) -> None:
    handled: list[str] = []
    service = Service("audit")

    @service.on(First)
    async def note(event: First) -> None:
        handled.append(event.name)

    async with Runtime(service, settings=settings) as runtime:
        log = str(await runtime.store.log_id())
        forged = {"log": log, "position": 10**9, "base": 0, "touched": {}}
        await runtime.store.append("other-1", [EventData("tidings.marker", json.dumps(forged).encode())])
        for number in range(5):
            await service.append(f"first-{number}", First(name=str(number)))
        report = await runtime.settled()
        assert sorted(handled) == ["0", "1", "2", "3", "4"]
        assert report.services[0].floor <= await runtime.store.head()


async def test_a_floor_beyond_the_end_of_the_log_is_not_called_settled(settings: Settings) -> None:
    service = Service("audit")
    async with Runtime(service, settings=settings) as runtime:
        async with service.engine.begin() as connection:
            await connection.execute(floors.update().values(position=10**9))
        report = await runtime.verify()
    assert not report.ok
    assert "claims position 1000000000, which the log does not reach" in str(report)


async def test_a_handler_that_cancels_its_own_task_is_dead_and_the_rest_goes_on(settings: Settings) -> None:
    handled: list[str] = []
    service = Service("audit", tables=tables)

    @service.on(First, retry=Retry(attempts=1, hold=None, hold_key=False))
    async def cancel(event: First, session: AsyncSession) -> None:
        if event.name == "suicide":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return
        handled.append(event.name)

    async with Runtime(service, settings=settings) as runtime:
        for name in ("suicide", "a", "b"):
            await service.append(f"first-{name}", First(name=name))
        report = await runtime.settled()
    assert sorted(handled) == ["a", "b"]
    assert [letter.reason.partition(":")[0] for letter in report.services[0].dead] == ["CancelledError"]


async def test_a_handler_without_session_sees_what_the_event_before_it_committed(settings: Settings) -> None:
    found: list[int] = []
    service = Service("audit", tables=tables)

    @service.on(First)
    async def write(event: First, session: AsyncSession) -> None:
        await session.execute(seen.insert().values(name=event.name))

    @service.on(Second)
    async def read(event: Second) -> None:
        async with service.engine.connect() as connection:
            query = sa.select(sa.func.count()).select_from(seen).where(seen.c.name == event.name)
            found.append((await connection.execute(query)).scalar_one())

    async with Runtime(service, settings=settings) as runtime:
        for number in range(20):
            await service.append(f"pair-{number}", First(name=str(number)), Second(name=str(number)))
        await runtime.settled()
    assert found == [1] * 20


async def test_a_validator_that_raises_anything_makes_a_dead_letter_not_a_dead_service(settings: Settings) -> None:
    handled: list[str] = []
    service = Service("audit")

    @service.on(Picky)
    async def note(event: Picky) -> None:
        handled.append(event.name)

    async with Runtime(service, settings=settings) as runtime:
        for name in ("bad", "good"):
            await runtime.store.append(f"picky-{name}", [EventData("Picky", json.dumps({"name": name}).encode())])
        report = await runtime.settled()
    assert handled == ["good"]
    assert "a validator of Picky failed: KeyError" in report.services[0].dead[0].reason


class Thing(Aggregate, category="thing"):
    async def begin(self) -> None:
        self.record(First(name=self.id))

    @evolves(First)
    def _begun(self, event: First) -> None: ...


async def test_an_async_decision_is_refused_instead_of_doing_nothing(settings: Settings) -> None:
    service = Service("audit")
    async with Runtime(service, settings=settings):
        with pytest.raises(ConfigurationError, match="a decision must be pure"):
            await service.repository(Thing).create("1", Thing.begin)


def test_permanent_errors_are_a_tuple_of_exception_classes() -> None:
    listed: Any = [ValueError]
    with pytest.raises(ConfigurationError, match="tuple of exception classes"):
        Retry(permanent=listed)


async def test_a_service_runs_once_in_a_process(settings: Settings) -> None:
    service = Service("audit")

    async def run() -> str:
        try:
            async with service.running(settings):
                await asyncio.sleep(0.2)
        except ConfigurationError as error:
            return str(error)
        return "ran"

    outcomes = await asyncio.gather(run(), run())
    ran, refused = sorted(outcomes)
    assert ran == "ran"
    assert refused.startswith("service 'audit' runs already in this process. Start it once")


async def test_services_lifespan_may_append_until_its_end(settings: Settings) -> None:
    ended: list[int] = []

    @asynccontextmanager
    async def around(service: Service) -> AsyncIterator[None]:
        yield
        ended.append((await service.append("last-words", First(name="bye"))).version)

    async with Runtime(Service("audit", lifespan=around), settings=settings):
        pass
    assert ended == [0]


async def test_context_names_the_attempt(settings: Settings) -> None:
    attempts: list[int] = []
    service = Service("audit")

    @service.on(First, retry=Retry(attempts=3, delay=0.001, hold=None, hold_key=False))
    async def fail(event: First, context: Context) -> None:
        attempts.append(context.attempt)
        raise ValueError

    async with Runtime(service, settings=settings) as runtime:
        await service.append("first-1", First(name="1"))
        await runtime.settled()
    assert attempts == [1, 2, 3]


@pytest.mark.parametrize("prefix", ["$", "tidings_", "tidings."])
async def test_a_stream_that_is_never_carried_is_refused_before_it_is_written(settings: Settings, prefix: str) -> None:
    service = Service("audit")
    async with Runtime(service, settings=settings):
        with pytest.raises(ConfigurationError, match="reserved"):
            await service.append(f"{prefix}orders", First(name="1"))
